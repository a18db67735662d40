// SPDX-License-Identifier: Apache-2.0
// What one token has in a row's laws, and sums over the vocabulary, in double precision by one
// block: for what single precision would show in. To add a law of a row: its normaliser in
// `refine`.
#pragma once

#include "stats.cuh"

namespace specens {

__device__ __forceinline__ double target_mass(const Position& position, int64_t token) {
  return value_mass(position, token_value(position, token));
}

// Of the draft's law, or of the point mass that the child is.
__device__ __forceinline__ double draft_mass(const Position& position, int64_t token) {
  if (position.proposer == kNobody) return token == position.token ? 1.0 : 0.0;
  return field_mass(position.proposal,
                    static_cast<double>(clean(load_raw(position.proposal, token))));
}

// Sums of what the threads have, the same in every one.
__device__ __forceinline__ double block_sum(double own, double (&totals)[kWarps]) {
  own = warp_sum(own);
  if (lane_id() == 0) totals[warp_id()] = own;
  __syncthreads();
  own = 0.0;
  for (int w = 0; w < kWarps; ++w) own += totals[w];
  __syncthreads();
  return own;
}

// Sum of mass(token) over the vocabulary; the whole block.
template <typename Mass>
__device__ __forceinline__ double sum_tokens(const Problem& problem, double (&totals)[kWarps],
                                             const Mass& mass) {
  double sum = 0.0;
  for (int64_t token = threadIdx.x; token < problem.ensemble.vocab_size; token += kThreads) {
    sum += mass(token);
  }
  return block_sum(sum, totals);
}

// Makes the normaliser of a field exact up to double precision, unless it was given.
template <typename Value>
__device__ __forceinline__ void refine_field(const Problem& problem, double (&totals)[kWarps],
                                             Field& field, const Value& value) {
  if (field.empty || field.known) return;
  if (threadIdx.x == 0) field.log_sum = 0.0;
  __syncthreads();
  const double sum =
      sum_tokens(problem, totals, [&](int64_t token) { return field_mass(field, value(token)); });
  if (threadIdx.x == 0) field.log_sum = log(sum);
  __syncthreads();
}

// The same of every law of a row; the whole block.
__device__ __forceinline__ void refine(const Problem& problem, double (&totals)[kWarps],
                                       Position& position) {
  for (int k = 0; k < position.count && position.is_mixture; ++k) {
    Field& field = position.members[k];
    if (field.share == 0.0 && !(position.proposer == k && proposal_is_member(problem, position)))
      continue;
    refine_field(problem, totals, field,
                 [&](int64_t token) { return static_cast<double>(clean(load_raw(field, token))); });
  }
  // The cutoff of a mixture's logarithm was found by the members' normalisers as they were.
  if (position.warped && threadIdx.x == 0) position.target.cutoff -= 1e-6;
  if (!position.is_mixture || position.warped) {
    refine_field(problem, totals, position.target, [&](int64_t token) {
      const double value = token_value(position, token);
      return position.is_mixture ? log(value) : value;
    });
  }
  if (proposal_is_member(problem, position)) {
    if (threadIdx.x == 0) position.proposal = position.members[position.proposer];
    __syncthreads();
    return;
  }
  if (position.proposer == kNobody) return;
  refine_field(problem, totals, position.proposal, [&](int64_t token) {
    return static_cast<double>(clean(load_raw(position.proposal, token)));
  });
}

}  // namespace specens
