// SPDX-License-Identifier: Apache-2.0
// What a rejection leaves of the target at one position: its mass in each sub-tile, in single
// precision, or exactly where that would be rounding. To add what a rule leaves: a functor beside
// `JudgedLeft`.
#pragma once

#include "draw.cuh"
#include "exact.cuh"
#include "sweep.cuh"

namespace specens {

// Below this total the rounding of single precision would show in a residual's masses.
constexpr double kLeastSingleResidual = 1e-4;

// A residual of less mass is rounding, and empty; the reference's LEAST_RESIDUAL.
constexpr double kLeastResidual = 0x1p-40;

// What is left of a token, as a rule that sweeps nothing has it.
struct PlainLeft {
  static constexpr bool kMayBeLate = true;

  __device__ double operator()(const Position& /*position*/, int64_t /*token*/, double p,
                               double q) const {
    return left_of(Judgement{}, p, q);
  }
  __device__ double of_others() const { return 1.0; }
};

// As `judge` found it.
struct JudgedLeft {
  static constexpr bool kMayBeLate = false;
  Judgement judgement;

  __device__ double operator()(const Position& position, int64_t token, double p, double q) const {
    if (judgement.without_token && token == position.token) return 0.0;
    return left_of(judgement, p, q);
  }
  // The part that stays of a token which the draft does not have.
  __device__ double of_others() const {
    return judgement.left == Left::kTarget ? 1.0 : judgement.scale;
  }
};

template <typename LeftOver>
__device__ double residual_mass(const Position& position, const LeftOver& left, int64_t token) {
  return left(position, token, target_mass(position, token), draft_mass(position, token));
}

// exp((value - top) / temperature) in single precision.
template <typename T>
__device__ __forceinline__ double single_mass(const Field& field, T value) {
  if (field.empty || value == -HUGE_VAL || value < static_cast<T>(field.cutoff)) return 0.0;
  const T top = static_cast<T>(field.top);
  const float distance = value == top ? 0.0f : static_cast<float>(value - top);
  const auto inverse_temperature = static_cast<float>(field.inverse_temperature);
  return static_cast<double>(distance == 0.0f ? 1.0f : expf(distance * inverse_temperature));
}

__device__ __forceinline__ double scale_of(const Field& field) {
  return field.empty ? 0.0 : exp(-field.log_sum);
}

__device__ __forceinline__ void add_draft(const Position& position, const float (&logits)[kPerLane],
                                          float (&drafted)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    drafted[i] = static_cast<float>(single_mass(position.proposal, logits[i]));
  }
}

// The residual's mass in a lane's share of a round. Exponentials are of single precision, but for a
// mixture that is warped as a whole. Adds the status bits of members that are known.
__device__ inline double lane_residual(const Problem& problem, const Position& position,
                                       int64_t begin, int32_t& flags) {
  const int64_t vocab_size = problem.ensemble.vocab_size;
  double values[kPerLane] = {};
  float drafted[kPerLane] = {};
#pragma unroll 1
  for (int k = 0; k <= position.count; ++k) {
    const bool separate = k == position.count;
    const bool proposes = position.proposer == (separate ? kSeparateDraft : k);
    const Field& field = separate ? position.proposal : position.members[k];
    const bool masks = k == 0 && position.plausible > kNoMass;
    const bool used =
        !separate && (position.is_mixture ? field.share != 0.0 : field.weight != 0.0f || masks);
    if (!used && !proposes) continue;
    float logits[kPerLane];
    const int32_t found = load_lane(field, begin, vocab_size, logits);
    if (proposes) add_draft(position, logits, drafted);
    if (!used) continue;
    if (field.known) flags |= found;
    const double scale = field.share * scale_of(field);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!position.is_mixture) {
        values[i] = fold_in(position, k, values[i], logits[i]);
      } else if (position.warped) {
        values[i] = mix_in(position, k, values[i], logits[i]);
      } else {
        values[i] += scale * single_mass(field, logits[i]);
      }
    }
  }
  const double scale = scale_of(position.proposal), target_scale = scale_of(position.target);
  double residual = 0.0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (begin + lane_token(i) >= vocab_size) continue;
    double target = values[i];
    if (!position.is_mixture) {
      target = single_mass(position.target, folded(target)) * target_scale;
    } else if (position.warped) {
      target = value_mass(position, target);
    }
    residual += left_of(Judgement{}, target, static_cast<double>(drafted[i]) * scale);
  }
  return residual;
}

// The same in one sub-tile; one warp.
__device__ inline Residual sweep_residual(const Problem& problem, const Position& position,
                                          int sub_tile) {
  double residual = 0.0;
  int32_t flags = 0;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile + round * kRound;
    residual += lane_residual(problem, position, begin, flags);
  }
  return {warp_sum(residual), warp_or(flags)};
}

// The residual's mass in one sub-tile, in double precision; one warp.
template <typename LeftOver>
__device__ double sweep_exactly(const Problem& problem, const Position& position,
                                const LeftOver& left, int sub_tile) {
  double mass = 0.0;
  for (int i = lane_id(); i < kSubTile; i += kLanes) {
    const int64_t token = static_cast<int64_t>(sub_tile) * kSubTile + i;
    if (token < problem.ensemble.vocab_size) mass += residual_mass(position, left, token);
  }
  return warp_sum(mass);
}

// Two laws that are nearly equal differ by less than what their normalisers are good to: everything
// once more, in double precision. That is rare, and one block does it.
__device__ inline void measure_exactly(const Problem& problem, Position& position,
                                       DrawScratch& scratch) {
  refine(problem, scratch.totals, position);
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) {
    const double mass = sweep_exactly(problem, position, PlainLeft{}, s);
    if (lane_id() == 0) scratch.masses[s] = mass;
  }
  __syncthreads();
}

// A draft that was one token leaves of every other token the same part.
template <typename LeftOver>
__device__ void measure_point(const Problem& problem, const Position& position,
                              const LeftOver& left, int64_t place, DrawScratch& scratch) {
  read_masses(problem, position, place, scratch);
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    scratch.masses[s] *= left.of_others();
  }
  __syncthreads();
  const int sub_tile = static_cast<int>(position.token / kSubTile);
  fill(problem, sub_tile, scratch,
       [&](int64_t token) { return residual_mass(position, left, token); });
  if (warp_id() == 0) {
    double mass = 0.0;
    for (int i = lane_id(); i < kSubTile; i += kLanes) mass += scratch.tokens[i];
    mass = warp_sum(mass);
    if (lane_id() == 0) scratch.masses[sub_tile] = mass;
  }
  __syncthreads();
}

}  // namespace specens
