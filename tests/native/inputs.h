// SPDX-License-Identifier: Apache-2.0
// One layout of a situation. To cover one more parameter: its line in `Inputs`.
#pragma once

#include "situations.h"

namespace native_tests {

using specens::Integers;
using specens::Logits;
using specens::Values;

template <typename T>
struct Placed {
  const T* data;
  int64_t strides[3];
};

// Owns buffers whose last byte belongs to the last addressed element.
class Inputs {
 public:
  Inputs(const Situation& s, uint64_t seed)
      : random_(seed), filler_(random_.one_in(2) ? 255 : 127) {
    ensemble_.num_members = static_cast<int>(s.members.size());
    for (int m = 0; m < ensemble_.num_members; ++m) ensemble_.members[m] = logits(s.members[m]);
    ensemble_.space = s.space;
    ensemble_.warp_members = s.warp_members;
    ensemble_.plausibility = s.plausibility;
    ensemble_.vocab_size = s.vocab_size;
    ensemble_.weights = values(s.weights);
    ensemble_.temperature = values(s.temperature);
    ensemble_.top_k = values(s.top_k);
    ensemble_.top_p = values(s.top_p);
    ensemble_.min_p = values(s.min_p);
    uniforms_ = values(s.uniforms);
    draft_tokens_ = integers(s.draft_tokens, s.wide_tokens);
    proposers_ = integers(s.proposers, s.wide_proposers);
    parents_ = integers(s.parents, s.wide_parents);
    draft_ = s.draft.empty() ? Logits{} : logits(s.draft[0]);
    draft_temperature_ = values(s.draft_temperature);
    memory_ = values(s.memory);
    originals_ = buffers_;
  }

  const specens::Ensemble& ensemble() const { return ensemble_; }
  const Values<float>& uniforms() const { return uniforms_; }
  const Integers& draft_tokens() const { return draft_tokens_; }
  const Integers& proposers() const { return proposers_; }
  const Integers& parents() const { return parents_; }
  const Logits& draft() const { return draft_; }
  const Values<float>& draft_temperature() const { return draft_temperature_; }
  const Values<double>& memory() const { return memory_; }
  bool untouched() const { return buffers_ == originals_; }

  template <typename T>
  Values<T> values(const Table<T>& table) {
    const auto placed = place(table.values, table.extents, false);
    return {placed.data, placed.strides[0], placed.strides[1], placed.strides[2]};
  }

 private:
  Logits logits(const Member& member) {
    const auto as = [&](const auto& placed) -> Logits {
      return {placed.data, member.dtype, placed.strides[0], placed.strides[1]};
    };
    const Table<float>& table = member.logits;
    if (member.dtype == DType::kFloat32) return as(place(table.values, table.extents, true));
    std::vector<uint16_t> halves(table.values.size());
    std::transform(table.values.begin(), table.values.end(), halves.begin(),
                   member.dtype == DType::kBFloat16 ? to_bfloat16 : to_float16);
    return as(place(halves, table.extents, true));
  }

  Integers integers(const Table<int64_t>& table, bool wide) {
    const auto as = [&](const auto& placed) -> Integers {
      return {placed.data, wide, placed.strides[0], placed.strides[1]};
    };
    if (wide) return as(place(table.values, table.extents, false));
    return as(place(std::vector<int32_t>(table.values.begin(), table.values.end()), table.extents,
                    false));
  }

  // Dimensions in any order, gaps between them, and a start that is aligned to T and no further.
  template <typename T>
  Placed<T> place(const std::vector<T>& values, const int64_t (&extents)[3], bool whole_rows) {
    Placed<T> placed = {nullptr, {0, 0, 0}};
    if (values.empty()) return placed;
    int order[] = {2, 1, 0};
    std::swap(order[1], order[random_.one_in(2) ? 1 : 2]);
    if (!whole_rows) std::swap(order[0], order[random_.below(3)]);
    const bool gaps = !random_.one_in(3);
    int64_t step = gaps && !whole_rows ? 1 + random_.below(2) : 1;
    int64_t last = 0;
    for (const int dim : order) {
      placed.strides[dim] = extents[dim] == 1 ? 0 : step;
      last += (extents[dim] - 1) * placed.strides[dim];
      step = step * extents[dim] + (gaps ? random_.below(9) : 0);
    }
    const int64_t lead = random_.pick({0, 1, 3});
    buffers_.emplace_back((lead + last + 1) * sizeof(T), filler_);
    unsigned char* data = buffers_.back().data() + lead * sizeof(T);
    const T* value = values.data();
    for (int64_t b = 0; b < extents[0]; ++b) {
      for (int64_t t = 0; t < extents[1]; ++t) {
        for (int64_t m = 0; m < extents[2]; ++m, ++value) {
          const int64_t offset =
              b * placed.strides[0] + t * placed.strides[1] + m * placed.strides[2];
          std::memcpy(data + offset * sizeof(T), value, sizeof(T));
        }
      }
    }
    placed.data = reinterpret_cast<const T*>(data);
    return placed;
  }

  Random random_;
  unsigned char filler_;  // 255s are a NaN, 127s a NaN or a very large number
  std::vector<std::vector<unsigned char>> buffers_;
  std::vector<std::vector<unsigned char>> originals_;
  specens::Ensemble ensemble_ = {};
  Values<float> uniforms_;
  Integers draft_tokens_;
  Integers proposers_;
  Integers parents_;
  Logits draft_;
  Values<float> draft_temperature_;
  Values<double> memory_;
};

}  // namespace native_tests
