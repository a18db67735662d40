// SPDX-License-Identifier: Apache-2.0
// `row_stats`: the one sweep over the logits that every op starts with. A block sweeps a tile of a
// row of one source, a warp a sub-tile of it, and leaves a Partial of every field it meets; the
// last block of the row combines them into totals. To add a field: its slot in Problem
// (problem.cuh), its partials in `row_stats`, its totals in `combine_all`.
#include "stats.cuh"
#include "sweep.cuh"

namespace specens {
namespace {

struct StatsShared {
  Position position;
  bool is_last;
  bool repairs;
  float tops[kWarps];
  double scores[kWarps];
  int64_t tokens[kWarps];
};

// All members of a product at once, and the proposal if it is one of them.
__device__ void sweep_product(const Problem& problem, const Position& position, int64_t place,
                              int sub_tile, bool with_proposal) {
  LaneStats<double> stats;
  LaneStats<float> proposal;
  const bool by_member =
      with_proposal && position.proposer != kNobody && position.proposer != kSeparateDraft;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = begin_of(sub_tile) + round * kRound;
    double values[kPerLane] = {};
    int32_t flags = 0;
#pragma unroll 1
    for (int k = 0; k < position.count; ++k) {
      const Field& field = position.members[k];
      const bool proposes = by_member && position.proposer == k;
      const bool masks = k == 0 && position.plausible > kNoMass;
      if (field.weight == 0.0f && !proposes && !masks) continue;
      float logits[kPerLane];
      const int32_t found = load_lane(field, begin, problem.ensemble.vocab_size, logits);
      if (field.weight != 0.0f) {
        flags |= found;
        if ((found & kInfiniteLogits) != 0) flags |= 256 << k;
      }
      if (proposes) proposal.add(logits, position.proposal, found);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = fold_in(position, k, values[i], logits[i]);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const bool inside = begin + lane_token(i) < problem.ensemble.vocab_size;
      values[i] = inside ? folded(values[i]) : kNoMass;
    }
    stats.add(values, position.target, flags);
  }
  keep_partial(problem, place, 0, sub_tile, stats.finish(position.target));
  if (by_member) {
    keep_partial(problem, place, problem.proposal_slot(), sub_tile,
                 proposal.finish(position.proposal));
  }
}

// Every slot that was swept, a warp for each.
__device__ void combine_all(const Problem& problem, const Position& position, int64_t place) {
  const int proposal_slot = problem.proposal_slot();
  for (int slot = warp_id(); slot <= proposal_slot; slot += kWarps) {
    const bool is_proposal = slot == proposal_slot;
    const Field& field = is_proposal           ? position.proposal
                         : position.is_mixture ? position.members[slot]
                                               : position.target;
    const bool used = is_proposal
                          ? position.proposer != kNobody && !proposal_is_member(problem, position)
                      : position.is_mixture ? field.weight != 0.0f || position.proposer == slot
                                            : true;
    if (!used || field.late) continue;
    const Total total = combine(problem, place, slot, field.inverse_temperature);
    if (lane_id() == 0) store(problem.totals + place * problem.slots + slot, total);
  }
}

// The largest logit of a member; the whole block.
__device__ float block_top(const Problem& problem, StatsShared& shared, const Field& field) {
  float top = kNoMass;
  for (int64_t token = threadIdx.x; token < problem.ensemble.vocab_size; token += kThreads) {
    const float value = clean(load_raw(field, token));
    top = value > top ? value : top;
  }
  top = warp_max(top);
  if (lane_id() == 0) shared.tops[warp_id()] = top;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) top = shared.tops[w] > top ? shared.tops[w] : top;
  __syncthreads();
  return top;
}

// In a product of warped members, one of temperature 0 or with a +inf leaves nothing but its
// largest values. That is rare, so it is seen when the row has been swept, and the row is swept
// again by the one block that saw it.
__device__ void repair(const Problem& problem, StatsShared& shared, int64_t place) {
  Position& position = shared.position;
  if (threadIdx.x == 0) {
    const int32_t flags = load_fresh(&problem.totals[place * problem.slots]).flags;
    shared.repairs = false;
    for (int k = 0; k < position.count; ++k) {
      Field& field = position.members[k];
      if (field.weight == 0.0f) continue;
      if ((flags & (256 << k)) != 0) field.cutoff = -kNoMass;
      shared.repairs |= field.cutoff == -kNoMass || field.temperature == 0.0f;
    }
  }
  __syncthreads();
  if (shared.repairs) {
    for (int k = 0; k < position.count; ++k) {
      Field& field = position.members[k];
      if (field.weight == 0.0f || field.temperature > 0.0f) continue;
      const float top = block_top(problem, shared, field);
      if (threadIdx.x == 0) field.cutoff = top;
      __syncthreads();
    }
    for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) {
      sweep_product(problem, position, place, s, false);
    }
    __syncthreads();
    if (warp_id() == 0) {
      const Total total = combine(problem, place, 0, position.target.inverse_temperature);
      if (lane_id() == 0) store(problem.totals + place * problem.slots, total);
    }
  }
  if (static_cast<int>(threadIdx.x) < kCutoffs) {
    const int k = static_cast<int>(threadIdx.x);
    const double cutoff = k < position.count ? position.members[k].cutoff : kNoMass;
    store(problem.cutoffs + place * kCutoffs + k, cutoff);
  }
  __syncthreads();
}

// What the argmax compares: masses of a mixture, logarithms of a product's.
__device__ __forceinline__ double score_of(const Position& position, double value) {
  return position.is_mixture ? value : field_log_mass(position.target, value);
}

// Bounds of the best score in a sub-tile, from its partials.
struct Bounds {
  double low, high;
};

__device__ Bounds bounds_of(const Problem& problem, const Position& position, int64_t place,
                            int sub_tile) {
  if (!position.is_mixture) {
    const double top = load_fresh(partials_of(problem, place, 0) + sub_tile).top;
    const double score = field_log_mass(position.target, top);
    return {score, score};
  }
  Bounds bounds = {0.0, 0.0};
  for (int k = 0; k < position.count; ++k) {
    const Field& field = position.members[k];
    if (field.share == 0.0) continue;
    const double top = load_fresh(partials_of(problem, place, k) + sub_tile).top;
    const double mass = field.share * field_mass(field, top);
    bounds.low = mass > bounds.low ? mass : bounds.low;
    bounds.high += mass;
  }
  return bounds;
}

__device__ __forceinline__ bool beats(double score, int64_t token, double best, int64_t holder) {
  return score > best || (score == best && token < holder);
}

// Reads again only the sub-tiles that can hold the most probable token.
__device__ int64_t argmax(const Problem& problem, StatsShared& shared, int64_t place) {
  const Position& position = shared.position;
  if (position.empty) return 0;
  const double nothing = position.is_mixture ? 0.0 : static_cast<double>(kNoMass);
  double least = nothing;
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    const double low = bounds_of(problem, position, place, s).low;
    least = low > least ? low : least;
  }
  least = warp_max(least);
  if (lane_id() == 0) shared.scores[warp_id()] = least;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) least = shared.scores[w] > least ? shared.scores[w] : least;
  __syncthreads();
  // The order of rounding in a bound differs from that of the masses it bounds.
  if (position.is_mixture) least *= 1.0 - 1e-12;
  double best = nothing;
  int64_t holder = problem.ensemble.vocab_size;
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) {
    if (bounds_of(problem, position, place, s).high < least) continue;
    for (int i = lane_id(); i < kSubTile; i += kLanes) {
      const int64_t token = begin_of(s) + i;
      if (token >= problem.ensemble.vocab_size) break;
      const double score = score_of(position, token_value(position, token));
      if (score > nothing && beats(score, token, best, holder)) {
        best = score;
        holder = token;
      }
    }
  }
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    const double score = __shfl_xor_sync(kAllLanes, best, bits);
    const int64_t token = __shfl_xor_sync(kAllLanes, holder, bits);
    if (beats(score, token, best, holder)) {
      best = score;
      holder = token;
    }
  }
  if (lane_id() == 0) {
    shared.scores[warp_id()] = best;
    shared.tokens[warp_id()] = holder;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    if (beats(shared.scores[w], shared.tokens[w], best, holder)) {
      best = shared.scores[w];
      holder = shared.tokens[w];
    }
  }
  return holder < problem.ensemble.vocab_size ? holder : 0;
}

template <Space kSpace>
__device__ void finish_position(const Problem& problem, StatsShared& shared, int64_t place) {
  combine_all(problem, shared.position, place);
  __syncthreads();
  if constexpr (kSpace == Space::kLogits) {
    if (problem.folds_warped() && !problem.cut) repair(problem, shared, place);
  }
  if (!shared.position.greedy && !problem.collapsed) return;
  if (warp_id() == 0) read_laws(problem, place, shared.position, false);
  __syncthreads();
  const int64_t token = argmax(problem, shared, place);
  if (threadIdx.x == 0) store(problem.best + place, token);
}

// Two kernels, for mixtures and for products, because a product takes more registers.
template <Space kSpace>
__global__ void __launch_bounds__(kThreads, kSpace == Space::kProbabilities ? 2 : 1)
    row_stats(Problem problem) {
  SPECENS_SHARED(StatsShared, shared);
  release_next();
  const int64_t place = blockIdx.y;
  if (warp_id() == 0) read_position(problem, place, shared.position, problem.cut);
  __syncthreads();
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  const int source = static_cast<int>(blockIdx.z);
  if (sub_tile < problem.sub_tiles) {
    if (source == problem.proposal_slot()) {
      if (!shared.position.proposal.late) {
        sweep_logits(problem, shared.position, place, kSeparateDraft, sub_tile);
      }
    } else if constexpr (kSpace == Space::kProbabilities) {
      if (!shared.position.members[source].late) {
        sweep_logits(problem, shared.position, place, source, sub_tile);
      }
    } else {
      sweep_product(problem, shared.position, place, sub_tile, true);
    }
  }
  if (last_block(problem.tickets + place, gridDim.x * gridDim.z, &shared.is_last)) {
    finish_position<kSpace>(problem, shared, place);
  }
}

// The law of a mixture that is warped as a whole, from the members' laws.
__global__ void __launch_bounds__(kThreads, 1) warped_stats(Problem problem) {
  SPECENS_SHARED(StatsShared, shared);
  release_next();
  const int64_t place = blockIdx.y;
  Position& position = shared.position;
  if (warp_id() == 0) {
    read_position(problem, place, position, problem.cut);
    const bool warped = position.warped;
    __syncwarp();
    read_laws(problem, place, position, false);
    if (lane_id() == 0) position.warped = warped;
  }
  __syncthreads();
  if (!position.warped) return;
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (sub_tile < problem.sub_tiles) {
    LaneStats<double> stats;
#pragma unroll 1
    for (int round = 0; round < kRounds; ++round) {
      double values[kPerLane];
      const int64_t begin = begin_of(sub_tile) + round * kRound;
      lane_values(position, begin, problem.ensemble.vocab_size, values);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = log(values[i]);
      stats.add(values, position.target, 0);
    }
    keep_partial(problem, place, problem.warped_slot(), sub_tile, stats.finish(position.target));
  }
  if (last_block(problem.tickets + place, gridDim.x, &shared.is_last) && warp_id() == 0) {
    const int slot = problem.warped_slot();
    const Total total = combine(problem, place, slot, position.target.inverse_temperature);
    if (lane_id() == 0) store(problem.totals + place * problem.slots + slot, total);
  }
}

}  // namespace

void launch_stats(const Problem& problem, cudaStream_t stream) {
  const auto places = static_cast<unsigned>(problem.batch * problem.rows);
  if (places == 0) return;
  const unsigned sources = static_cast<unsigned>(problem.proposal_slot()) +
                           (problem.draft_logits.data != nullptr ? 1u : 0u);
  const dim3 grid(tiles_of(problem), places, sources), sweep(tiles_of(problem), places);
  const dim3 threads(kThreads);
  if (problem.cut) launch_thresholds(problem, Thresholds::kBefore, stream);
  if (!problem.is_mixture()) {
    SPECENS_LAUNCH(row_stats<Space::kLogits>, grid, threads, sizeof(StatsShared), stream, problem);
    return;
  }
  SPECENS_LAUNCH(row_stats<Space::kProbabilities>, grid, threads, sizeof(StatsShared), stream,
                 problem);
  if (problem.ensemble.warp_members) return;
  if (problem.cut) launch_thresholds(problem, Thresholds::kOfMixture, stream);
  SPECENS_LAUNCH(warped_stats, sweep, threads, sizeof(StatsShared), stream, problem);
}

}  // namespace specens
