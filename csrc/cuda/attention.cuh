// SPDX-License-Identifier: Apache-2.0
// What the kernels of `attention` share: the problem, which slots a node sees, tiles of keys and
// values in shared memory, and the partial result of a split. A block attends to one split of one
// key head with a tile of packed query rows; attention.cu joins the splits in their order. Lengths
// are read on the device alone, and a split's borders and arithmetic depend on the tree's shape:
// neither batch, capacity nor pages show in a bit. Scores are in units of log 2.
// To add a kernel: a file that calls these, and its launch in attention.cu.
#pragma once

#include "cuda.h"
#include "matrix.cuh"

namespace specens {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kLargestHead = 256;

// The op's arguments, how they are divided, and where the workspace's parts lie.
struct AttentionProblem {
  AttentionParams params;
  int capacity;    // slots of a row of the batch
  int group;       // query heads of a key head
  int rows;        // packed: a group's heads times nodes
  int split;       // slots of one
  int splits;      // that may be needed
  int stages;      // tiles in shared memory
  int page_shift;  // log 2 of a page's slots, or -1 if they are no power of two
  bool aligned;    // rows are whole numbers of 16 bytes, at multiples of 16
  float scale;     // of a product
  float cap;       // of its tanh, then; 0: there is none
  int columns;     // of a partial result, a multiple of 4
  float* tops;     // (B * K, splits, rows)
  float* totals;
  float* outs;  // (B * K, splits, rows, columns)
};

// What a row of the batch is read from.
struct Reach {
  int length;       // of the prefix
  int end;          // of the nodes
  int first;        // slot that a node of depth 0 sees first
  int first_split;  // which that slot lies in
};

__device__ __forceinline__ int64_t at_most(int64_t value, int64_t most) {
  return value < most ? value : most;
}
__device__ __forceinline__ int64_t at_least(int64_t value, int64_t least) {
  return value > least ? value : least;
}

__device__ __forceinline__ Reach reach_of(const AttentionProblem& problem, int64_t b) {
  const AttentionParams& params = problem.params;
  const int64_t given = load(params.lengths.data + b * params.lengths.batch_stride);
  const int64_t length = at_least(at_most(given, problem.capacity), 0);
  const int64_t first = params.window > 0 ? at_least(length - params.window + 1, 0) : 0;
  return {static_cast<int>(length),
          static_cast<int>(at_most(length + params.nodes, problem.capacity)),
          static_cast<int>(first), static_cast<int>(first) / problem.split};
}

// The part of the work that a block has.
struct Share {
  int batch;
  int key_head;
  int tile_row;  // the first of its packed rows
  Reach reach;
  int begin;  // its first slot
  int count;  // of tiles; 0: nothing is left to do
  int full;   // slot from which on every node of its rows sees the prefix
};

__device__ __forceinline__ int node_of(const AttentionProblem& problem, int row) {
  return row % static_cast<int>(problem.params.nodes);
}

__device__ __forceinline__ int depth_of(const AttentionProblem& problem, int64_t b, int node) {
  const Values<int32_t>& depths = problem.params.depths;
  return load(depths.data + b * depths.batch_stride + node * depths.row_stride);
}

// Grid: tiles of packed rows, splits, key heads of each row of the batch.
__device__ inline Share share_of(const AttentionProblem& problem, int tile_rows, int tile_slots) {
  const AttentionParams& params = problem.params;
  const auto key_heads = static_cast<unsigned>(params.key_heads);
  Share share;
  share.batch = static_cast<int>(blockIdx.z / key_heads);
  share.key_head = static_cast<int>(blockIdx.z % key_heads);
  share.tile_row = static_cast<int>(blockIdx.x) * tile_rows;
  share.reach = reach_of(problem, share.batch);
  const int start = (share.reach.first_split + static_cast<int>(blockIdx.y)) * problem.split;
  const int until = static_cast<int>(at_most(start + problem.split, share.reach.end));
  share.begin = start;
  share.full = 0;
  if (params.window > 0) {
    const int first_tile = share.reach.first / tile_slots * tile_slots;
    share.begin = start > first_tile ? start : first_tile;
    int deepest = 0;
    for (int i = lane_id(); i < tile_rows; i += kLanes) {
      const int row = share.tile_row + i;
      const int depth =
          row < problem.rows ? depth_of(problem, share.batch, node_of(problem, row)) : 0;
      deepest = depth > deepest ? depth : deepest;
    }
#pragma unroll
    for (int bits = kLanes / 2; bits > 0; bits /= 2) {
      const int other = __shfl_xor_sync(kAllLanes, deepest, bits);
      deepest = other > deepest ? other : deepest;
    }
    const int64_t full = share.reach.length - params.window + 1 + deepest;
    share.full = static_cast<int>(at_least(at_most(full, share.reach.end), 0));
  }
  const int slots = until - share.begin;
  share.count = slots > 0 ? (slots + tile_slots - 1) / tile_slots : 0;
  return share;
}

__device__ __forceinline__ uint64_t first_bits(int64_t bits) {
  return bits <= 0 ? uint64_t{0} : bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

// Of the 64 slots from `slot` on, those that a packed row sees.
__device__ inline uint64_t seen_slots(const AttentionProblem& problem, const Share& share, int row,
                                      int slot) {
  const AttentionParams& params = problem.params;
  const Reach& reach = share.reach;
  const int node = row < problem.rows ? node_of(problem, row) : 0;
  const int64_t* words = params.visible.data + share.batch * params.visible.batch_stride +
                         node * params.visible.row_stride;
  const auto word = [&](int index) -> uint64_t {
    if (index * 64 >= params.nodes) return 0;
    return static_cast<uint64_t>(load(words + index * params.visible.member_stride));
  };
  // Place of the slot among the nodes. A shift by 64 is none.
  const int at = slot - reach.length;
  uint64_t bits = 0;
  if (at >= 0) {
    bits = word(at / 64) >> (at % 64);
    if (at % 64 != 0) bits |= word(at / 64 + 1) << (64 - at % 64);
  } else if (at > -64) {
    bits = word(0) << -at;
  }
  uint64_t prefix = first_bits(-at);
  if (params.window > 0) {
    const int64_t depth = depth_of(problem, share.batch, node);
    prefix &= ~first_bits(reach.length + depth - params.window + 1 - slot);
  }
  return (bits | prefix) & first_bits(reach.end - slot);
}

// Where 16 bytes of a tile's row lie, in elements: rows of eight that are read at once meet in no
// bank.
template <typename Element, int kSize>
__device__ __forceinline__ int place_in_tile(int row, int chunk) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  return row * kSize + (chunk ^ (row & 7)) * kPerChunk;
}

// Begins to copy 16 bytes of a row to a tile, or puts zeros there; elements, where rows are not
// aligned. What lies beyond a row's size is not written.
template <typename Element, int kSize>
__device__ __forceinline__ void copy_chunk(Element* tile, int row, int chunk, const Element* from,
                                           int64_t size, bool real, bool aligned) {
  constexpr int kPerChunk = 16 / static_cast<int>(sizeof(Element));
  const int first = chunk * kPerChunk;
  if (first >= size) return;
  Element* to = tile + place_in_tile<Element, kSize>(row, chunk);
  if (aligned) return copy_async(to, from + first, real);
#pragma unroll 1
  for (int e = 0; e < kPerChunk && first + e < size; ++e) {
    to[e] = real ? load(from + first + e) : Element{};
  }
}

// The packed query rows of a block.
template <typename Element, int kSize>
__device__ __forceinline__ void copy_query(const AttentionProblem& problem, const Share& share,
                                           Element* tile, int rows) {
  constexpr int kChunks = kSize * static_cast<int>(sizeof(Element)) / 16;
  const Heads& query = problem.params.query;
  const auto* data = static_cast<const Element*>(query.data) + share.batch * query.batch_stride;
  const auto nodes = static_cast<int>(problem.params.nodes);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kChunks;
       i += static_cast<int>(blockDim.x)) {
    const int row = share.tile_row + i / kChunks;
    const bool real = row < problem.rows;
    const int head = share.key_head * problem.group + (real ? row / nodes : 0);
    const Element* from = data + head * query.head_stride + row % nodes * query.row_stride;
    copy_chunk<Element, kSize>(tile, i / kChunks, i % kChunks, from, problem.params.size, real,
                               problem.aligned);
  }
}

// Keys and values in the slots from `begin` on; zeros where no node sees one.
template <typename Element, int kSize, int kSlots, bool kAligned>
__device__ __forceinline__ void copy_slots(const AttentionProblem& problem, const Share& share,
                                           int begin, Element* keys, Element* values) {
  constexpr int kChunks = kSize * static_cast<int>(sizeof(Element)) / 16;
  const AttentionParams& params = problem.params;
  const auto* key_data =
      static_cast<const Element*>(params.keys.data) + share.key_head * params.keys.head_stride;
  const auto* value_data =
      static_cast<const Element*>(params.values.data) + share.key_head * params.values.head_stride;
  const Values<int32_t>& table = params.pages.table;
#pragma unroll(kAligned ? 2 : 1)
  for (int i = static_cast<int>(threadIdx.x); i < kSlots * kChunks;
       i += static_cast<int>(blockDim.x)) {
    const int row = i / kChunks, chunk = i % kChunks;
    int slot = begin + row;
    const bool real = slot >= share.reach.first && slot < share.reach.end;
    int64_t page = share.batch;
    if (!real) {
      slot = 0;
    } else if (table.data != nullptr) {
      const int place = problem.page_shift < 0 ? slot / static_cast<int>(params.pages.size)
                                               : slot >> problem.page_shift;
      page = load(table.data + share.batch * table.batch_stride + place * table.row_stride);
      slot -= place * static_cast<int>(params.pages.size);
    }
    copy_chunk<Element, kSize>(
        keys, row, chunk,
        key_data + page * params.keys.batch_stride + slot * params.keys.row_stride, params.size,
        real, kAligned);
    copy_chunk<Element, kSize>(
        values, row, chunk,
        value_data + page * params.values.batch_stride + slot * params.values.row_stride,
        params.value_size, real, kAligned);
  }
}

// Rows in shared memory, and what of them is under way. A stage is a tile of keys and one of
// values.
template <typename Element, int kSize, int kSlots>
struct Tiles {
  static constexpr int kTile = kSlots * kSize;

  Element* query;
  Element* stages;
  uint64_t* seen;    // of each packed row, the slots of a tile that hides some
  uint32_t* broken;  // and those whose values are not all finite

  __device__ Tiles(unsigned char* shared, int query_rows, int num_stages)
      : query(reinterpret_cast<Element*>(shared)),
        stages(query + query_rows * kSize),
        seen(reinterpret_cast<uint64_t*>(stages + num_stages * 2 * kTile)),
        broken(reinterpret_cast<uint32_t*>(seen + query_rows)) {}

  __device__ Element* keys(int stage) const { return stages + stage * 2 * kTile; }
  __device__ Element* values(int stage) const { return keys(stage) + kTile; }

  __device__ void copy(const AttentionProblem& problem, const Share& share, int tile,
                       int stage) const {
    const int begin = share.begin + tile * kSlots;
    if (problem.aligned) {
      copy_slots<Element, kSize, kSlots, true>(problem, share, begin, keys(stage), values(stage));
    } else {
      copy_slots<Element, kSize, kSlots, false>(problem, share, begin, keys(stage), values(stage));
    }
  }

  // Begins with the query and all stages but one.
  __device__ void begin(const AttentionProblem& problem, const Share& share, int query_rows) const {
    if (problem.params.size < kSize || problem.params.value_size < kSize) {
      // What no row fills.
      const int chunks =
          static_cast<int>(reinterpret_cast<Bits*>(seen) - reinterpret_cast<Bits*>(query));
      for (int i = static_cast<int>(threadIdx.x); i < chunks; i += static_cast<int>(blockDim.x)) {
        reinterpret_cast<Bits*>(query)[i] = Bits{};
      }
      __syncthreads();
    }
    copy_query<Element, kSize>(problem, share, query, query_rows);
    for (int i = 0; i + 1 < problem.stages; ++i) {
      if (i < share.count) copy(problem, share, i, i);
      __pipeline_commit();
    }
  }

  // Waits for a tile, whose stage it returns, and begins to copy the one that takes the place of
  // the tile before.
  __device__ int next(const AttentionProblem& problem, const Share& share, int tile) const {
    if (problem.stages == 3) {
      __pipeline_wait_prior(1);
    } else {
      __pipeline_wait_prior(0);
    }
    __syncthreads();
    const int ahead = tile + problem.stages - 1;
    if (ahead < share.count) copy(problem, share, ahead, ahead % problem.stages);
    __pipeline_commit();
    return tile % problem.stages;
  }

  // Before a tile that hides slots: notes what each row sees, puts 0 in place of what is no finite
  // value, for a mass of 0 must not meet it, and notes where that was.
  __device__ void look(const AttentionProblem& problem, const Share& share, int rows, int tile,
                       int stage, uint32_t exponent) const {
    for (int i = static_cast<int>(threadIdx.x); i < rows; i += static_cast<int>(blockDim.x)) {
      const int slot = share.begin + tile * kSlots;
      seen[i] = seen_slots(problem, share, share.tile_row + i, slot) & first_bits(kSlots);
    }
    static_assert(kSlots % kLanes == 0 || kSlots == 16, "whole warps look at the slots");
    constexpr int kChunks = kSize * static_cast<int>(sizeof(Element)) / 16;
    const auto row = static_cast<int>(threadIdx.x);
    if (row < (kSlots + kLanes - 1) / kLanes * kLanes) {
      bool found = false;
      for (int chunk = 0; chunk < kChunks && row < kSlots; ++chunk) {
        auto* at =
            reinterpret_cast<Bits*>(values(stage) + place_in_tile<Element, kSize>(row, chunk));
        bool here = false;
#pragma unroll
        for (const uint32_t word : at->word) {
          here |= (word & exponent) == exponent;
          if (sizeof(Element) == 2) here |= (word >> 16 & exponent) == exponent;
        }
        if (here) *at = Bits{};
        found |= here;
      }
      const uint32_t slots = __ballot_sync(kAllLanes, found);
      if (lane_id() == 0) broken[warp_id()] = slots;
    }
    __syncthreads();
  }

  __device__ uint64_t broken_slots() const {
    const uint64_t upper = kSlots > kLanes ? broken[kSlots > kLanes ? 1 : 0] : 0;
    return upper << 32 | broken[0];
  }
};

// What warps leave of a block's rows, when the tiles are no longer needed.
template <int kSize>
struct Scratch {
  static constexpr int kStride = kSize + 4;

  float* outs;  // (slot warps, rows, kStride)
  float* tops;  // (slot warps, rows)
  float* totals;

  __device__ Scratch(unsigned char* shared, int rows, int slot_warps)
      : outs(reinterpret_cast<float*>(shared)),
        tops(outs + slot_warps * rows * kStride),
        totals(tops + slot_warps * rows) {}

  static size_t bytes(int rows, int slot_warps) {
    return static_cast<size_t>(slot_warps) * rows * (kStride + 2) * sizeof(float);
  }
};

struct alignas(16) Quad {
  float value[4];
};

// Joins the warps that had different slots, in their order, and writes the partial result.
template <int kSize, int kSlotWarps>
__device__ void write_part(const AttentionProblem& problem, const Share& share,
                           const Scratch<kSize>& scratch, int rows) {
  __syncthreads();
  const int quads = problem.columns / 4;
  for (int i = static_cast<int>(threadIdx.x); i < rows * quads; i += static_cast<int>(blockDim.x)) {
    const int row = i / quads, quad = i % quads;
    if (share.tile_row + row >= problem.rows) break;
    float top = kNoMass, total = 0.0f;
    for (int w = 0; w < kSlotWarps; ++w) top = fmaxf(top, scratch.tops[w * rows + row]);
    const float base = top == kNoMass ? 0.0f : top;
    Quad sum = {};
    for (int w = 0; w < kSlotWarps; ++w) {
      const int place = w * rows + row;
      const float weight = kSlotWarps == 1 ? 1.0f : exp2_flushed(scratch.tops[place] - base);
      const auto& out =
          *reinterpret_cast<const Quad*>(scratch.outs + place * Scratch<kSize>::kStride + quad * 4);
      total += weight * scratch.totals[place];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum.value[c] += weight * out.value[c];
    }
    const int64_t split = static_cast<int64_t>(blockIdx.z) * problem.splits + blockIdx.y;
    const int64_t place = split * problem.rows + share.tile_row + row;
    store(reinterpret_cast<Quad*>(problem.outs + place * problem.columns) + quad, sum);
    if (quad == 0) {
      store(problem.tops + place, top);
      store(problem.totals + place, total);
    }
  }
}

// Scores from products, in units of log 2.
template <int kRows, int kColumns>
__device__ __forceinline__ void score(const AttentionProblem& problem,
                                      float (&products)[kRows][kColumns]) {
  const float cap = problem.cap;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      products[r][c] *= problem.scale;
      if (cap != 0.0f) products[r][c] = cap * tanhf(products[r][c]);
    }
  }
}

// Whether a tile has slots that some row does not see.
template <int kSlots>
__device__ __forceinline__ bool hides(const Share& share, int tile) {
  const int slot = share.begin + tile * kSlots;
  return slot + kSlots > share.reach.length || slot < share.full;
}

inline dim3 grid_of(const AttentionProblem& problem, int rows) {
  return dim3(static_cast<unsigned>((problem.rows + rows - 1) / rows),
              static_cast<unsigned>(problem.splits),
              static_cast<unsigned>(problem.params.batch * problem.params.key_heads));
}

inline int64_t largest_size(const AttentionProblem& problem) {
  const AttentionParams& params = problem.params;
  return params.size > params.value_size ? params.size : params.value_size;
}

// Decides how many stages there is room for on the current device; returns a block's bytes.
template <int kSize, int kSlots>
size_t shared_bytes(AttentionProblem& problem, int rows, int slot_warps, size_t element,
                    size_t more = 0) {
  const size_t query = static_cast<size_t>(rows) * kSize * element;
  const size_t stage = 2 * element * kSlots * kSize,
               scratch = Scratch<kSize>::bytes(rows, slot_warps);
  more += static_cast<size_t>(rows) * sizeof(uint64_t) + 4 * sizeof(uint32_t);  // what is looked at
  problem.stages = query + 3 * stage + more <= most_shared() ? 3 : 2;
  const size_t tiles = query + static_cast<size_t>(problem.stages) * stage + more;
  return tiles > scratch ? tiles : scratch;
}

// One for each dtype.
void launch_bfloat16(const AttentionProblem& problem, cudaStream_t stream);
void launch_float16(const AttentionProblem& problem, cudaStream_t stream);
void launch_float32(const AttentionProblem& problem, cudaStream_t stream);

}  // namespace specens
