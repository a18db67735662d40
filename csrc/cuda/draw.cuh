// SPDX-License-Identifier: Apache-2.0
// The walk to a token: a tile, a sub-tile, both by the masses of the sub-tiles, and a token by the
// masses of one sub-tile, which is read again. One block walks.
#pragma once

#include "stats.cuh"

namespace specens {

struct DrawScratch {
  double masses[kMaxSubTiles];  // of each sub-tile
  double tokens[kSubTile];
  double totals[kWarps];
  int sub_tile;
  int token;
};

// The first index whose cumulative mass exceeds number x total, the last with mass if none does;
// one warp, mass(i) for i below count.
template <typename Mass>
__device__ int pick(int count, double number, const Mass& mass) {
  const int share = (count + kLanes - 1) / kLanes;
  const int begin = lane_id() * share;
  const int end = begin + share < count ? begin + share : count;
  double own = 0.0;
  int last = -1;
  for (int i = begin; i < end; ++i) {
    const double here = mass(i);
    own += here;
    if (here > 0.0) last = i;
  }
  double cumulative = own;
#pragma unroll
  for (int by = 1; by < kLanes; by *= 2) {
    const double before = __shfl_up_sync(kAllLanes, cumulative, static_cast<unsigned>(by));
    if (lane_id() >= by) cumulative += before;
  }
  const double threshold = number * __shfl_sync(kAllLanes, cumulative, kLanes - 1);
  double sum = cumulative - own;
  int found = count;
  for (int i = begin; i < end && found == count; ++i) {
    sum += mass(i);
    if (sum > threshold) found = i;
  }
  const int first = -warp_max(-found), most = warp_max(last);
  const int index = first < most ? first : most;
  return index > 0 ? index : 0;
}

// The mass of a sub-tile in the target's law, from its partials.
__device__ inline double sub_tile_mass(const Problem& problem, const Position& position,
                                       int64_t place, int sub_tile) {
  const auto of = [&](const Field& field, int slot) {
    const Partial here = load_fresh(problem.partials +
                                    (place * problem.slots + slot) * problem.sub_tiles + sub_tile);
    if (here.sum == 0.0f) return 0.0;
    const double exponent = shifted(here.top, field.top, field.inverse_temperature);
    return static_cast<double>(here.sum) * exp(exponent - field.log_sum);
  };
  if (position.empty) return 0.0;
  if (!position.is_mixture) return of(position.target, 0);
  if (position.warped) return of(position.target, problem.warped_slot());
  double mass = 0.0;
  for (int k = 0; k < position.count; ++k) {
    if (position.members[k].share != 0.0)
      mass += position.members[k].share * of(position.members[k], k);
  }
  return mass;
}

__device__ inline void read_masses(const Problem& problem, const Position& position, int64_t place,
                                   DrawScratch& scratch) {
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    scratch.masses[s] = sub_tile_mass(problem, position, place, s);
  }
  __syncthreads();
}

// The sum of the masses of the sub-tiles, the same in every thread.
__device__ inline double total_mass(const Problem& problem, DrawScratch& scratch) {
  double total = 0.0;
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    total += scratch.masses[s];
  }
  total = warp_sum(total);
  if (lane_id() == 0) scratch.totals[warp_id()] = total;
  __syncthreads();
  total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += scratch.totals[w];
  __syncthreads();
  return total;
}

// Writes mass(token) of every token of a sub-tile; the whole block.
template <typename Mass>
__device__ void fill(const Problem& problem, int sub_tile, DrawScratch& scratch, const Mass& mass) {
  const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile;
  for (int i = static_cast<int>(threadIdx.x); i < kSubTile; i += kThreads) {
    const bool inside = begin + i < problem.ensemble.vocab_size;
    scratch.tokens[i] = inside ? mass(begin + i) : 0.0;
  }
  __syncthreads();
}

// The token that the numbers draw, by the masses of the sub-tiles and mass(token); the whole block.
template <typename Mass>
__device__ int64_t draw(const Problem& problem, const Values<float>& numbers, int64_t b, int64_t t,
                        DrawScratch& scratch, const Mass& mass) {
  const int sub_tiles = problem.sub_tiles;
  const int tiles = (sub_tiles + kSubTilesPerTile - 1) / kSubTilesPerTile;
  if (warp_id() == 0) {
    const int tile = pick(tiles, static_cast<double>(numbers.at(b, t, 1)), [&](int i) {
      double sum = 0.0;
      for (int j = 0; j < kSubTilesPerTile; ++j) {
        const int s = i * kSubTilesPerTile + j;
        if (s < sub_tiles) sum += scratch.masses[s];
      }
      return sum;
    });
    const int first = tile * kSubTilesPerTile;
    const int left = sub_tiles - first;
    const int count = left < kSubTilesPerTile ? left : kSubTilesPerTile;
    const int chosen = pick(count, static_cast<double>(numbers.at(b, t, 2)),
                            [&](int i) { return scratch.masses[first + i]; });
    if (lane_id() == 0) scratch.sub_tile = first + chosen;
  }
  __syncthreads();
  fill(problem, scratch.sub_tile, scratch, mass);
  if (warp_id() == 0) {
    const int token = pick(kSubTile, static_cast<double>(numbers.at(b, t, 3)),
                           [&](int i) { return scratch.tokens[i]; });
    if (lane_id() == 0) scratch.token = token;
  }
  __syncthreads();
  return static_cast<int64_t>(scratch.sub_tile) * kSubTile + scratch.token;
}

// A token of the target's law; 0 from an empty one.
__device__ inline int64_t draw_target(const Problem& problem, const Position& position,
                                      const Values<float>& numbers, int64_t place,
                                      DrawScratch& scratch) {
  if (position.empty) return 0;
  read_masses(problem, position, place, scratch);
  return draw(problem, numbers, place / problem.rows, place % problem.rows, scratch,
              [&](int64_t token) { return value_mass(position, token_value(position, token)); });
}

}  // namespace specens
