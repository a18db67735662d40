// SPDX-License-Identifier: Apache-2.0
// `attend_halves`: a split of a cache in bfloat16 or float16 against packed query rows, by
// mma.m16n8k16. A warp has 16 rows; where rows are few, several warps have the same and each its
// part of a tile's slots. Scores become masses in the registers that they were summed in, rounded
// to halves for the product with the values; their sum is of unrounded ones.
#pragma once

#include "attention.cuh"

namespace specens {

constexpr int kWarpRows = 16;

// What a warp knows of its rows: of a lane, two rows, lane / 4 and 8 more; of 8 columns, two.
template <int kSize>
struct RowStates {
  float top[2] = {kNoMass, kNoMass};
  float total[2] = {};  // of this lane's columns
  float out[kSize / 8][4] = {};
};

// Four fragments of 16 rows and of 16 columns, the `step`-th of them; the lane gives the address of
// `row` and of one of their two chunks. Rows begin at one of eight, so that other columns lie where
// bits of the address differ.
template <int kSize, bool kTransposed>
__device__ __forceinline__ void load_square(uint32_t (&words)[4], const uint16_t* rows, int row,
                                            int chunk, int step) {
  const int place = place_in_tile<uint16_t, kSize>(row, chunk);
  load_matrices<kTransposed>(words, rows + (place ^ step * 16));
}

template <int kSize>
__device__ __forceinline__ void load_query(uint32_t (&a)[4], const uint16_t* rows, int step) {
  load_square<kSize, false>(a, rows, lane_id() % 16, lane_id() / 16, step);
}

// Scores (16, kOwn) of the slots from `keys` on.
template <typename Half, int kSize, int kOwn, int kSteps>
__device__ __forceinline__ void multiply_keys(const uint16_t* query,
                                              const uint32_t (&kept)[kSteps][4],
                                              const uint16_t* keys, int slot,
                                              float (&scores)[kOwn / 8][4]) {
#pragma unroll(kSteps > 1 ? kSteps : 4)
  for (int step = 0; step < kSize / 16; ++step) {
    uint32_t a[4];
    if constexpr (kSteps > 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = kept[step][i];
    } else {
      load_query<kSize>(a, query, step);
    }
#pragma unroll
    for (int j = 0; j < kOwn / 16; ++j) {
      uint32_t b[4];
      load_square<kSize, false>(b, keys + (slot + j * 16) * kSize,
                                lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2, step);
      Half::multiply_add(scores[2 * j], a, {b[0], b[1]});
      Half::multiply_add(scores[2 * j + 1], a, {b[2], b[3]});
    }
  }
}

// Adds the values, weighed by masses.
template <typename Half, int kSize, int kOwn>
__device__ __forceinline__ void add_values(const float (&masses)[kOwn / 8][4],
                                           const uint16_t* values, int slot,
                                           float (&out)[kSize / 8][4]) {
#pragma unroll
  for (int j = 0; j < kOwn / 16; ++j) {
    const float (&low)[4] = masses[2 * j];
    const float (&high)[4] = masses[2 * j + 1];
    const uint32_t a[4] = {Half::pack(low[0], low[1]), Half::pack(low[2], low[3]),
                           Half::pack(high[0], high[1]), Half::pack(high[2], high[3])};
#pragma unroll
    for (int n = 0; n < kSize / 16; ++n) {
      uint32_t b[4];
      load_square<kSize, true>(b, values + (slot + j * 16) * kSize, lane_id() % 16, lane_id() / 16,
                               n);
      Half::multiply_add(out[2 * n], a, {b[0], b[1]});
      Half::multiply_add(out[2 * n + 1], a, {b[2], b[3]});
    }
  }
}

// Scores become masses; what was known is scaled to the new top.
template <int kSize, int kOwn>
__device__ __forceinline__ void weigh(RowStates<kSize>& state, float (&scores)[kOwn / 8][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float peak = state.top[h];
#pragma unroll
    for (int n = 0; n < kOwn / 8; ++n) {
      peak = fmaxf(peak, fmaxf(scores[n][2 * h], scores[n][2 * h + 1]));
    }
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
    // Of a row that has seen nothing yet.
    const float base = peak == kNoMass ? 0.0f : peak;
    const float decay = exp2_flushed(state.top[h] - base);
    state.top[h] = peak;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kOwn / 8; ++n) {
#pragma unroll
      for (int c = 2 * h; c < 2 * h + 2; ++c) {
        scores[n][c] = exp2_flushed(scores[n][c] - base);
        sum += scores[n][c];
      }
    }
    state.total[h] = state.total[h] * decay + sum;
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      state.out[n][2 * h] *= decay;
      state.out[n][2 * h + 1] *= decay;
    }
  }
}

// Hides what a row does not see, and spoils a row that sees a value which is no finite number. A
// warp's slots begin at `slot`.
template <int kSize, int kOwn>
__device__ __forceinline__ void hide(const uint64_t* rows, int slot, uint64_t broken,
                                     RowStates<kSize>& state, float (&scores)[kOwn / 8][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint64_t seen = rows[lane_id() / 4 + 8 * h];
    // All warps of a row come to the same.
    if ((seen & broken) != 0) {
#pragma unroll
      for (int n = 0; n < kSize / 8; ++n) {
        state.out[n][2 * h] = state.out[n][2 * h + 1] = -(kNoMass + -kNoMass);
      }
    }
    seen >>= slot + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kOwn / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if ((seen >> (8 * n + c) & 1) == 0) scores[n][2 * h + c] = kNoMass;
      }
    }
  }
}

template <int kSize>
__device__ __forceinline__ void keep_rows(const RowStates<kSize>& state,
                                          const Scratch<kSize>& scratch, int place) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float total = state.total[h];
    total += __shfl_xor_sync(kAllLanes, total, 1);
    total += __shfl_xor_sync(kAllLanes, total, 2);
    const int row = place + lane_id() / 4 + 8 * h;
    if (lane_id() % 4 == 0) {
      scratch.tops[row] = state.top[h];
      scratch.totals[row] = total;
    }
#pragma unroll
    for (int n = 0; n < kSize / 8; ++n) {
      float* out = scratch.outs + row * Scratch<kSize>::kStride + n * 8 + lane_id() % 4 * 2;
      out[0] = state.out[n][2 * h];
      out[1] = state.out[n][2 * h + 1];
    }
  }
}

template <int kSize>
constexpr int kHalfSlots = kSize <= 128 ? 64 : 32;  // of a tile

template <typename Half, int kSize, int kRowWarps, int kSlotWarps>
__global__ void __launch_bounds__(kRowWarps * kSlotWarps * kLanes,
                                  kRowWarps <= 4 && kSize <= 128 ? 3 : 1)
    attend_halves(AttentionProblem problem) {
  constexpr int kSlots = kHalfSlots<kSize>, kOwn = kSlots / kSlotWarps;
  // Many scores, or large heads, leave no registers for the query.
  constexpr int kSteps = kSize / kSlotWarps <= 32 ? kSize / 16 : 1;
  SPECENS_SHARED(unsigned char, shared);
  constexpr int kRows = kRowWarps * kWarpRows;
  const Share share = share_of(problem, kRows, kSlots);
  if (share.count == 0) return;
  const Tiles<uint16_t, kSize, kSlots> tiles(&shared, kRows, problem.stages);
  tiles.begin(problem, share, kRows);

  const int own_row = warp_id() % kRowWarps * kWarpRows;
  const int own_slot = warp_id() / kRowWarps * kOwn;
  const bool idle = share.tile_row + own_row >= problem.rows;
  const uint16_t* query = tiles.query + own_row * kSize;
  uint32_t kept[kSteps][4];
  RowStates<kSize> state;
#pragma unroll 1
  for (int tile = 0; tile < share.count; ++tile) {
    const int stage = tiles.next(problem, share, tile);
    const bool masked = hides<kSlots>(share, tile);
    if (masked) tiles.look(problem, share, kRows, tile, stage, Half::kExponent);
    if (idle) continue;
    if (kSteps > 1 && tile == 0) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query<kSize>(kept[step], query, step);
    }
    float scores[kOwn / 8][4] = {};
    multiply_keys<Half, kSize, kOwn, kSteps>(query, kept, tiles.keys(stage), own_slot, scores);
    score(problem, scores);
    if (masked) {
      hide<kSize, kOwn>(tiles.seen + own_row, own_slot, tiles.broken_slots(), state, scores);
    }
    weigh<kSize, kOwn>(state, scores);
    add_values<Half, kSize, kOwn>(scores, tiles.values(stage), own_slot, state.out);
  }
  release_next();
  __syncthreads();
  const Scratch<kSize> scratch(&shared, kRows, kSlotWarps);
  if (!idle) keep_rows<kSize>(state, scratch, warp_id() / kRowWarps * kRows + own_row);
  write_part<kSize, kSlotWarps>(problem, share, scratch, kRows);
}

template <typename Half, int kSize, int kRowWarps, int kSlotWarps>
void launch_halves(AttentionProblem problem, cudaStream_t stream) {
  constexpr int kSlots = kHalfSlots<kSize>;
  constexpr int kRows = kRowWarps * kWarpRows;
  const size_t shared = shared_bytes<kSize, kSlots>(problem, kRows, kSlotWarps, sizeof(uint16_t));
  SPECENS_ALLOW_SHARED((attend_halves<Half, kSize, kRowWarps, kSlotWarps>), shared);
  SPECENS_LAUNCH((attend_halves<Half, kSize, kRowWarps, kSlotWarps>), grid_of(problem, kRows),
                 dim3(static_cast<unsigned>(kRowWarps * kSlotWarps * kLanes)), shared, stream,
                 problem);
}

template <typename Half, int kSize>
void launch_rows(const AttentionProblem& problem, cudaStream_t stream) {
  if (problem.rows <= 16) return launch_halves<Half, kSize, 1, 4>(problem, stream);
  if (problem.rows <= 32) return launch_halves<Half, kSize, 2, 2>(problem, stream);
  if (problem.rows <= 64) return launch_halves<Half, kSize, 4, 1>(problem, stream);
  launch_halves<Half, kSize, 8, 1>(problem, stream);
}

template <typename Half>
void launch_sizes(const AttentionProblem& problem, cudaStream_t stream) {
  const int64_t size = largest_size(problem);
  if (size <= 64) return launch_rows<Half, 64>(problem, stream);
  if (size <= 128) return launch_rows<Half, 128>(problem, stream);
  launch_halves<Half, kLargestHead, 2, 2>(problem, stream);
}

}  // namespace specens
