// SPDX-License-Identifier: Apache-2.0
// `compact`: rows of an accepted path, moved down in place; a warp for each layer, head and row of
// the batch. A path ascends from 1: what is moved to the i-th slot after the root comes from there
// or beyond, and what a later move reads lies beyond that. So no row is written before it has been
// read, and the rows of several moves may be read before the first of them is written. A lane reads
// and writes the same columns throughout, in program order: no barrier is needed.
#include "compat.cuh"
#include "cuda.h"

namespace specens {
namespace {

constexpr int kMoveWarps = 4;  // of a block
constexpr int kMoveThreads = kMoveWarps * kLanes;
constexpr int kMovesTogether = 4;   // whose reads are under way at once
constexpr int kSlabsTogether = 32;  // what a kernel's parameters hold
constexpr int64_t kMostUnits = 0x7FFFFFFF;

struct Place {
  int64_t page;  // of the batch, or of the pool
  int64_t row;
};

struct Moves {
  Slab slabs[kSlabsTogether];
  int width[kSlabsTogether];  // bytes that rows, strides and address are whole numbers of
  Pages pages;
  int64_t batch;
  int64_t depth;
  int64_t capacity;  // slots of a row
  Values<int64_t> lengths;
  Values<int32_t> path;

  __device__ Place place(int64_t b, int64_t slot) const {
    if (pages.table.data == nullptr) return {b, slot};
    return {load(pages.table.data + b * pages.table.batch_stride +
                 slot / pages.size * pages.table.row_stride),
            slot % pages.size};
  }
};

// One layer's rows of one head and one row of the batch, in words of a type.
template <typename Word>
__device__ void move_rows(const Moves& moves, const Slab& slab, char* base, int64_t b) {
  const int64_t root = load(moves.lengths.data + b * moves.lengths.batch_stride);
  const auto words = static_cast<int64_t>(slab.row_bytes / sizeof(Word));
  const auto row = [&](int64_t slot) {
    const Place at = moves.place(b, slot);
    return reinterpret_cast<Word*>(base + at.page * slab.batch_stride + at.row * slab.row_stride);
  };
  for (int64_t first = 0; first < moves.depth; first += kMovesTogether) {
    Word *to[kMovesTogether] = {}, *from[kMovesTogether] = {};
    int count = 0;
#pragma unroll
    for (int i = 0; i < kMovesTogether; ++i) {
      if (count < i || first + i >= moves.depth) continue;
      const int64_t node =
          load(moves.path.data + b * moves.path.batch_stride + (first + i) * moves.path.row_stride);
      const int64_t target = root + first + i + 1, source = root + node;
      const bool inside = root >= 0 && target < moves.capacity && source < moves.capacity;
      if (node < 0 || !inside) continue;
      to[i] = row(target);
      from[i] = row(source);
      count = i + 1;
    }
    for (int64_t word = lane_id(); word < words; word += kLanes) {
      Word values[kMovesTogether] = {};
#pragma unroll
      for (int i = 0; i < kMovesTogether; ++i) {
        if (i < count) values[i] = load_fresh(from[i] + word);
      }
#pragma unroll
      for (int i = 0; i < kMovesTogether; ++i) {
        if (i < count) store(to[i] + word, values[i]);
      }
    }
    if (count < kMovesTogether) return;
  }
}

// Grid: layers, heads and rows of the batch, four to a block; slabs.
__global__ void __launch_bounds__(kMoveThreads) move_path(Moves moves) {
  const Slab& slab = moves.slabs[blockIdx.y];
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kMoveWarps + warp_id();
  if (unit >= slab.layers * slab.heads * moves.batch) return;
  const int64_t b = unit / (slab.layers * slab.heads);
  const int64_t layer = unit / slab.heads % slab.layers, head = unit % slab.heads;
  char* base = slab.data + layer * slab.layer_stride + head * slab.head_stride;
  switch (moves.width[blockIdx.y]) {
    case 16:
      return move_rows<Bits>(moves, slab, base, b);
    case 4:
      return move_rows<uint32_t>(moves, slab, base, b);
    case 2:
      return move_rows<uint16_t>(moves, slab, base, b);
    default:
      return move_rows<uint8_t>(moves, slab, base, b);
  }
}

int width_of(const Slab& slab) {
  const auto bits = static_cast<uint64_t>(slab.row_bytes | slab.layer_stride | slab.batch_stride |
                                          slab.head_stride | slab.row_stride) |
                    reinterpret_cast<uintptr_t>(slab.data);
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : bits % 2 == 0 ? 2 : 1;
}

}  // namespace

int cuda_compact(const CompactParams& params, int64_t capacity, cudaStream_t stream) {
  Moves moves = {};
  moves.pages = params.pages;
  moves.batch = params.batch;
  moves.depth = params.depth;
  moves.capacity = capacity;
  moves.lengths = params.lengths;
  moves.path = params.path;
  const size_t slabs = params.slabs.size();
  for (size_t first = 0; first < slabs && params.depth > 0; first += kSlabsTogether) {
    const size_t count = slabs - first < kSlabsTogether ? slabs - first : kSlabsTogether;
    int64_t units = 0;
    for (size_t i = 0; i < count; ++i) {
      const Slab& slab = moves.slabs[i] = params.slabs[first + i];
      moves.width[i] = width_of(slab);
      const int64_t own = slab.row_bytes == 0 ? 0 : slab.layers * slab.heads * params.batch;
      units = own > units ? own : units;
    }
    if (units > kMostUnits) return kTooManyRows;
    if (units == 0) continue;
    const dim3 grid(static_cast<unsigned>((units + kMoveWarps - 1) / kMoveWarps),
                    static_cast<unsigned>(count));
    SPECENS_LAUNCH(move_path, grid, dim3(kMoveThreads), 0, stream, moves);
  }
  return launch_error();
}

}  // namespace specens
