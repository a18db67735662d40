// SPDX-License-Identifier: Apache-2.0
// `attention`: the cache in splits of a fixed size, each attended to by a tile of packed query
// rows, and the splits' partial results joined in their order. A split's borders depend on the
// tree's shape alone: neither threads nor batch, capacity or pages show in a result.
#include <algorithm>
#include <cstring>
#include <memory>

#include "dispatch.h"
#include "parallel.h"
#include "slots.h"

namespace specens {
namespace {

constexpr int kMaxRows = 128;  // of a tile
// More rows compute for so long that waiting for memory does not show.
constexpr int kMostRowsAsking = 128;
constexpr double kInfinity = __builtin_inf();

// Slots of a split: so many that its partial results are small beside the keys that it reads.
int64_t split_size(int64_t rows) { return rows <= 32 ? 256 : rows <= 64 ? 512 : 1024; }

constexpr int64_t padded_row(int64_t size) {
  return (size + kRowElements - 1) / kRowElements * kRowElements;
}

// The splits that a row of the batch is read in.
struct Reach {
  int64_t length;  // of the prefix
  int64_t first;   // slot that a node of depth 0 sees first
  int64_t full;    // slot from which on every node sees the prefix
  int64_t first_split;
  int64_t splits;
  int64_t first_unit;  // one for each split, key head and tile
};

// One split's results for one tile of rows.
struct Part {
  float* tops;
  float* sums;
  float* out;
};

class Attention {
 public:
  Attention(const AttentionParams& params, const Team& team);

  void run(const Team& team);

 private:
  struct Unit {
    int64_t batch, split, key_head, tile;
  };

  int64_t row_count(int64_t tile) const {
    return std::min<int64_t>(kMaxRows, rows_ - tile * kMaxRows);
  }
  Part part(int64_t batch, int64_t split, int64_t key_head, int64_t tile) const;
  Unit unit(int64_t index) const;
  const char* slot(const Heads& heads, int64_t size_bytes, const Place& place, int64_t head) const;
  void pack(const Unit& unit, float* query) const;
  void attend(const Unit& unit, float* memory) const;
  // Where the slots of a block from `begin` on lie.
  void place(const Unit& unit, int64_t begin, int64_t end, const float* zeros,
             AttentionBlock& block) const;
  // Bits of the slots from `slot` on that a node sees; those from `end` on are not seen.
  uint64_t seen(int64_t batch, int64_t node, int64_t slot, int64_t end) const;
  void join(int64_t row, float* memory) const;

  const AttentionParams& params_;
  int64_t group_, rows_, tiles_, split_;
  int64_t tile_rows_, key_stride_, value_stride_, part_floats_, thread_floats_;
  std::unique_ptr<Reach[]> reaches_;
  int64_t units_ = 0;
  int64_t most_splits_ = 0;
  std::unique_ptr<float[]> memory_;
  float* parts_;
  float* threads_;
};

float* aligned(float* memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

Attention::Attention(const AttentionParams& params, const Team& team) : params_(params) {
  group_ = params.heads / params.key_heads;
  rows_ = group_ * params.nodes;
  tiles_ = (rows_ + kMaxRows - 1) / kMaxRows;
  split_ = split_size(std::min<int64_t>(rows_, kMaxRows));
  key_stride_ = padded_row(params.size);
  value_stride_ = padded_row(params.value_size);
  reaches_.reset(new Reach[params.batch]);
  for (int64_t b = 0; b < params.batch; ++b) {
    Reach& reach = reaches_[b];
    reach.length = params.lengths.at(b);
    reach.first = reach.full = 0;
    if (params.window > 0) {
      int64_t deepest = 0;
      for (int64_t i = 0; i < params.nodes; ++i) {
        deepest = std::max<int64_t>(deepest, params.depths.at(b, i));
      }
      reach.first = std::max<int64_t>(reach.length - params.window + 1, 0);
      reach.full = reach.length - params.window + 1 + deepest;
    }
    reach.first_split = reach.first / split_;
    reach.splits = (reach.length + params.nodes + split_ - 1) / split_ - reach.first_split;
    reach.first_unit = units_;
    units_ += reach.splits * params.key_heads * tiles_;
    most_splits_ = std::max(most_splits_, reach.splits);
  }
  tile_rows_ = std::min<int64_t>(rows_, kMaxRows) + kRowsTogether - 1;
  tile_rows_ -= tile_rows_ % kRowsTogether;
  part_floats_ = tile_rows_ * (value_stride_ + kSumLanes + 1);
  // Of an attending thread its query, twice, a row of zeros and the kernels' own; of a joining one
  // the splits' weights and a row.
  const int64_t attending = padded_row(tile_rows_ * params.size) + tile_rows_ * key_stride_ / 2 +
                            std::max(key_stride_, value_stride_) +
                            (key_stride_ + kMaxTileRows + value_stride_) * kLanes;
  thread_floats_ = std::max(attending, padded_row(most_splits_) + value_stride_);
  memory_.reset(new float[units_ * part_floats_ + team.size() * thread_floats_ + kSumLanes]);
  parts_ = aligned(memory_.get());
  threads_ = parts_ + units_ * part_floats_;
}

Attention::Unit Attention::unit(int64_t index) const {
  int64_t b = 0;
  while (b + 1 < params_.batch && reaches_[b + 1].first_unit <= index) ++b;
  const int64_t within = index - reaches_[b].first_unit;
  // Tiles of one split follow one another, and find its keys in the cache.
  const int64_t split = within / tiles_ % reaches_[b].splits;
  return {b, split, within / tiles_ / reaches_[b].splits, within % tiles_};
}

Part Attention::part(int64_t batch, int64_t split, int64_t key_head, int64_t tile) const {
  const Reach& reach = reaches_[batch];
  const int64_t index = reach.first_unit + (key_head * reach.splits + split) * tiles_ + tile;
  float* out = parts_ + index * part_floats_;
  float* sums = out + tile_rows_ * value_stride_;
  return {sums + tile_rows_ * kSumLanes, sums, out};
}

const char* Attention::slot(const Heads& heads, int64_t size_bytes, const Place& place,
                            int64_t head) const {
  const int64_t offset =
      place.page * heads.batch_stride + head * heads.head_stride + place.row * heads.row_stride;
  return static_cast<const char*>(heads.data) + offset * size_bytes;
}

void Attention::pack(const Unit& unit, float* query) const {
  const int size_bytes = element_size(params_.query.dtype);
  for (int64_t i = 0; i < row_count(unit.tile); ++i) {
    const int64_t row = unit.tile * kMaxRows + i;
    const int64_t head = unit.key_head * group_ + row / params_.nodes;
    const char* data = slot(params_.query, size_bytes, {unit.batch, row % params_.nodes}, head);
    kernels().widen_row({data, params_.query.dtype, static_cast<int>(params_.size)},
                        query + i * params_.size);
  }
}

uint64_t Attention::seen(int64_t batch, int64_t node, int64_t slot, int64_t end) const {
  const Reach& reach = reaches_[batch];
  const int64_t count = std::min<int64_t>(end - slot, kLanes);
  const auto first_bits = [](int64_t bits) {
    return bits <= 0 ? uint64_t{0} : bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  };
  // Place of the block's first slot among the nodes.
  const int64_t at = slot - reach.length;
  uint64_t bits = first_bits(-at);
  if (params_.window > 0) {
    const int64_t first = reach.length + params_.depths.at(batch, node) - params_.window + 1;
    bits &= ~first_bits(first - slot);
  }
  const auto word = [&](int64_t index) -> uint64_t {
    if (index < 0 || index * 64 >= params_.nodes) return 0;
    return static_cast<uint64_t>(params_.visible.at(batch, node, index));
  };
  if (at <= -kLanes) return bits & first_bits(count);
  if (at < 0) {
    bits |= word(0) << -at;
  } else {
    bits = word(at / 64) >> (at % 64);
    if (at % 64 != 0) bits |= word(at / 64 + 1) << (64 - at % 64);
  }
  return bits & first_bits(count);
}

void Attention::place(const Unit& unit, int64_t begin, int64_t end, const float* zeros,
                      AttentionBlock& block) const {
  const int size_bytes = element_size(block.dtype);
  block.count = static_cast<int>(std::min<int64_t>(kLanes, end - begin));
  // What lies beyond the nodes, or before the window, need not be there.
  const auto first = static_cast<int>(std::max<int64_t>(reaches_[unit.batch].first - begin, 0));
  const bool paged = params_.pages.table.data != nullptr;
  const int64_t key_step = params_.keys.row_stride * size_bytes;
  const int64_t value_step = params_.values.row_stride * size_bytes;
  const char *key = nullptr, *value = nullptr;
  for (int j = 0; j < kLanes; ++j) {
    if (j < first || j >= block.count) {
      block.keys[j] = block.values[j] = zeros;
      continue;
    }
    if (paged || key == nullptr) {
      const Place at = place_of(params_.pages, unit.batch, begin + j);
      key = slot(params_.keys, size_bytes, at, unit.key_head);
      value = slot(params_.values, size_bytes, at, unit.key_head);
    } else {
      key += key_step;
      value += value_step;
    }
    block.keys[j] = key;
    block.values[j] = value;
  }
  const auto next = static_cast<int>(std::min<int64_t>(kLanes, end - begin - kLanes));
  const bool asks = !paged && next > 0 && block.rows <= kMostRowsAsking;
  const auto lines = [&](int64_t size) { return static_cast<int>((size * size_bytes + 63) / 64); };
  block.ahead[0] = {key + key_step, key_step, asks ? next : 0, lines(params_.size), 0};
  block.ahead[1] = {value + value_step, value_step, asks ? next : 0, lines(params_.value_size), 0};
}

void Attention::attend(const Unit& unit, float* memory) const {
  const Reach& reach = reaches_[unit.batch];
  const auto rows = static_cast<int>(row_count(unit.tile));
  const Part result = part(unit.batch, unit.split, unit.key_head, unit.tile);
  std::fill_n(result.tops, tile_rows_, static_cast<float>(-kInfinity));
  std::fill_n(result.sums, tile_rows_ * kSumLanes, 0.0f);
  std::fill_n(result.out, tile_rows_ * value_stride_, 0.0f);
  pack(unit, memory);

  AttentionBlock block;
  block.query = memory;
  float* packed = memory + padded_row(tile_rows_ * params_.size);
  block.packed = reinterpret_cast<uint32_t*>(packed);
  float* zeros = packed + tile_rows_ * key_stride_ / 2;
  const int64_t longest = std::max(key_stride_, value_stride_);
  std::fill_n(zeros, longest, 0.0f);
  block.scratch = zeros + longest;
  block.dtype = params_.keys.dtype;
  block.rows = rows;
  block.size = static_cast<int>(params_.size);
  block.value_size = static_cast<int>(params_.value_size);
  block.key_stride = static_cast<int>(key_stride_);
  block.value_stride = static_cast<int>(value_stride_);
  block.scale = static_cast<float>(params_.scale);
  block.softcap = static_cast<float>(params_.softcap);
  block.tops = result.tops;
  block.sums = result.sums;
  block.out = result.out;
  Ahead ahead[2];
  block.ahead = ahead;
  // A tile of rows has this many steps or more, and a block of them this many lines.
  const int64_t steps = (rows + kMaxTileRows - 1) / kMaxTileRows * (params_.size + kLanes);
  const int64_t lines = (params_.size + params_.value_size) * element_size(block.dtype);
  block.each = static_cast<int>((lines + steps - 1) / steps);
  kernels().begin_rows(block);

  const int64_t split = (reach.first_split + unit.split) * split_;
  const int64_t end = std::min(split + split_, reach.length + params_.nodes);
  uint64_t seen_bits[kMaxRows];
  for (int64_t begin = std::max(split, reach.first / kLanes * kLanes); begin < end;
       begin += kLanes) {
    place(unit, begin, end, zeros, block);
    block.seen = nullptr;
    if (begin + kLanes > reach.length || begin < reach.full) {
      block.seen = seen_bits;
      for (int i = 0; i < rows; ++i) {
        const int64_t node = (unit.tile * kMaxRows + i) % params_.nodes;
        seen_bits[i] = seen(unit.batch, node, begin, end);
      }
    }
    kernels().attend(block);
  }
  kernels().end_rows(block);
}

void Attention::join(int64_t index, float* memory) const {
  const int64_t nodes = params_.nodes;
  const int64_t batch = index / (params_.heads * nodes);
  const int64_t head = index / nodes % params_.heads, node = index % nodes;
  const Reach& reach = reaches_[batch];
  const int64_t row = head % group_ * nodes + node, tile = row / kMaxRows, i = row % kMaxRows;
  const Part first = part(batch, 0, head / group_, tile);
  // Splits of one key head and tile lie this far apart.
  const int64_t stride = tiles_ * part_floats_;
  float* weights = memory;
  float* out = weights + padded_row(most_splits_);

  const bool has_sink = params_.sinks.data != nullptr;
  const double sink = has_sink ? params_.sinks.at(0, 0, head) : -kInfinity;
  double top = sink, total = 0.0;
  for (int64_t c = 0; c < reach.splits; ++c) {
    top = std::max<double>(top, first.tops[c * stride + i]);
  }
  const double shift = top == -kInfinity ? 0.0 : top;
  for (int64_t c = 0; c < reach.splits; ++c) {
    const float* lanes = first.sums + c * stride + i * kSumLanes;
    double sum = 0.0;
    for (int k = 0; k < kSumLanes; ++k) sum += lanes[k];
    // A split of which nothing was seen; NaN is something.
    const double weight = sum == 0.0 ? 0.0 : exponential(first.tops[c * stride + i] - shift);
    weights[c] = static_cast<float>(weight);
    total += weight * sum;
    if (sum != sum) weights[c] = static_cast<float>(sum);
  }
  if (has_sink) total += exponential(sink - shift);
  for (int64_t c = 0; c < reach.splits; ++c) {
    if (total != 0.0) weights[c] = static_cast<float>(weights[c] / total);
  }
  kernels().join_rows(first.out + i * value_stride_, stride, weights,
                      static_cast<int>(reach.splits), static_cast<int>(params_.value_size), out);
  const int64_t place = (batch * nodes + node) * params_.heads + head;
  const int size_bytes = element_size(params_.query.dtype);
  char* target = static_cast<char*>(params_.out) + place * params_.value_size * size_bytes;
  kernels().store_row(out, static_cast<int>(params_.value_size), params_.query.dtype, target);
  params_.lse[index] = static_cast<float>(total == total ? shift + logarithm(total) : total);
}

void Attention::run(const Team& team) {
  team.for_each(units_, 1, [&](int thread, int64_t index) {
    attend(unit(index), threads_ + thread * thread_floats_);
  });
  team.for_each(params_.batch * params_.heads * params_.nodes, 16,
                [&](int thread, int64_t row) { join(row, threads_ + thread * thread_floats_); });
}

}  // namespace

void attention(const AttentionParams& params, int threads) {
  // In elements of a sweep: rows of products, and what is read and transposed whatever the rows.
  const int64_t rows = params.heads / params.key_heads * params.nodes;
  int64_t slots = 0;
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t length = params.lengths.at(b) + params.nodes;
    slots += params.window > 0 ? std::min(length, params.window + params.nodes) : length;
  }
  const int64_t elements =
      slots * params.key_heads * (params.size + params.value_size) * (rows + 4) / 16;
  Team::run(threads, elements, [&](const Team& team) { Attention(params, team).run(team); });
}

}  // namespace specens
