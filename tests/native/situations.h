// SPDX-License-Identifier: Apache-2.0
// What is asked of the ops, not where it lies. To cover one more parameter: a field of Situation,
// its line in `situation`.
#pragma once

#include <algorithm>
#include <iterator>
#include <vector>

#include "chance.h"

namespace native_tests {

using specens::RuleId;
using specens::Space;

// Sizes around every block, sub-tile and tile; the last is large enough for four threads at one
// row.
constexpr int64_t kVocabularies[] = {2,    3,    17,   63,   64,   65,   1,    255,  1000, 70000,
                                     1023, 1024, 1025, 1087, 2048, 4097, 8191, 8192, 8193, 20000};
// A situation holds no more logits than this.
constexpr int64_t kLogits = 330000;

// (B or 1, T or 1, M or 1); no values: off.
template <typename T>
struct Table {
  int64_t extents[3] = {0, 0, 0};
  std::vector<T> values;

  Table() = default;
  Table(int64_t batch, int64_t rows, int64_t members)
      : extents{batch, rows, members}, values(static_cast<size_t>(batch * rows * members)) {}

  T at(int64_t batch, int64_t row = 0, int64_t member = 0) const {
    const int64_t b = extents[0] == 1 ? 0 : batch;
    const int64_t t = extents[1] == 1 ? 0 : row;
    const int64_t m = extents[2] == 1 ? 0 : member;
    return values[static_cast<size_t>((b * extents[1] + t) * extents[2] + m)];
  }
};

// Logits (B or 1, T, V).
struct Member {
  DType dtype = DType::kFloat32;
  Table<float> logits;
};

struct Situation {
  int64_t vocab_size, batch, nodes, rows;
  bool bonus, hostile;
  std::vector<Member> members;
  Space space;
  bool warp_members;
  double plausibility;
  RuleId rule;  // one that `ChainCheck` knows the law of
  double lenience;
  Table<double> memory;  // (B,)
  Table<float> weights, temperature, top_p, min_p;
  Table<int32_t> top_k;
  Table<float> uniforms;  // (B, N + 1, 4)
  Table<int64_t> draft_tokens, proposers;
  Table<int64_t> parents;  // (B, N + 1)
  bool wide_tokens, wide_proposers, wide_parents;
  bool without;               // siblings of one proposer are drawn without replacement
  std::vector<Member> draft;  // one, or none
  Table<float> draft_temperature;

  int64_t num_members() const { return static_cast<int64_t>(members.size()); }
  bool greedy(int64_t b) const {
    for (int64_t m = 0; m < num_members(); ++m) {
      if (temperature.at(b, 0, m) > 0.0f) return false;
    }
    return true;
  }
};

// One row of logits of a random kind; about half the rows are healthy.
inline void fill_row(Random& random, DType dtype, float* row, int64_t size) {
  const float scale = random.pick({0.01f, 1.0f, 1.0f, 4.0f, 20.0f, 200.0f});
  for (int64_t i = 0; i < size; ++i) row[i] = scale * random.normal();
  const auto sprinkle = [&](float value, int64_t count) {
    for (int64_t i = 0; i < count; ++i) row[random.below(size)] = value;
  };
  const float largest = dtype == DType::kFloat16 ? 65504.0f : 3e38f;
  switch (random.below(24)) {
    case 0:
      sprinkle(-kInf, size);
      break;
    case 1:
      sprinkle(kNan, 1 + size / 16);
      break;
    case 2:
      sprinkle(kInf, 1 + random.below(3));
      break;
    case 3:
      std::fill_n(row, size, -kInf);
      break;
    case 4:
      std::fill_n(row, size, kNan);
      break;
    case 5:
      std::fill_n(row, size, scale);
      break;
    case 6:
      std::fill_n(row, size, -kInf);
      sprinkle(1.5f, 1);
      break;
    case 7:
      for (const float value : {largest, -largest, 1e-40f, -0.0f}) sprinkle(value, 1);
      break;
    case 8:
      for (const float value : {kNan, kInf, -kInf}) sprinkle(value, 1 + size / 8);
      break;
    case 9:
      row[random.one_in(2) ? 0 : size - 1] = random.pick({kNan, kInf, -kInf, largest});
      break;
    case 10:
      for (int64_t i = 0; i < size; ++i) row[i] = std::floor(row[i]);
      break;
    case 11:
      std::fill_n(row, size, kInf);
      break;
    case 12:
      sprinkle(-largest, 1 + size / 4);
      break;
    default:
      break;
  }
  for (int64_t i = 0; i < size; ++i) row[i] = rounded(row[i], dtype);
}

inline Member make_member(Random& random, int64_t batch, int64_t rows, int64_t vocab_size) {
  Member member;
  member.dtype = random.pick({DType::kBFloat16, DType::kFloat16, DType::kFloat32});
  member.logits = {random.one_in(8) ? 1 : batch, rows, vocab_size};
  float* row = member.logits.values.data();
  for (int64_t i = 0; i < member.logits.extents[0] * rows; ++i, row += vocab_size) {
    fill_row(random, member.dtype, row, vocab_size);
  }
  return member;
}

template <typename T, typename Draw>
Table<T> table(Random& random, int64_t batch, int64_t rows, int64_t members, const Draw& draw) {
  Table<T> result(random.one_in(2) ? 1 : batch, rows, members);
  for (T& value : result.values) value = draw();
  return result;
}

inline void set_weights(Random& random, Situation& s) {
  const int64_t members = s.num_members();
  const int64_t forms[][2] = {{1, 1}, {s.batch, 1}, {s.batch, s.rows}};
  const auto& form = forms[random.below(3)];
  s.weights = {form[0], form[1], members};
  const bool mixture = s.space == Space::kProbabilities;
  for (size_t first = 0; first < s.weights.values.size(); first += members) {
    float* weights = &s.weights.values[first];
    const int64_t kind = random.below(8);
    float sum = 0.0f;
    for (int64_t m = 0; m < members; ++m) {
      weights[m] = mixture ? 0.01f + random.uniform() : 3.5f * random.uniform() - 1.5f;
      if (kind == 0) weights[m] = random.one_in(2) ? 0.0f : weights[m];
      sum += weights[m];
    }
    if (mixture && sum > 0.0f) {
      for (int64_t m = 0; m < members; ++m) weights[m] /= sum;
    }
    if (kind == 1 || (members == 1 && kind < 5)) {
      std::fill_n(weights, members, 0.0f);
      weights[random.below(members)] = 1.0f;
    }
  }
}

// Neither an id below `count` nor the padding.
inline int64_t invalid_id(Random& random, int64_t count, bool wide) {
  const int64_t narrow[] = {-2, count, count + 1, INT32_MIN, INT32_MAX};
  if (!wide || random.one_in(2)) return random.pick(narrow);
  return random.pick({int64_t{1} << 40, INT64_MIN, INT64_MAX, (int64_t{1} << 32) - 1});
}

inline void set_drafts(Random& random, Situation& s) {
  s.draft_tokens = {s.batch, s.nodes, 1};
  s.wide_tokens = random.one_in(2);
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t i = 0; i < s.nodes; ++i) {
      int64_t token = random.below(s.vocab_size);
      const int64_t kind = random.below(16);
      if (kind < 8) {
        // Likely drafts, or nothing would be accepted.
        const Member& member = s.members[random.below(s.num_members())];
        float best = -kInf;
        for (int64_t v = 0; v < s.vocab_size; ++v) {
          const float value = member.logits.at(b, i, v);
          if (value > best) best = value, token = v;
        }
      } else if (kind == 8) {
        token = random.one_in(2) ? 0 : s.vocab_size - 1;
      } else if (kind == 9) {
        token = invalid_id(random, s.vocab_size, s.wide_tokens);
      } else if (kind == 10) {
        token = specens::kPadding;
      }
      s.draft_tokens.values[b * s.nodes + i] = token;
    }
  }
  const int64_t kind = random.below(4);
  s.wide_proposers = random.one_in(2);
  if (kind == 0) {
    s.draft = {make_member(random, s.batch, s.nodes + random.below(2), s.vocab_size)};
  } else if (kind < 3) {
    s.proposers = table<int64_t>(random, s.batch, s.nodes, 1, [&]() -> int64_t {
      return random.one_in(16) ? invalid_id(random, s.num_members(), s.wide_proposers)
                               : random.below(s.num_members() + 1) - 1;
    });
  }
  s.draft_temperature = table<float>(
      random, s.batch, 1, 1, [&] { return random.pick({1.0f, 0.7f, 1.0f, 2.0f, 0.0f, kNan}); });
}

// From chains to stars, in which a node may hang nowhere.
inline void set_parents(Random& random, Situation& s) {
  s.wide_parents = random.one_in(2);
  s.without = random.one_in(2);
  s.parents = {s.batch, s.nodes + 1, 1};
  const int64_t span = random.pick({int64_t{1}, int64_t{2}, s.nodes + 1});
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t node = 0; node <= s.nodes; ++node) {
      int64_t parent = node - 1 - random.below(std::min(span, node + 1));
      if (node == 0 || parent < 0) parent = node == 0 ? -1 : 0;
      if (random.one_in(40)) parent = invalid_id(random, s.nodes + 1, s.wide_parents);
      s.parents.values[b * (s.nodes + 1) + node] = parent;
    }
  }
}

// Values that no caller should give: what comes out is only required to be a token.
inline void make_hostile(Random& random, Situation& s) {
  const float odd[] = {kNan, kInf, -kInf, -1.0f, 1.0f, 2.0f, 3e38f, -3e38f, 1e-45f};
  const auto spoil = [&](Table<float>& values) {
    if (random.one_in(2)) return;
    for (float& value : values.values) value = random.one_in(2) ? random.pick(odd) : value;
  };
  spoil(s.weights);
  spoil(s.temperature);
  spoil(s.top_p);
  spoil(s.min_p);
  spoil(s.uniforms);
  spoil(s.draft_temperature);
}

inline Situation situation(uint64_t seed) {
  Random random(seed);
  Situation s;
  s.vocab_size = kVocabularies[seed % std::size(kVocabularies)];
  const bool many = s.vocab_size < specens::kTile && random.one_in(16);
  const int64_t members = many ? specens::kMaxMembers : 1 + random.below(4);
  s.batch = 1 + random.below(3);
  s.nodes = random.pick({0, 1, 2, 3, 3, 5});
  if (s.vocab_size > specens::kTile) {
    // One row at a time, which whole teams share, or one row for each thread.
    s.batch = 4 * members * s.vocab_size <= kLogits ? random.pick({1, 4}) : 1;
    const int64_t affordable = kLogits / (s.batch * members * s.vocab_size) - 1;
    s.nodes = std::clamp<int64_t>(affordable, 0, 5);
  }
  if (random.one_in(40)) s.batch = 0;
  s.bonus = !random.one_in(4);
  s.rows = s.nodes + (s.bonus ? 1 : 0);
  s.hostile = random.one_in(8);
  for (int64_t m = 0; m < members; ++m) {
    s.members.push_back(make_member(random, s.batch, s.rows, s.vocab_size));
  }
  s.space = random.pick({Space::kProbabilities, Space::kLogits});
  s.warp_members = !random.one_in(3);
  const bool product = s.space == Space::kLogits;
  s.plausibility = product && random.one_in(3) ? random.pick({0.1, 0.5, 1.0}) : 0.0;
  set_weights(random, s);
  const bool all_greedy = random.one_in(6);
  s.temperature = table<float>(
      random, s.batch, 1, s.warp_members && random.one_in(2) ? members : 1, [&]() -> float {
        return all_greedy ? 0.0f : random.pick({1.0f, 1.0f, 0.7f, 0.3f, 5.0f, 0.0f, kNan});
      });
  if (random.one_in(3)) {
    const int32_t size = static_cast<int32_t>(s.vocab_size);
    const int32_t counts[] = {0, 1, 2, 5, 50, size - 1, size, size + 7, INT32_MAX, -3};
    s.top_k = table<int32_t>(random, s.batch, 1, 1, [&] { return random.pick(counts); });
  }
  if (random.one_in(3)) {
    s.top_p = table<float>(random, s.batch, 1, 1,
                           [&] { return random.pick({1.0f, 0.95f, 0.5f, 1e-6f, 0.99999f, 0.0f}); });
  }
  if (random.one_in(3)) {
    s.min_p = table<float>(random, s.batch, 1, 1,
                           [&] { return random.pick({0.0f, 0.05f, 0.5f, 1e-6f, 1.0f}); });
  }
  s.rule = random.pick({RuleId::kRejection, RuleId::kLenient, RuleId::kGreedy});
  s.lenience = random.pick({1.0, 0.5, 0.01});
  s.uniforms = Table<float>(s.batch, s.nodes + 1, 4);
  for (float& number : s.uniforms.values) {
    number = random.one_in(8) ? random.pick({0.0f, 1.0f - 0x1p-24f}) : random.uniform();
  }
  if (!random.one_in(3)) {
    // Low coins, or chains would hardly get anywhere.
    for (size_t i = 0; i < s.uniforms.values.size(); i += 4) s.uniforms.values[i] *= 0.01f;
  }
  set_drafts(random, s);
  set_parents(random, s);
  s.memory = Table<double>(s.batch, 1, 1);
  for (double& memory : s.memory.values) memory = 3.0 * random.uniform();
  if (s.hostile) make_hostile(random, s);
  context.about = "; V " + std::to_string(s.vocab_size) + ", M " + std::to_string(members) +
                  ", B " + std::to_string(s.batch) + ", N " + std::to_string(s.nodes) +
                  (s.hostile ? ", hostile values" : "");
  return s;
}

}  // namespace native_tests
