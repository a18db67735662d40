// SPDX-License-Identifier: Apache-2.0
// The CPU kernels over random situations, for sanitizers: no torch, no Python. Every input ends
// with its last addressed element and starts where it likes. A situation is run with 1 to 4
// threads, in two layouts and on every instruction set of this machine, one process each: the bits
// must be equal. What `mix` says is the oracle of `sample` and `verify`; `mix` has a direct
// computation of its own. `test_kernels SEED` runs one situation. To cover one more parameter: a
// field of Situation, its line in `situation` and in `Inputs`.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "specens.h"

namespace {

using specens::DType;
using specens::Integers;
using specens::Logits;
using specens::RuleId;
using specens::Space;
using specens::Values;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kThreads = 4;
constexpr int32_t kUnwritten = -77;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Sizes around every block, sub-tile and tile; the last is large enough for four threads at one
// row.
constexpr int64_t kVocabularies[] = {2,    3,    17,   63,   64,   65,   1,    255,  1000, 70000,
                                     1023, 1024, 1025, 1087, 2048, 4097, 8191, 8192, 8193, 20000};
// A situation holds no more logits than this.
constexpr int64_t kLogits = 330000;
// Below this many logits there is nothing for more threads to do.
constexpr int64_t kWorthThreads = 40000;
constexpr int kTinyLaws = 200;

// --- what failed
// ----------------------------------------------------------------------------------

struct Context {
  const char* isa = "";
  uint64_t seed = 0;
  const char* op = "";
  int threads = 1;
  std::string about;
};

Context context;

[[noreturn]] void fail(const char* what, double got) {
  std::fprintf(stderr, "FAILED: %s: %s (got %.9g)\n  %s, %d thread(s), seed %llu%s\n", context.op,
               what, got, context.isa, context.threads,
               static_cast<unsigned long long>(context.seed), context.about.c_str());
  std::exit(1);
}

inline void expect(bool holds, const char* what, double got) {
  if (!holds) fail(what, got);
}

// --- random numbers
// -------------------------------------------------------------------------------

// SplitMix64.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % uint64_t(count)); }
  bool one_in(int count) { return below(count) == 0; }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  // Roughly normal.
  float normal() {
    const uint64_t bits = next();
    int sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<int>((bits >> shift) & 0xFFFF);
    return (static_cast<float>(sum) - 131070.0f) / 37837.0f;
  }
  template <typename T, size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[below(kCount)];
  }

 private:
  uint64_t state_;
};

// --- 16-bit floats
// --------------------------------------------------------------------------------

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Towards zero; a NaN stays one.
uint16_t to_bfloat16(float value) {
  return static_cast<uint16_t>(std::isnan(value) ? 0x7FC0 : bits_of(value) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  uint32_t half;
  if (std::isnan(value)) {
    half = 0x7E00;
  } else if (magnitude >= 65536.0f) {
    half = std::isinf(value) ? 0x7C00 : 0x7BFF;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<uint32_t>(magnitude * 0x1p24f);
  } else {
    half = ((bits & 0x7FFFFFFF) >> 13) - (112 << 10);
  }
  return static_cast<uint16_t>(sign | half);
}

float from_float16(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa != 0 ? kNan : kInf;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -value : value;
}

float rounded(float value, DType dtype) {
  if (dtype == DType::kBFloat16) return from_bfloat16(to_bfloat16(value));
  if (dtype == DType::kFloat16) return from_float16(to_float16(value));
  return value;
}

// --- situations: what is asked, not where it lies
// -------------------------------------------------

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
  RuleId rule;  // one that `Walk` knows the law of
  double lenience;
  Table<double> memory;  // (B,)
  Table<float> weights, temperature, top_p, min_p;
  Table<int32_t> top_k;
  Table<float> uniforms;  // (B, N + 1, 4)
  Table<int64_t> draft_tokens, proposers;
  bool wide_tokens, wide_proposers;
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
void fill_row(Random& random, DType dtype, float* row, int64_t size) {
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

Member make_member(Random& random, int64_t batch, int64_t rows, int64_t vocab_size) {
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

void set_weights(Random& random, Situation& s) {
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
int64_t invalid_id(Random& random, int64_t count, bool wide) {
  const int64_t narrow[] = {-2, count, count + 1, INT32_MIN, INT32_MAX};
  if (!wide || random.one_in(2)) return random.pick(narrow);
  return random.pick({int64_t{1} << 40, INT64_MIN, INT64_MAX, (int64_t{1} << 32) - 1});
}

void set_drafts(Random& random, Situation& s) {
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

// Values that no caller should give: what comes out is only required to be a token.
void make_hostile(Random& random, Situation& s) {
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

Situation situation(uint64_t seed) {
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
  s.memory = Table<double>(s.batch, 1, 1);
  for (double& memory : s.memory.values) memory = 3.0 * random.uniform();
  if (s.hostile) make_hostile(random, s);
  context.about = "; V " + std::to_string(s.vocab_size) + ", M " + std::to_string(members) +
                  ", B " + std::to_string(s.batch) + ", N " + std::to_string(s.nodes) +
                  (s.hostile ? ", hostile values" : "");
  return s;
}

// --- inputs: one layout of a situation
// ------------------------------------------------------------

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
    draft_ = s.draft.empty() ? Logits{} : logits(s.draft[0]);
    draft_temperature_ = values(s.draft_temperature);
    memory_ = values(s.memory);
    originals_ = buffers_;
  }

  const specens::Ensemble& ensemble() const { return ensemble_; }
  const Values<float>& uniforms() const { return uniforms_; }
  const Integers& draft_tokens() const { return draft_tokens_; }
  const Integers& proposers() const { return proposers_; }
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
  Logits draft_;
  Values<float> draft_temperature_;
  Values<double> memory_;
};

// --- outputs
// --------------------------------------------------------------------------------------

// Either of the exact size, for sanitizers, or with margins that must keep their filling.
template <typename T>
class Output {
 public:
  Output(int64_t size, T filling, bool margins)
      : filling_(filling),
        lead_(margins ? 3 : 0),
        size_(size),
        values_(static_cast<size_t>(size + (margins ? 8 : 0)), filling) {}

  T* data() { return values_.data() + lead_; }

  std::vector<T> take() const {
    for (size_t i = 0; i < values_.size(); ++i) {
      const bool inside = i >= lead_ && i < lead_ + size_;
      expect(inside || values_[i] == filling_, "a write outside the output", double(i));
    }
    return {values_.begin() + lead_, values_.begin() + lead_ + size_};
  }

 private:
  T filling_;
  size_t lead_;
  size_t size_;
  std::vector<T> values_;
};

// Differs from call to call, so that what is not written shows as a difference.
float unwritten() {
  static int calls = 0;
  return 1e6f + static_cast<float>(++calls % 1000);
}

template <typename T>
bool same(const std::vector<T>& one, const std::vector<T>& other) {
  return one.size() == other.size() &&
         (one.empty() || std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) == 0);
}

// Every NaN is the same to us.
std::vector<float> settled(std::vector<float> values) {
  for (float& value : values) value = std::isnan(value) ? kNan : value;
  return values;
}

// FNV-1a, by words.
class Digest {
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    for (const T value : values) {
      uint64_t bits = 0;
      std::memcpy(&bits, &value, sizeof(value));
      hash_ = (hash_ ^ bits) * 0x100000001B3u;
      hash_ ^= hash_ >> 29;
    }
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xCBF29CE484222325u;
};

struct Mixed {
  std::vector<float> log_probs;
  std::vector<int32_t> status;

  bool operator==(const Mixed& other) const {
    return same(log_probs, other.log_probs) && same(status, other.status);
  }
};

struct Sampled {
  std::vector<int64_t> tokens;
  std::vector<float> log_probs, lse;
  std::vector<int32_t> status;

  bool operator==(const Sampled& other) const {
    return same(tokens, other.tokens) && same(log_probs, other.log_probs) && same(lse, other.lse) &&
           same(status, other.status);
  }
};

struct Swept {
  std::vector<double> total;

  bool operator==(const Swept& other) const { return same(total, other.total); }
};

struct Verdict {
  std::vector<int64_t> tokens;
  std::vector<float> log_probs;
  std::vector<int32_t> num_accepted, path, status;

  bool operator==(const Verdict& other) const {
    return same(tokens, other.tokens) && same(log_probs, other.log_probs) &&
           same(num_accepted, other.num_accepted) && same(path, other.path) &&
           same(status, other.status);
  }
};

Mixed run_mix(const specens::Ensemble& ensemble, int64_t batch, int64_t rows, int threads,
              bool margins) {
  Output<float> log_probs(batch * rows * ensemble.vocab_size, unwritten(), margins);
  Output<int32_t> status(batch * rows, kUnwritten, margins);
  specens::mix({ensemble, batch, rows, log_probs.data(), status.data()}, threads);
  return {settled(log_probs.take()), status.take()};
}

Sampled run_sample(const Situation& s, const Inputs& inputs, int member, int threads,
                   bool margins) {
  const int64_t size = s.batch * s.rows;
  Output<int64_t> tokens(size, kUnwritten, margins);
  Output<float> log_probs(size, unwritten(), margins), lse(size, unwritten(), margins);
  Output<int32_t> status(size, kUnwritten, margins);
  specens::sample({inputs.ensemble(), member, s.batch, s.rows, inputs.uniforms(), tokens.data(),
                   log_probs.data(), lse.data(), status.data()},
                  threads);
  return {tokens.take(), settled(log_probs.take()), settled(lse.take()), status.take()};
}

// A rule and its parameters.
struct Asked {
  RuleId rule;
  double parameters[specens::kMaxParameters];
};

// Parameters of the rules that are not `Situation::rule`'s, which neither always nor never keep a
// draft.
Asked asked(RuleId rule, uint64_t seed) {
  const double top = static_cast<double>(seed % 4 * 3);
  switch (rule) {
    case RuleId::kTypical:
      return {rule, {0.05, 0.3}};
    case RuleId::kTopK:
      return {rule, {1.0 + top}};
    case RuleId::kLikelihood:
      return {rule, {2.0, 0.3}};
    case RuleId::kEntropyVeto:
      return {rule, {0.5, 0.5, 0.3, 1.0 + 7.0 * top}};
    default:
      return {rule, {0.3, top}};
  }
}

Verdict run_verify(const Situation& s, const Asked& asked, const Inputs& inputs, int threads,
                   bool margins) {
  Output<int64_t> tokens(s.batch * (s.nodes + 1), kUnwritten, margins);
  Output<float> log_probs(s.batch * (s.nodes + 1), unwritten(), margins);
  Output<int32_t> num_accepted(s.batch, kUnwritten, margins);
  Output<int32_t> path(s.batch * s.nodes, kUnwritten, margins);
  Output<int32_t> status(s.batch, kUnwritten, margins);
  specens::VerifyParams params = {};
  params.ensemble = inputs.ensemble();
  params.rule = asked.rule;
  std::copy_n(asked.parameters, specens::kMaxParameters, params.parameters);
  if (asked.rule == RuleId::kLikelihood) params.memory = inputs.memory();
  params.bonus = s.bonus;
  params.batch = s.batch;
  params.nodes = s.nodes;
  params.draft_tokens = inputs.draft_tokens();
  params.proposers = inputs.proposers();
  params.uniforms = inputs.uniforms();
  params.draft_logits = inputs.draft();
  params.draft_temperature = inputs.draft_temperature();
  params.tokens = tokens.data();
  params.log_probs = log_probs.data();
  params.num_accepted = num_accepted.data();
  params.path = path.data();
  params.status = status.data();
  specens::verify(params, threads);
  return {tokens.take(), settled(log_probs.take()), num_accepted.take(), path.take(),
          status.take()};
}

Swept run_floor_sweep(const Situation& s, const Inputs& inputs, int threads) {
  const specens::Ensemble& ensemble = inputs.ensemble();
  specens::FloorParams params = {{}, ensemble.num_members, s.batch, s.rows, s.vocab_size};
  std::copy_n(ensemble.members, ensemble.num_members, params.members);
  const double total = specens::floor_sweep(params, threads);
  return {{std::isnan(total) ? std::nan("") : total}};
}

// --- what must hold
// -------------------------------------------------------------------------------

bool close(double one, double other, double tolerance) {
  return one == other || std::fabs(one - other) <= tolerance * (1.0 + std::fabs(other));
}

// NaN and +inf among the logits of one row.
int32_t oddities(const Member& member, int64_t b, int64_t t) {
  int32_t status = 0;
  for (int64_t v = 0; v < member.logits.extents[2]; ++v) {
    const float value = member.logits.at(b, t, v);
    if (std::isnan(value)) status |= specens::kNanLogits;
    if (value == kInf) status |= specens::kInfiniteLogits;
  }
  return status;
}

void check_mix(const Situation& s, const Mixed& mixed) {
  for (int64_t place = 0; place < s.batch * s.rows; ++place) {
    const int64_t b = place / s.rows, t = place % s.rows;
    const float* row = &mixed.log_probs[place * s.vocab_size];
    const int32_t status = mixed.status[place];
    int32_t expected = 0;
    for (int64_t m = 0; m < s.num_members(); ++m) {
      if (s.weights.at(b, t, m) != 0.0f) expected |= oddities(s.members[m], b, t);
    }
    expect((status & ~specens::kEmptyLaw) == expected, "status", status);
    double sum = 0.0;
    for (int64_t v = 0; v < s.vocab_size; ++v) {
      expect(row[v] <= 1e-5f, "a log-probability above 0", row[v]);
      sum += std::exp(static_cast<double>(row[v]));
    }
    // Rounding to float moves a row's sum by 2^-24 x its entropy, and that is 11 nats at most.
    const bool empty = (status & specens::kEmptyLaw) != 0;
    expect(std::fabs(sum - (empty ? 0.0 : 1.0)) < 2e-6, "a row does not sum to 1", sum);
  }
}

// The error of a probability whose logarithm was rounded to float, relative to it.
double slack(double log_prob) { return 1e-5 + 1.2e-7 * std::min(std::fabs(log_prob), 1e3); }

// Whether one uniform, up to `error`, picks [first, last) out of [begin, end).
void check_pick(const std::vector<double>& mass, const std::vector<double>& scale, float number,
                int64_t begin, int64_t end, int64_t first, int64_t last) {
  double total = 0.0, before = 0.0, here = 0.0, error = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    total += mass[i];
    error += 1e-5 * scale[i];
    before += i < first ? mass[i] : 0.0;
    here += i >= first && i < last ? mass[i] : 0.0;
  }
  const double threshold = number * total;
  expect(before <= threshold + error, "drawn beyond the uniform", before - threshold);
  expect(before + here >= threshold - error, "drawn before the uniform", threshold - before - here);
}

// `scale` bounds what the rounding of `mass` is relative to.
void check_draw(const Situation& s, const std::vector<double>& mass,
                const std::vector<double>& scale, int64_t b, int64_t t, int64_t token) {
  const int64_t tile = token / specens::kTile * specens::kTile;
  const int64_t sub_tile = token / specens::kSubTile * specens::kSubTile;
  const int64_t tile_end = std::min<int64_t>(tile + specens::kTile, s.vocab_size);
  const int64_t sub_tile_end = std::min<int64_t>(sub_tile + specens::kSubTile, s.vocab_size);
  const auto number = [&](int64_t word) { return s.uniforms.at(b, t, word); };
  check_pick(mass, scale, number(1), 0, s.vocab_size, tile, tile_end);
  check_pick(mass, scale, number(2), tile, tile_end, sub_tile, sub_tile_end);
  check_pick(mass, scale, number(3), sub_tile, sub_tile_end, token, token + 1);
}

std::vector<double> exponentials(const float* row, int64_t size) {
  std::vector<double> result(static_cast<size_t>(size));
  std::transform(row, row + size, result.begin(), [](double x) { return std::exp(x); });
  return result;
}

void check_greedy(const Situation& s, const float* row, int64_t b, int64_t t, int64_t token) {
  const float best = *std::max_element(row, row + s.vocab_size);
  expect(close(row[token], best, 1e-6), "not the most probable token", double(token));
  if (s.num_members() != 1 || s.weights.at(b, t) != 1.0f) return;
  // Values that normalisation rounds to the same log-probability are tied; the first one wins.
  const auto value = [&](int64_t v) { return s.members[0].logits.at(b, t, v); };
  for (int64_t v = 0; v < token; ++v) {
    expect(!(value(v) >= value(token)), "not the first of the tied tokens", double(token));
  }
}

// The token that the whole law draws.
void check_drawn(const Situation& s, const float* row, bool empty, bool greedy, int64_t b,
                 int64_t t, int64_t token) {
  if (empty) {
    expect(token == 0, "an empty law emits token 0", double(token));
  } else if (greedy) {
    check_greedy(s, row, b, t, token);
  } else {
    expect(row[token] > -kInf, "a token without mass", double(token));
    const std::vector<double> mass = exponentials(row, s.vocab_size);
    check_draw(s, mass, mass, b, t, token);
  }
}

void check_tokens(const Situation& s, const std::vector<int64_t>& tokens, bool padded) {
  for (const int64_t token : tokens) {
    expect((0 <= token && token < s.vocab_size) || (padded && token == specens::kPadding),
           "not a token", double(token));
  }
}

// Against the law in `mixed`, which is that of greedy rows only for the ensemble.
void check_sample(const Situation& s, const Mixed& mixed, const Sampled& sampled, int member) {
  for (int64_t place = 0; place < s.batch * s.rows; ++place) {
    const int64_t b = place / s.rows, t = place % s.rows;
    if (member >= 0) {
      const int32_t status = sampled.status[place] & ~specens::kEmptyLaw;
      expect(status == oddities(s.members[member], b, t), "status", status);
      if (s.greedy(b)) continue;
    }
    const float* row = &mixed.log_probs[place * s.vocab_size];
    const int64_t token = sampled.tokens[place];
    const bool empty = (mixed.status[place] & specens::kEmptyLaw) != 0;
    expect(sampled.status[place] == mixed.status[place], "status", sampled.status[place]);
    expect(close(sampled.log_probs[place], row[token], 1e-6), "log-probability",
           sampled.log_probs[place]);
    // That of a law of very low logits may be -inf in single precision, too.
    const float lse = sampled.lse[place];
    expect(empty ? lse == -kInf : !std::isnan(lse), "log-sum-exp", lse);
    check_drawn(s, row, empty, s.greedy(b), b, t, token);
  }
}

// Laws of proposals: `mix` of one member, beside another of weight 0 that keeps the row from being
// greedy where the temperature is 0.
class Proposals {
 public:
  Proposals(const Situation& s, const Inputs& inputs) : s_(s), inputs_(inputs) {
    laws_.resize(s.members.size() + 1);
  }

  // Of a member; -1 is the separate draft.
  const Mixed& law(int64_t member) {
    Mixed& law = laws_[member + 1];
    if (!law.status.empty()) return law;
    specens::Ensemble ensemble = inputs_.ensemble();
    ensemble.num_members = 2;
    ensemble.members[0] = member < 0 ? inputs_.draft() : inputs_.ensemble().members[member];
    ensemble.members[1] = ensemble.members[0];
    ensemble.space = Space::kProbabilities;
    ensemble.warp_members = true;
    ensemble.plausibility = 0.0;
    const float weights[] = {1.0f, 0.0f};
    ensemble.weights = {weights, 0, 0, 1};
    std::vector<float> temperatures;
    for (int64_t b = 0; b < s_.batch; ++b) {
      temperatures.push_back(member < 0 ? s_.draft_temperature.at(b)
                                        : s_.temperature.at(b, 0, member));
      temperatures.push_back(1.0f);
    }
    ensemble.temperature = {temperatures.data(), 2, 0, 1};
    return law = run_mix(ensemble, s_.batch, rows(member), 1, false);
  }

  int64_t rows(int64_t member) const {
    return member < 0 ? s_.draft[0].logits.extents[1] : s_.rows;
  }

 private:
  const Situation& s_;
  const Inputs& inputs_;
  std::vector<Mixed> laws_;
};

double kept(const Situation& s, double target, double draft) {
  return s.rule == RuleId::kLenient ? std::min(target / s.lenience, draft)
                                    : std::min(target, draft);
}

// One batch row of `verify`, walked again beside the law that `mix` has given.
class Walk {
 public:
  Walk(const Situation& s, const Mixed& mixed, Proposals& proposals, const Verdict& verdict,
       int64_t b)
      : s_(s),
        mixed_(mixed),
        proposals_(proposals),
        verdict_(verdict),
        b_(b),
        greedy_(s.rule == RuleId::kGreedy || s.greedy(b)) {}

  void check() {
    const int64_t emitted = check_shape();
    if (s_.hostile) return;
    const int64_t accepted = verdict_.num_accepted[b_];
    const int64_t* tokens = &verdict_.tokens[b_ * (s_.nodes + 1)];
    const float* log_probs = &verdict_.log_probs[b_ * (s_.nodes + 1)];
    for (int64_t t = 0; t < emitted; ++t) step(t, tokens[t], log_probs[t], t < accepted);
    const int32_t status = verdict_.status[b_];
    expect((status & ~specens::kEmptyResidual) == status_, "status", status);
    expect(may_be_empty_ || (status & specens::kEmptyResidual) == 0, "empty residual", status);
  }

  // What holds for every rule; returns how many tokens were emitted.
  int64_t check_shape() const {
    const int64_t accepted = verdict_.num_accepted[b_];
    const int64_t* tokens = &verdict_.tokens[b_ * (s_.nodes + 1)];
    const float* log_probs = &verdict_.log_probs[b_ * (s_.nodes + 1)];
    expect(0 <= accepted && accepted <= s_.nodes, "num_accepted", double(accepted));
    int64_t emitted = accepted;
    if (has_child(accepted) || s_.bonus) ++emitted;
    for (int64_t i = 0; i <= s_.nodes; ++i) {
      expect((tokens[i] == specens::kPadding) == (i >= emitted), "padding of tokens",
             double(tokens[i]));
      if (i >= emitted) expect(log_probs[i] == 0.0f, "padding of log_probs", log_probs[i]);
      if (i == s_.nodes) break;
      const int32_t node = verdict_.path[b_ * s_.nodes + i];
      expect(node == (i < accepted ? i + 1 : specens::kPadding), "path", node);
      if (i >= accepted) continue;
      expect(tokens[i] == s_.draft_tokens.at(b_, i), "not the token accepted", double(tokens[i]));
    }
    return emitted;
  }

 private:
  bool has_child(int64_t t) const {
    return t < s_.nodes && s_.draft_tokens.at(b_, t) != specens::kPadding;
  }

  int64_t proposer(int64_t t) const {
    return s_.proposers.values.empty() ? specens::kPadding : s_.proposers.at(b_, t);
  }

  void step(int64_t t, int64_t token, float log_prob, bool accepted) {
    const int64_t place = b_ * s_.rows + t;
    const float* row = &mixed_.log_probs[place * s_.vocab_size];
    const bool empty = (mixed_.status[place] & specens::kEmptyLaw) != 0;
    status_ |= mixed_.status[place];
    expect(close(log_prob, row[token], 1e-6), "log-probability", log_prob);
    const int64_t child = has_child(t) ? s_.draft_tokens.at(b_, t) : specens::kPadding;
    const bool valid = 0 <= child && child < s_.vocab_size && specens::kPadding <= proposer(t) &&
                       proposer(t) < s_.num_members();
    if (has_child(t) && !valid) status_ |= specens::kInvalidDraft;
    expect(valid || !accepted, "an invalid draft was accepted", double(child));
    if (!valid) {
      check_drawn(s_, row, empty, greedy_, b_, t, token);
    } else if (greedy_) {
      expect(accepted == (!empty && token == child), "accepted", accepted);
      check_drawn(s_, row, empty, true, b_, t, token);
    } else {
      check_tried(t, row, empty, child, token, accepted);
    }
  }

  // A draft with a law or a point mass.
  void check_tried(int64_t t, const float* row, bool empty, int64_t child, int64_t token,
                   bool accepted) {
    const std::vector<double> mass = exponentials(row, s_.vocab_size);
    std::vector<double> draft(mass.size());
    double error = slack(row[child]);
    if (proposer(t) == specens::kPadding && s_.draft.empty()) {
      draft[child] = 1.0;
    } else {
      const Mixed& law = proposals_.law(proposer(t));
      const int64_t place = b_ * proposals_.rows(proposer(t)) + t;
      const float* log_probs = &law.log_probs[place * s_.vocab_size];
      draft = exponentials(log_probs, s_.vocab_size);
      error = std::max(error, slack(log_probs[child]));
      status_ |= law.status[place] & ~specens::kEmptyLaw;
    }
    const double coin = s_.uniforms.at(b_, t + 1, 0) * draft[child];
    const double enough = kept(s_, mass[child], draft[child]);
    const double least = error * std::max(coin, enough) + 1e-300;
    expect(accepted ? coin < enough + least : coin >= enough - least, "accepted", accepted);
    expect(!accepted || row[child] > -kInf, "a token without mass was accepted", double(child));
    if (accepted) return;
    double total = 0.0;
    std::vector<double> residual(mass.size()), scale(mass.size());
    for (size_t v = 0; v < mass.size(); ++v) {
      residual[v] = std::max(mass[v] - kept(s_, mass[v], draft[v]), 0.0);
      scale[v] = mass[v] + draft[v];
      total += residual[v];
    }
    if (empty) {
      expect(token == 0, "an empty law emits token 0", double(token));
    } else if (total > 1e-4) {
      check_draw(s_, residual, scale, b_, t, token);
    } else {
      may_be_empty_ = true;
    }
  }

  const Situation& s_;
  const Mixed& mixed_;
  Proposals& proposals_;
  const Verdict& verdict_;
  int64_t b_;
  bool greedy_;
  bool may_be_empty_ = false;
  int32_t status_ = 0;
};

void check_floor_sweep(const Situation& s, double total) {
  double expected = 0.0;
  for (const Member& member : s.members) {
    for (int64_t place = 0; place < s.batch * s.rows; ++place) {
      double top = -kInf, sum = 0.0;
      for (int64_t v = 0; v < s.vocab_size; ++v) {
        const float value = member.logits.at(place / s.rows, place % s.rows, v);
        if (!std::isfinite(value)) return;
        top = std::max<double>(top, value);
      }
      for (int64_t v = 0; v < s.vocab_size; ++v) {
        sum += std::exp(member.logits.at(place / s.rows, place % s.rows, v) - top);
      }
      expected += top + std::log(sum);
    }
  }
  expect(close(total, expected, 1e-6), "sum of log-sum-exps", total);
}

// --- one situation
// --------------------------------------------------------------------------------

// Runs an op in one layout with 1 thread, checks it, and again with more threads and in the other.
template <typename Run, typename Check>
auto repeat(const char* op, const Situation& s, const Inputs& one, const Inputs& other,
            const Run& run, const Check& check) {
  context.op = op;
  context.threads = 1;
  const auto expected = run(one, 1, false);
  check(expected);
  const bool large = s.batch * s.rows * s.num_members() * s.vocab_size > kWorthThreads;
  for (int threads = large ? 2 : kThreads; threads <= kThreads; ++threads) {
    context.threads = threads;
    expect(run(one, threads, threads % 2 == 0) == expected, "it depends on the threads", threads);
  }
  context.threads = 1 + static_cast<int>(context.seed % kThreads);
  expect(run(other, context.threads, true) == expected, "it depends on the layout", 0);
  return expected;
}

uint64_t run_situation(uint64_t seed) {
  context.seed = seed;
  const Situation s = situation(seed);
  const Inputs one(s, 2 * seed), other(s, 2 * seed + 1);
  Proposals proposals(s, one);
  Digest digest;
  const auto mix = [&](const Inputs& inputs, int threads, bool margins) {
    return run_mix(inputs.ensemble(), s.batch, s.rows, threads, margins);
  };
  const Mixed mixed = repeat("mix", s, one, other, mix, [&](const Mixed& result) {
    if (!s.hostile) check_mix(s, result);
  });
  digest.add(mixed.log_probs);
  digest.add(mixed.status);

  const int64_t alone = static_cast<int64_t>(seed) % s.num_members();
  for (const int64_t member : {int64_t{-1}, alone}) {
    const auto sample = [&](const Inputs& inputs, int threads, bool margins) {
      return run_sample(s, inputs, static_cast<int>(member), threads, margins);
    };
    const auto check = [&](const Sampled& result) {
      check_tokens(s, result.tokens, false);
      if (s.hostile) return;
      check_sample(s, member < 0 ? mixed : proposals.law(member), result, static_cast<int>(member));
    };
    const Sampled sampled = repeat("sample", s, one, other, sample, check);
    digest.add(sampled.tokens);
    digest.add(sampled.log_probs);
    digest.add(sampled.lse);
    digest.add(sampled.status);
  }

  const Asked known = {s.rule, {s.lenience}};
  const auto verify = [&](const Inputs& inputs, int threads, bool margins) {
    return run_verify(s, known, inputs, threads, margins);
  };
  const Verdict verdict = repeat("verify", s, one, other, verify, [&](const Verdict& result) {
    check_tokens(s, result.tokens, true);
    for (int64_t b = 0; b < s.batch; ++b) Walk(s, mixed, proposals, result, b).check();
  });
  digest.add(verdict.tokens);
  digest.add(verdict.log_probs);
  digest.add(verdict.num_accepted);
  digest.add(verdict.path);
  digest.add(verdict.status);

  // The rules take turns: each meets every size.
  for (uint64_t turn = 0; turn < 2; ++turn) {
    const auto& rule =
        specens::kRules[(seed / 20 + 7 * seed + 11 * turn) % std::size(specens::kRules)];
    const Asked chosen = asked(rule.id, seed);
    const auto verify_by = [&](const Inputs& inputs, int threads, bool margins) {
      return run_verify(s, chosen, inputs, threads, margins);
    };
    const Verdict found = repeat(rule.name, s, one, other, verify_by, [&](const Verdict& result) {
      check_tokens(s, result.tokens, true);
      for (int64_t b = 0; b < s.batch; ++b) Walk(s, mixed, proposals, result, b).check_shape();
    });
    digest.add(found.tokens);
    digest.add(found.log_probs);
    digest.add(found.num_accepted);
    digest.add(found.status);
  }

  const auto sweep = [&](const Inputs& inputs, int threads, bool) {
    return run_floor_sweep(s, inputs, threads);
  };
  const Swept swept = repeat("floor_sweep", s, one, other, sweep,
                             [&](const Swept& result) { check_floor_sweep(s, result.total[0]); });
  digest.add(swept.total);
  expect(one.untouched() && other.untouched(), "an input was written to", 0);
  return digest.value();
}

// --- fixed answers
// --------------------------------------------------------------------------------

// Vectors of Salmon et al. 2011 (kat_vectors of Random123).
uint64_t check_philox() {
  context.op = "uniforms";
  context.threads = 1;
  const struct {
    uint64_t seed, position;
    uint32_t stream, index, words[4];
  } cases[] = {
      {0, 0, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {~uint64_t{0},
       ~uint64_t{0},
       0xffffffff,
       0xffffffff,
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {0x299f31d0a4093822,
       0x85a308d3243f6a88,
       0x13198a2e,
       0x03707344,
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& known : cases) {
    const auto seed = static_cast<int64_t>(known.seed);
    const auto position = static_cast<int64_t>(known.position);
    Output<float> out(4, unwritten(), false);
    specens::uniforms(
        {{&seed, 0, 0, 0}, {&position, 0, 0, 0}, known.stream, known.index, 1, 1, out.data()});
    for (int i = 0; i < 4; ++i) {
      const float expected = static_cast<float>(known.words[i] >> 8) * 0x1p-24f;
      expect(out.data()[i] == expected, "a known answer of Philox", out.data()[i]);
    }
  }
  return 0;
}

// The same blocks from any layout, and block by block.
uint64_t check_uniforms(uint64_t seed) {
  context = {context.isa, seed, "uniforms", 1, ""};
  Random random(seed);
  const int64_t batch = random.below(4), rows = random.below(5);
  const auto word = [&] { return static_cast<int64_t>(random.next()); };
  Table<int64_t> seeds(batch, 1, 1);
  for (int64_t& value : seeds.values) value = word();
  const Table<int64_t> positions = table<int64_t>(random, batch, rows, 1, word);
  const auto stream = static_cast<uint32_t>(word()), index = static_cast<uint32_t>(word());
  Inputs inputs({}, seed);
  Output<float> out(batch * rows * 4, unwritten(), seed % 2 == 0);
  specens::uniforms(
      {inputs.values(seeds), inputs.values(positions), stream, index, batch, rows, out.data()});
  const std::vector<float> numbers = out.take();
  for (int64_t place = 0; place < batch * rows; ++place) {
    const int64_t key = seeds.at(place / rows), position = positions.at(place / rows, place % rows);
    std::vector<float> block(4);
    specens::uniforms({{&key, 0, 0, 0}, {&position, 0, 0, 0}, stream, index, 1, 1, block.data()});
    const float* found = &numbers[place * 4];
    expect(std::equal(block.begin(), block.end(), found), "it depends on the layout", found[0]);
    for (const float number : block) expect(number >= 0 && number < 1, "not in [0, 1)", number);
  }
  Digest digest;
  digest.add(numbers);
  return digest.value();
}

// Laws small enough for a direct computation: softmax, fold, softmax, inverse CDF.
uint64_t check_tiny_law(uint64_t seed) {
  Random random(seed);
  Situation s = {};
  s.vocab_size = random.pick({2, 3, 17});
  s.batch = s.rows = 1;
  s.space = random.pick({Space::kProbabilities, Space::kLogits});
  s.warp_members = true;
  const int64_t members = 1 + random.below(3), size = s.vocab_size;
  const bool mixture = s.space == Space::kProbabilities;
  std::vector<double> folded(static_cast<size_t>(size));
  s.weights = s.temperature = {1, 1, members};
  for (int64_t m = 0; m < members; ++m) {
    Member member;
    member.dtype = random.pick({DType::kBFloat16, DType::kFloat16, DType::kFloat32});
    member.logits = {1, 1, size};
    for (float& value : member.logits.values) value = rounded(3 * random.normal(), member.dtype);
    // Thirds would not sum to 1 in single precision.
    const float weight = mixture ? (m + 1 < members ? 0.25f : 1.25f - 0.25f * float(members))
                                 : 2 * random.uniform() - 0.5f;
    const float temperature = 0.25f + random.uniform();
    s.weights.values[m] = weight;
    s.temperature.values[m] = temperature;
    double sum = 0.0;
    for (const float value : member.logits.values) sum += std::exp(double{value} / temperature);
    for (int64_t v = 0; v < size; ++v) {
      const double score = double{member.logits.values[v]} / temperature;
      folded[v] += weight * (mixture ? std::exp(score) / sum : score);
    }
    s.members.push_back(member);
  }
  double total = 0.0;
  for (double& score : folded) total += score = mixture ? score : std::exp(score);
  s.uniforms = {1, 1, 4};
  for (float& number : s.uniforms.values) number = random.uniform();

  context = {context.isa, seed, "mix of a tiny law", 1, ""};
  const Inputs inputs(s, seed);
  const Mixed mixed = run_mix(inputs.ensemble(), 1, 1, 1, false);
  for (int64_t v = 0; v < size; ++v) {
    const double expected = std::log(folded[v] / total);
    expect(close(mixed.log_probs[v], expected, 1e-6), "not the direct law", mixed.log_probs[v]);
  }
  context.op = "sample of a tiny law";
  const Sampled sampled = run_sample(s, inputs, -1, 1, false);
  expect(close(sampled.lse[0], std::log(total), 1e-6), "log-sum-exp", sampled.lse[0]);
  double before = 0.0;
  for (int64_t v = 0; v < sampled.tokens[0]; ++v) before += folded[v];
  const double number = s.uniforms.values[3] * total, rounding = 1e-12 * total;
  const double through = before + folded[sampled.tokens[0]];
  expect(before - rounding <= number && number < through + rounding, "not the direct draw",
         double(sampled.tokens[0]));
  Digest digest;
  digest.add(mixed.log_probs);
  digest.add(sampled.tokens);
  return digest.value();
}

// --- instruction sets
// -----------------------------------------------------------------------------

struct Step {
  uint64_t (*run)(uint64_t seed);
  uint64_t seed;
};

// Situations of one size. Up to a tile there is hardly anything for a second thread.
int repeats(int64_t vocab_size) {
  if (kThreadSanitizer) return vocab_size > specens::kTile ? 4 : 0;
  return vocab_size <= 2048 ? 20 : 7;
}

std::vector<Step> steps(uint64_t only) {
  if (only != 0) return {{run_situation, only}};
  std::vector<Step> all = {{[](uint64_t) { return check_philox(); }, 1}};
  for (uint64_t seed = 1; seed <= 50; ++seed) all.push_back({check_uniforms, seed});
  for (uint64_t seed = 1; seed <= kTinyLaws; ++seed) all.push_back({check_tiny_law, seed});
  for (size_t i = 0; i < std::size(kVocabularies); ++i) {
    for (int k = 0; k < repeats(kVocabularies[i]); ++k) {
      all.push_back({run_situation, (k + 1) * std::size(kVocabularies) + i});
    }
  }
  return all;
}

// The names that the kernels list when they are asked for one that does not exist.
std::vector<std::string> instruction_sets() {
  setenv("SPECENS_CPU_ISA", "none such", 1);
  std::string message;
  try {
    specens::cpu_isa();
  } catch (const std::runtime_error& error) {
    message = error.what();
  }
  const std::string before = "expected one of ", after = " on this machine";
  const size_t begin = message.find(before), end = message.find(after);
  std::vector<std::string> names;
  context.op = "cpu_isa";
  expect(begin != std::string::npos && end != std::string::npos, "no list of names", 0);
  const size_t first = begin + before.size();
  std::string rest = message.substr(first, end - first) + ", ";
  for (size_t comma; (comma = rest.find(", ")) != std::string::npos; rest.erase(0, comma + 2)) {
    names.push_back(rest.substr(0, comma));
  }
  return names;
}

// A process of its own, because the choice of kernels is made once. Returns a digest for each step.
std::vector<uint64_t> run_on(const std::string& isa, const std::vector<Step>& all) {
  std::FILE* file = std::tmpfile();
  expect(file != nullptr, "no temporary file", 0);
  setenv("SPECENS_CPU_ISA", isa.c_str(), 1);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    // Something that never ends is a failure, too.
    alarm(600);
    context.isa = specens::cpu_isa();
    expect(isa == context.isa, "not the instruction set that was asked for", 0);
    for (const Step& step : all) {
      const uint64_t digest = step.run(step.seed);
      std::fwrite(&digest, sizeof(digest), 1, file);
      std::fflush(file);
    }
    std::exit(0);
  }
  int status = -1;
  expect(child > 0 && waitpid(child, &status, 0) == child, "no child process", child);
  std::rewind(file);
  std::vector<uint64_t> digests(all.size());
  const size_t done = std::fread(digests.data(), sizeof(uint64_t), all.size(), file);
  std::fclose(file);
  if (status != 0 || done != all.size()) {
    if (done < all.size() && all[done].run == run_situation) situation(all[done].seed);
    std::fprintf(stderr, "FAILED: %s ended with status %d after %zu of %zu steps, seed %llu%s\n",
                 isa.c_str(), status, done, all.size(),
                 static_cast<unsigned long long>(done < all.size() ? all[done].seed : 0),
                 context.about.c_str());
    std::exit(1);
  }
  return digests;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t only = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const std::vector<Step> all = steps(only);
  const std::vector<std::string> names = instruction_sets();
  std::vector<uint64_t> expected;
  for (const std::string& isa : names) {
    const std::vector<uint64_t> digests = run_on(isa, all);
    if (expected.empty()) expected = digests;
    for (size_t i = 0; i < all.size(); ++i) {
      if (digests[i] == expected[i]) continue;
      std::fprintf(stderr, "FAILED: %s and %s give other bits, step %zu, seed %llu\n", isa.c_str(),
                   names[0].c_str(), i, static_cast<unsigned long long>(all[i].seed));
      return 1;
    }
    std::printf("%s: %zu passed\n", isa.c_str(), all.size());
  }
  std::printf("%zu passed, 0 failed\n", names.size() * all.size());
  return 0;
}
