// SPDX-License-Identifier: Apache-2.0
// `attention` and `compact` over random caches and trees, against direct computations. What nobody
// may read is NaN, and a buffer ends with its last addressed byte. To cover one more parameter: a
// field of TreeCase, its line in `tree_case`, in `attend_directly` and in `Caches`.
#pragma once

#include <cstddef>
#include <numeric>

#include "outputs.h"

namespace native_tests {

// Vectors (B, H, S, E), as numbers.
struct Grid {
  int64_t extents[4];
  std::vector<float> values;

  Grid() = default;
  Grid(int64_t batch, int64_t heads, int64_t rows, int64_t size, float value)
      : extents{batch, heads, rows, size},
        values(static_cast<size_t>(batch * heads * rows * size), value) {}

  float* row(int64_t b, int64_t h, int64_t s) {
    return &values[static_cast<size_t>(((b * extents[1] + h) * extents[2] + s) * extents[3])];
  }
  const float* row(int64_t b, int64_t h, int64_t s) const {
    return const_cast<Grid*>(this)->row(b, h, s);
  }
};

struct TreeCase {
  int64_t batch, heads, key_heads, nodes, size, value_size, capacity, page, window;
  DType dtype;
  double scale, softcap;
  bool shared_tree;
  Grid query, keys, values;
  std::vector<int64_t> lengths, parents, visible;  // (B,), (B, N + 1), (B, N + 1, W)
  std::vector<int32_t> depths, table;              // (B, N + 1), (B, pages)
  std::vector<float> sinks;                        // (H,), or none

  int64_t words() const { return (nodes + 63) / 64; }
  int64_t pages() const { return (capacity + page - 1) / page; }
};

inline void draw_tree(Random& random, TreeCase& c, int64_t b) {
  const int64_t words = c.words();
  for (int64_t i = 0; i < c.nodes; ++i) {
    const int64_t place = b * c.nodes + i;
    const int64_t nearest = std::max<int64_t>(0, i - 5);
    const int64_t parent = i == 0 || random.one_in(12) ? -1 : nearest + random.below(i - nearest);
    c.parents[place] = parent;
    c.depths[place] = parent < 0 ? 0 : c.depths[b * c.nodes + parent] + 1;
    for (int64_t w = 0; w < words; ++w) c.visible[place * words + w] = 0;
    int64_t steps = 0;
    for (int64_t node = i; node >= 0; node = c.parents[b * c.nodes + node], ++steps) {
      if (c.window > 0 && steps >= c.window) break;
      uint64_t bit = uint64_t{1} << (node % 64);
      c.visible[place * words + node / 64] |= static_cast<int64_t>(bit);
    }
  }
  // Bits beyond the last node say nothing.
  if (c.nodes % 64 != 0 && random.one_in(2)) {
    c.visible[(b + 1) * c.nodes * words - 1] |=
        static_cast<int64_t>(~uint64_t{0} << (c.nodes % 64));
  }
}

inline TreeCase tree_case(uint64_t seed, bool large) {
  Random random(seed);
  TreeCase c = {};
  c.batch = 1 + random.below(3);
  c.key_heads = 1 + random.below(3);
  c.heads = c.key_heads * random.pick({1, 3, 4, 7});
  c.nodes = random.pick({1, 2, 5, 16, 40, 63, 64, 65, 130});
  c.size = random.pick({1, 8, 16, 19, 32, 64});
  c.value_size = random.one_in(2) ? c.size : random.pick({3, 16, 24, 48});
  c.dtype = random.pick({DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  c.window = random.one_in(3) ? random.pick({1, 2, 30, 64, 65, 500}) : 0;
  c.softcap = random.one_in(4) ? 1.0 + random.uniform() : 0.0;
  c.scale = 1.0 / std::sqrt(static_cast<double>(c.size));
  c.shared_tree = random.one_in(4);
  if (large) {
    c.batch = 1;
    c.nodes = random.pick({3, 9});
    c.size = 32;
  }
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t short_lengths[] = {0, 1, 5, 63, 64, 65, 127, 250, 256, 511, 600};
    c.lengths.push_back(large ? 2000 + random.below(200) : random.pick(short_lengths));
  }
  const int64_t longest = *std::max_element(c.lengths.begin(), c.lengths.end());
  c.capacity = longest + c.nodes + random.pick({0, 0, 1, 70});
  c.page = random.one_in(3) ? random.pick({1, 16, 37, 64}) : 0;
  const bool paged = c.page > 0;
  if (!paged) c.page = c.capacity;
  const auto places = static_cast<size_t>(c.batch * c.nodes);
  c.parents.resize(places);
  c.depths.resize(places);
  c.visible.resize(places * static_cast<size_t>(c.words()));
  for (int64_t b = 0; b < c.batch; ++b) draw_tree(random, c, b);
  if (c.shared_tree) {
    for (auto* list : {&c.parents, &c.visible}) {
      const auto row = static_cast<std::ptrdiff_t>(list->size()) / c.batch;
      for (int64_t b = 1; b < c.batch; ++b) {
        std::copy_n(list->begin(), row, list->begin() + b * row);
      }
    }
    for (int64_t b = 1; b < c.batch; ++b) {
      std::copy_n(c.depths.begin(), c.nodes, c.depths.begin() + b * c.nodes);
    }
  }
  const auto fill = [&](Grid& grid) {
    for (float& value : grid.values) value = rounded(random.normal(), c.dtype);
  };
  c.query = Grid(c.batch, c.heads, c.nodes, c.size, 0.0f);
  c.keys = Grid(c.batch, c.key_heads, c.capacity, c.size, 0.0f);
  c.values = Grid(c.batch, c.key_heads, c.capacity, c.value_size, 0.0f);
  fill(c.query);
  for (Grid* grid : {&c.keys, &c.values}) {
    fill(*grid);
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.key_heads; ++h) {
        for (int64_t s = 0; s < c.capacity; ++s) {
          const bool before = c.window > 0 && s <= c.lengths[b] - c.window;
          if (before || s >= c.lengths[b] + c.nodes) {
            std::fill_n(grid->row(b, h, s), grid->extents[3], kNan);
          }
        }
      }
    }
  }
  if (random.one_in(3)) {
    for (int64_t h = 0; h < c.heads; ++h) c.sinks.push_back(2.0f * random.normal());
  }
  if (paged) {
    c.table.resize(static_cast<size_t>(c.batch * c.pages()));
    std::iota(c.table.begin(), c.table.end(), 0);
    for (size_t i = c.table.size(); i > 1; --i) {
      std::swap(c.table[i - 1], c.table[static_cast<size_t>(random.below(int64_t(i)))]);
    }
  }
  return c;
}

struct Attended {
  std::vector<float> out, lse;

  bool operator==(const Attended& other) const {
    return same(out, other.out) && same(lse, other.lse);
  }
};

// In double precision, row by row.
inline Attended attend_directly(const TreeCase& c) {
  Attended result;
  result.out.resize(static_cast<size_t>(c.batch * c.nodes * c.heads * c.value_size));
  result.lse.resize(static_cast<size_t>(c.batch * c.heads * c.nodes));
  for (int64_t place = 0; place < c.batch * c.heads * c.nodes; ++place) {
    const int64_t b = place / (c.heads * c.nodes), h = place / c.nodes % c.heads;
    const int64_t i = place % c.nodes, length = c.lengths[b], group = c.heads / c.key_heads;
    std::vector<double> scores, out(static_cast<size_t>(c.value_size));
    std::vector<int64_t> slots;
    const int64_t node = b * c.nodes + i;
    const int64_t first = c.window > 0 ? length + c.depths[node] - c.window + 1 : 0;
    for (int64_t s = std::max<int64_t>(first, 0); s < length; ++s) slots.push_back(s);
    for (int64_t j = 0; j < c.nodes; ++j) {
      const auto word = static_cast<uint64_t>(c.visible[node * c.words() + j / 64]);
      if ((word >> (j % 64) & 1) != 0) slots.push_back(length + j);
    }
    double top = c.sinks.empty() ? -INFINITY : c.sinks[h], total = 0.0;
    for (const int64_t s : slots) {
      const float* q = c.query.row(b, h, i);
      const float* k = c.keys.row(b, h / group, s);
      double score = 0.0;
      for (int64_t e = 0; e < c.size; ++e) score += double{q[e]} * k[e];
      score *= c.scale;
      if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
      scores.push_back(score);
      top = std::max(top, score);
    }
    if (!c.sinks.empty()) total = std::exp(c.sinks[h] - top);
    for (double& score : scores) total += score = std::exp(score - top);
    for (size_t n = 0; n < slots.size(); ++n) {
      const float* v = c.values.row(b, h / group, slots[n]);
      for (int64_t f = 0; f < c.value_size; ++f) out[f] += scores[n] / total * v[f];
    }
    const int64_t at = ((b * c.nodes + i) * c.heads + h) * c.value_size;
    std::copy(out.begin(), out.end(), result.out.begin() + at);
    result.lse[place] = static_cast<float>(top + std::log(total));
  }
  return result;
}

// One layout of a case: dimensions in any order, gaps, pages in any order.
class Caches {
 public:
  Caches(const TreeCase& c, uint64_t seed) : random_(seed) {
    params_.query = place(c.query, c.dtype, nullptr, c.nodes);
    const std::vector<int32_t>* table = c.table.empty() ? nullptr : &c.table;
    params_.keys = place(c.keys, c.dtype, table, c.page);
    params_.values = place(c.values, c.dtype, table, c.page);
    params_.pages.size = c.page;
    if (table != nullptr) params_.pages.table = {c.table.data(), c.pages(), 1, 0};
    params_.batch = c.batch;
    params_.heads = c.heads;
    params_.key_heads = c.key_heads;
    params_.nodes = c.nodes;
    params_.size = c.size;
    params_.value_size = c.value_size;
    params_.lengths = {c.lengths.data(), 1, 0, 0};
    const int64_t trees = c.shared_tree ? 0 : 1, words = c.words();
    params_.visible = {c.visible.data(), trees * c.nodes * words, words, 1};
    if (c.window > 0) params_.depths = {c.depths.data(), trees * c.nodes, 1, 0};
    if (!c.sinks.empty()) params_.sinks = {c.sinks.data(), 0, 0, 1};
    params_.scale = c.scale;
    params_.softcap = c.softcap;
    params_.window = c.window;
  }

  // What `attend` makes of the parameters.
  template <typename Attend>
  Attended run(const TreeCase& c, bool margins, const Attend& attend) const {
    specens::AttentionParams params = params_;
    const int64_t count = c.batch * c.nodes * c.heads * c.value_size;
    Output<float> lse(c.batch * c.heads * c.nodes, unwritten(), margins);
    params.lse = lse.data();
    if (c.dtype == DType::kFloat32) {
      Output<float> out(count, unwritten(), margins);
      params.out = out.data();
      attend(params);
      return {out.take(), lse.take()};
    }
    Output<uint16_t> out(count, 0x5A5A, margins);
    params.out = out.data();
    attend(params);
    std::vector<float> wide;
    for (const uint16_t half : out.take()) {
      wide.push_back(c.dtype == DType::kBFloat16 ? from_bfloat16(half) : from_float16(half));
    }
    return {wide, lse.take()};
  }

 private:
  specens::Heads place(const Grid& grid, DType dtype, const std::vector<int32_t>* table,
                       int64_t page) {
    const auto [batch, heads, rows, size] = grid.extents;
    const int64_t pages = table == nullptr ? batch : static_cast<int64_t>(table->size());
    const int64_t extents[] = {pages, heads, page};
    int order[] = {2, 1, 0};
    std::swap(order[0], order[random_.below(3)]);
    std::swap(order[1], order[1 + random_.below(2)]);
    int64_t strides[3], step = size + (random_.one_in(2) ? random_.below(5) : 0), last = 0;
    for (const int dim : order) {
      strides[dim] = step;
      last += (extents[dim] - 1) * step;
      step *= extents[dim] + random_.below(2);
    }
    const size_t width = dtype == DType::kFloat32 ? 4 : 2;
    buffers_.emplace_back(static_cast<size_t>(last + size) * width, uint8_t{0xFF});
    uint8_t* data = buffers_.back().data();
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t s = 0; s < rows; ++s) {
          const int64_t per_row = table == nullptr ? 1 : pages / batch;
          const int64_t at = table == nullptr ? b : (*table)[b * per_row + s / page];
          const int64_t offset = at * strides[0] + h * strides[1] + s % page * strides[2];
          for (int64_t e = 0; e < size; ++e) {
            write(grid.row(b, h, s)[e], dtype, data + static_cast<size_t>(offset + e) * width);
          }
        }
      }
    }
    return {data, dtype, strides[0], strides[1], strides[2]};
  }

  static void write(float value, DType dtype, uint8_t* to) {
    const uint16_t half = dtype == DType::kBFloat16 ? to_bfloat16(value) : to_float16(value);
    if (dtype == DType::kFloat32) std::memcpy(to, &value, 4);
    if (dtype != DType::kFloat32) std::memcpy(to, &half, 2);
  }

  Random random_;
  std::vector<std::vector<uint8_t>> buffers_;
  specens::AttentionParams params_ = {};
};

// Results are rounded to halves, and masses may be, too: by 2^-9 of a sum of values' magnitudes.
inline void check_attended(const TreeCase& c, const Attended& found) {
  const Attended right = attend_directly(c);
  const double tolerance = c.dtype == DType::kBFloat16  ? 0x1p-7
                           : c.dtype == DType::kFloat16 ? 0x1p-10
                                                        : 1e-5;
  for (size_t i = 0; i < right.out.size(); ++i) {
    const double error = std::fabs(double{found.out[i]} - right.out[i]);
    expect(error <= tolerance * (0.5 + std::fabs(right.out[i])), "an output is wrong", error);
  }
  for (size_t i = 0; i < right.lse.size(); ++i) {
    const double error = std::fabs(double{found.lse[i]} - right.lse[i]);
    expect(error <= 1e-5 * (1.0 + std::fabs(right.lse[i])), "a log-sum-exp is wrong", error);
  }
}

inline uint64_t check_attention(uint64_t seed) {
  const bool large = seed % 16 == 0;
  context = {context.isa, seed, "attention", 1, ""};
  const TreeCase c = tree_case(seed, large);
  const Caches one(c, 2 * seed), other(c, 2 * seed + 1);
  const auto on = [](int threads) {
    return [=](const specens::AttentionParams& params) { specens::attention(params, threads); };
  };
  const Attended expected = one.run(c, false, on(1));
  check_attended(c, expected);
  for (int threads = 2; threads <= 4; ++threads) {
    context.threads = threads;
    expect(one.run(c, true, on(threads)) == expected, "it depends on the threads", threads);
  }
  expect(other.run(c, false, on(2)) == expected, "it depends on the layout", 0);
  Digest digest;
  // Sets that multiply bfloat16 in pairs add up in another order.
  if (c.dtype != DType::kBFloat16) {
    digest.add(expected.out);
    digest.add(expected.lse);
  }
  return digest.value();
}

// Rows of two slabs, moved, against a copy made before; the rest has to stay.
template <typename Move>
void check_moves(uint64_t seed, const Move& move) {
  context = {context.isa, seed, "compact", 1, ""};
  Random random(seed);
  const int64_t batch = 1 + random.below(3), depth = random.below(12);
  const int64_t nodes = 1 + random.below(60), room = 70 + nodes;
  const bool large = seed % 8 == 0;
  std::vector<int64_t> lengths;
  std::vector<int32_t> path(static_cast<size_t>(batch * depth), -1);
  for (int64_t b = 0; b < batch; ++b) {
    lengths.push_back(random.below(70));
    int64_t node = 0;
    for (int64_t i = 0; i < depth && !random.one_in(8); ++i) {
      node += 1 + (random.one_in(2) ? random.below(6) : 0);
      if (node > nodes) break;
      path[static_cast<size_t>(b * depth + i)] = static_cast<int32_t>(node);
    }
  }
  struct Layer {
    std::vector<char> bytes, expected;
  };
  std::vector<Layer> memory(2);
  specens::CompactParams params = {};
  params.pages.size = room;
  params.batch = batch;
  params.depth = depth;
  params.lengths = {lengths.data(), 1, 0, 0};
  params.path = {path.data(), depth, 1, 0};
  for (Layer& layer : memory) {
    const int64_t layers = large ? 40 : 1 + random.below(3), heads = 1 + random.below(3);
    const int64_t row = large ? 256 : 1 + random.below(40), gap = random.below(3);
    const int64_t rows = row + gap, head = room * rows, each = heads * head;
    layer.bytes.resize(static_cast<size_t>(layers * batch * each - gap));
    for (char& byte : layer.bytes) byte = static_cast<char>(random.next());
    layer.expected = layer.bytes;
    params.slabs.push_back(
        {layer.bytes.data(), layers, heads, row, batch * each, each, head, rows});
    for (int64_t place = 0; place < layers * batch * heads; ++place) {
      const int64_t b = place / heads % batch;
      for (int64_t i = 0; i < depth && path[static_cast<size_t>(b * depth + i)] >= 0; ++i) {
        const int64_t from = lengths[b] + path[static_cast<size_t>(b * depth + i)];
        std::copy_n(layer.bytes.begin() + place * head + from * rows, row,
                    layer.expected.begin() + place * head + (lengths[b] + 1 + i) * rows);
      }
    }
  }
  move(params);
  for (const Layer& layer : memory) {
    expect(layer.bytes == layer.expected, "not what was moved", 0);
  }
}

inline uint64_t check_compact(uint64_t seed) {
  check_moves(seed, [&](const specens::CompactParams& params) {
    context.threads = 1 + static_cast<int>(seed % 4);
    specens::compact(params, context.threads);
  });
  return 0;
}

}  // namespace native_tests
