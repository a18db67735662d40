// SPDX-License-Identifier: Apache-2.0
// `attention` to float32, by fused multiply-adds: a product of tf32 would not be exact. A warp has
// 8 rows. Its lanes share out slots for scores, and columns for what is summed of values; between
// the two, masses go through shared memory. Where rows are few, the warps have the same and each
// its part of a tile's slots.
#include "attention.cuh"

namespace specens {
namespace {

constexpr int kFloatWarps = 4;
constexpr int kFloatThreads = kFloatWarps * kLanes;
constexpr int kFloatRows = 8;  // of a warp

// How the lanes of a warp share out rows and the slots of a tile.
template <int kSize, int kSlotWarps>
struct Shares {
  static constexpr int kSlots = 4096 / kSize;  // of a tile of 16 KiB
  static constexpr int kOwn = kSlots / kSlotWarps;
  static constexpr int kSlotLanes = kOwn < kLanes ? kOwn : kLanes;
  static constexpr int kPerLane = kOwn / kSlotLanes;
  static constexpr int kRows = kFloatRows * kSlotLanes / kLanes;
  static constexpr int kColumns = kSize / kLanes;
};

template <int kOwn>
struct Masses {
  float mass[kFloatRows][kOwn];
  float decay[kFloatRows];  // of what was known
};

__device__ __forceinline__ Quad quad_at(const float* from) {
  return *reinterpret_cast<const Quad*>(from);
}

// Products of a lane's rows with its slots' keys.
template <int kSize, int kRows, int kPerLane, int kSlotLanes>
__device__ __forceinline__ void multiply_keys(const float* query, const float* keys, int row,
                                              int slot, float (&scores)[kRows][kPerLane]) {
#pragma unroll 1
  for (int chunk = 0; chunk < kSize / 4; ++chunk) {
    Quad key[kPerLane];
#pragma unroll
    for (int s = 0; s < kPerLane; ++s) {
      key[s] = quad_at(keys + place_in_tile<float, kSize>(slot + s * kSlotLanes, chunk));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const Quad q = quad_at(query + place_in_tile<float, kSize>(row + r, chunk));
#pragma unroll
      for (int s = 0; s < kPerLane; ++s) {
#pragma unroll
        for (int c = 0; c < 4; ++c) scores[r][s] += q.value[c] * key[s].value[c];
      }
    }
  }
}

// Columns of a lane in a row of a tile: two, or fours that are 128 apart.
template <int kSize>
__device__ __forceinline__ void load_columns(const float* values, int row,
                                             float (&columns)[kSize / kLanes]) {
  if constexpr (kSize == 64) {
    const float* at = values + place_in_tile<float, kSize>(row, lane_id() / 2) + lane_id() % 2 * 2;
    columns[0] = at[0];
    columns[1] = at[1];
  } else {
#pragma unroll
    for (int i = 0; i < kSize / 128; ++i) {
      const Quad quad = quad_at(values + place_in_tile<float, kSize>(row, i * kLanes + lane_id()));
#pragma unroll
      for (int c = 0; c < 4; ++c) columns[4 * i + c] = quad.value[c];
    }
  }
}

template <int kSize>
__device__ __forceinline__ int column_of(int i) {
  return kSize == 64 ? lane_id() * 2 + i : i / 4 * 128 + lane_id() * 4 + i % 4;
}

// Adds the values of a warp's slots, weighed by their masses.
template <int kSize, int kOwn>
__device__ __forceinline__ void add_values(const Masses<kOwn>& masses, const float* values,
                                           int slot, float (&out)[kFloatRows][kSize / kLanes]) {
  constexpr int kColumns = kSize / kLanes;
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) {
    const float decay = masses.decay[r];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) out[r][c] *= decay;
  }
#pragma unroll 1
  for (int first = 0; first < kOwn; first += 4) {
    float columns[4][kColumns];
#pragma unroll
    for (int s = 0; s < 4; ++s) load_columns<kSize>(values, slot + first + s, columns[s]);
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) {
      const Quad mass = quad_at(&masses.mass[r][first]);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) out[r][c] += mass.value[s] * columns[s][c];
      }
    }
  }
}

template <int kSize, int kSlotWarps>
__global__ void __launch_bounds__(kFloatThreads, 3) attend_floats(AttentionProblem problem) {
  using Own = Shares<kSize, kSlotWarps>;
  constexpr int kOwn = Own::kOwn, kRows = Own::kRows, kSlotLanes = Own::kSlotLanes;
  constexpr int kRowWarps = kFloatWarps / kSlotWarps, kTileRows = kRowWarps * kFloatRows;
  SPECENS_SHARED(unsigned char, shared);
  const Share share = share_of(problem, kTileRows, Own::kSlots);
  if (share.count == 0) return;
  const Tiles<float, kSize, Own::kSlots> tiles(&shared, kTileRows, problem.stages);
  tiles.begin(problem, share, kTileRows);

  auto& masses = reinterpret_cast<Masses<kOwn>*>(tiles.broken + 4)[warp_id()];
  const int warp_row = warp_id() % kRowWarps * kFloatRows;
  const int warp_slot = warp_id() / kRowWarps * kOwn;
  const int lane_row = lane_id() / kSlotLanes * kRows, lane_slot = lane_id() % kSlotLanes;
  const bool idle = share.tile_row + warp_row >= problem.rows;
  float top[kRows], total[kRows] = {}, out[kFloatRows][Own::kColumns] = {};
#pragma unroll
  for (float& each : top) each = kNoMass;
#pragma unroll 1
  for (int tile = 0; tile < share.count; ++tile) {
    const int stage = tiles.next(problem, share, tile);
    const bool masked = hides<Own::kSlots>(share, tile);
    if (masked) tiles.look(problem, share, kTileRows, tile, stage, 0x7F800000);
    if (idle) continue;
    float scores[kRows][Own::kPerLane] = {};
    multiply_keys<kSize, kRows, Own::kPerLane, kSlotLanes>(
        tiles.query, tiles.keys(stage), warp_row + lane_row, warp_slot + lane_slot, scores);
    score(problem, scores);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      bool spoiled = false;
      if (masked) {
        uint64_t seen = tiles.seen[warp_row + lane_row + r];
        spoiled = (seen & tiles.broken_slots()) != 0;
        seen >>= warp_slot + lane_slot;
#pragma unroll
        for (int s = 0; s < Own::kPerLane; ++s) {
          if ((seen >> (s * kSlotLanes) & 1) == 0) scores[r][s] = kNoMass;
        }
      }
      float peak = top[r];
#pragma unroll
      for (int s = 0; s < Own::kPerLane; ++s) peak = fmaxf(peak, scores[r][s]);
#pragma unroll
      for (int bits = kSlotLanes / 2; bits > 0; bits /= 2) {
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, bits));
      }
      // Of a row that has seen nothing yet.
      const float base = peak == kNoMass ? 0.0f : peak;
      const float decay = exp2_flushed(top[r] - base);
      top[r] = peak;
      total[r] *= decay;
#pragma unroll
      for (int s = 0; s < Own::kPerLane; ++s) {
        const float mass = exp2_flushed(scores[r][s] - base);
        total[r] += mass;
        masses.mass[lane_row + r][lane_slot + s * kSlotLanes] = mass;
      }
      // What is no finite number in a slot that is seen spoils the row.
      if (lane_slot == 0) {
        masses.decay[lane_row + r] = spoiled ? __uint_as_float(0x7FFFFFFF) : decay;
      }
    }
    __syncwarp();
    add_values<kSize, kOwn>(masses, tiles.values(stage), warp_slot, out);
  }
  release_next();
  __syncthreads();
  const Scratch<kSize> scratch(&shared, kTileRows, kSlotWarps);
  const int place = warp_id() / kRowWarps * kTileRows + warp_row;
  if (!idle) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int bits = kSlotLanes / 2; bits > 0; bits /= 2) {
        total[r] += __shfl_xor_sync(kAllLanes, total[r], bits);
      }
      if (lane_slot != 0) continue;
      scratch.tops[place + lane_row + r] = top[r];
      scratch.totals[place + lane_row + r] = total[r];
    }
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) {
#pragma unroll
      for (int c = 0; c < Own::kColumns; ++c) {
        scratch.outs[(place + r) * Scratch<kSize>::kStride + column_of<kSize>(c)] = out[r][c];
      }
    }
  }
  write_part<kSize, kSlotWarps>(problem, share, scratch, kTileRows);
}

template <int kSize, int kSlotWarps>
void launch_floats(AttentionProblem problem, cudaStream_t stream) {
  using Own = Shares<kSize, kSlotWarps>;
  constexpr int kTileRows = kFloatWarps / kSlotWarps * kFloatRows;
  const size_t shared = shared_bytes<kSize, Own::kSlots>(
      problem, kTileRows, kSlotWarps, sizeof(float), kFloatWarps * sizeof(Masses<Own::kOwn>));
  SPECENS_ALLOW_SHARED((attend_floats<kSize, kSlotWarps>), shared);
  SPECENS_LAUNCH((attend_floats<kSize, kSlotWarps>), grid_of(problem, kTileRows),
                 dim3(kFloatThreads), shared, stream, problem);
}

template <int kSize>
void launch_rows(const AttentionProblem& problem, cudaStream_t stream) {
  if (problem.rows <= kFloatRows) return launch_floats<kSize, kFloatWarps>(problem, stream);
  launch_floats<kSize, 1>(problem, stream);
}

}  // namespace

void launch_float32(const AttentionProblem& problem, cudaStream_t stream) {
  const int64_t size = largest_size(problem);
  if (size <= 64) return launch_rows<64>(problem, stream);
  if (size <= 128) return launch_rows<128>(problem, stream);
  launch_rows<kLargestHead>(problem, stream);
}

}  // namespace specens
