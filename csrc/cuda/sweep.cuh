// SPDX-License-Identifier: Apache-2.0
// A sweep over a row: a warp reads a sub-tile of a field's logits and leaves a Partial; a warp
// combines those of a row. To add statistics: in LaneStats.
#pragma once

#include "position.cuh"

namespace specens {

__device__ __forceinline__ Partial* partials_of(const Problem& problem, int64_t place, int slot) {
  return problem.partials + (place * problem.slots + slot) * problem.sub_tiles;
}

// Statistics of what a lane has seen of a sub-tile.
template <typename T>
struct LaneStats {
  T top = -HUGE_VAL;
  float sum = 0.0f;
  int32_t flags = 0;

  __device__ void add(const T (&values)[kPerLane], const Field& field, int32_t found) {
    T most = top;
    const T cutoff = static_cast<T>(field.cutoff);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (values[i] > most && values[i] >= cutoff) most = values[i];
    }
    const auto inverse_temperature = static_cast<float>(field.inverse_temperature);
    sum *= scale(top, most, inverse_temperature);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!(values[i] >= cutoff) || values[i] == -HUGE_VAL) continue;
      sum += scale(values[i], most, inverse_temperature);
    }
    top = most;
    flags |= found;
  }

  // Of the whole sub-tile, in every lane of the warp.
  __device__ Partial finish(const Field& field) const {
    const T most = warp_max(top);
    const float here = sum * scale(top, most, static_cast<float>(field.inverse_temperature));
    return {static_cast<double>(most), warp_sum(here), warp_or(flags)};
  }

 private:
  static __device__ float scale(T value, T most, float inverse_temperature) {
    const float distance = value == most ? 0.0f : static_cast<float>(value - most);
    return distance == 0.0f ? 1.0f : expf(distance * inverse_temperature);
  }
};

__device__ __forceinline__ void keep_partial(const Problem& problem, int64_t place, int slot,
                                             int sub_tile, const Partial& partial) {
  if (lane_id() == 0) store(partials_of(problem, place, slot) + sub_tile, partial);
}

__device__ __forceinline__ int64_t begin_of(int sub_tile) {
  return static_cast<int64_t>(sub_tile) * kSubTile;
}

// A member of a mixture, and the proposal if it reads the same logits in another way; or, with
// k == kSeparateDraft, the draft's logits.
__device__ inline void sweep_logits(const Problem& problem, const Position& position, int64_t place,
                                    int k, int sub_tile) {
  const bool proposes = position.proposer == k, separate = k == kSeparateDraft;
  const Field& field = separate ? position.proposal : position.members[k];
  if (!proposes && (separate || field.weight == 0.0f)) return;
  const bool twice = proposes && !separate && !proposal_is_member(problem, position);
  LaneStats<float> stats, proposal;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    float logits[kPerLane];
    const int64_t begin = begin_of(sub_tile) + round * kRound;
    const int32_t flags = load_lane(field, begin, problem.ensemble.vocab_size, logits);
    stats.add(logits, field, flags);
    if (twice) proposal.add(logits, position.proposal, flags);
  }
  const int slot = separate ? problem.proposal_slot() : k;
  keep_partial(problem, place, slot, sub_tile, stats.finish(field));
  if (twice) {
    keep_partial(problem, place, problem.proposal_slot(), sub_tile,
                 proposal.finish(position.proposal));
  }
}

// Combines the partials of a slot in a fixed order; one warp.
__device__ inline Total combine(const Problem& problem, int64_t place, int slot,
                                double inverse_temperature) {
  const Partial* partials = partials_of(problem, place, slot);
  double top = kNoMass;
  int32_t flags = 0;
  for (int s = lane_id(); s < problem.sub_tiles; s += kLanes) {
    const Partial here = load_fresh(partials + s);
    top = here.top > top ? here.top : top;
    flags |= here.flags;
  }
  top = warp_max(top);
  double sum = 0.0;
  for (int s = lane_id(); s < problem.sub_tiles; s += kLanes) {
    const Partial here = load_fresh(partials + s);
    if (here.sum == 0.0f) continue;
    sum += static_cast<double>(here.sum) * exp(shifted(here.top, top, inverse_temperature));
  }
  return {warp_sum(sum), top, warp_or(flags)};
}

}  // namespace specens
