// SPDX-License-Identifier: Apache-2.0
// Runs the ops; what they write, and nothing beside it, is taken for comparison.
#pragma once

#include "inputs.h"

namespace native_tests {

constexpr int32_t kUnwritten = -77;

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
inline float unwritten() {
  static int calls = 0;
  return 1e6f + static_cast<float>(++calls % 1000);
}

template <typename T>
bool same(const std::vector<T>& one, const std::vector<T>& other) {
  return one.size() == other.size() &&
         (one.empty() || std::memcmp(one.data(), other.data(), one.size() * sizeof(T)) == 0);
}

// Every NaN is the same to us.
inline std::vector<float> settled(std::vector<float> values) {
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

inline Mixed run_mix(const specens::Ensemble& ensemble, int64_t batch, int64_t rows, int threads,
                     bool margins) {
  Output<float> log_probs(batch * rows * ensemble.vocab_size, unwritten(), margins);
  Output<int32_t> status(batch * rows, kUnwritten, margins);
  specens::mix({ensemble, batch, rows, log_probs.data(), status.data()}, threads);
  return {settled(log_probs.take()), status.take()};
}

inline Sampled run_sample(const Situation& s, const Inputs& inputs, int member, int threads,
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

// Each row draws with the blocks of all rows of its sequence.
inline Sampled run_sample_several(const Situation& s, const Inputs& inputs, int threads,
                                  bool margins) {
  const int64_t count = s.nodes + 1, rows = s.batch * s.rows;
  Output<int64_t> tokens(rows * count, kUnwritten, margins);
  Output<float> log_probs(rows * count, unwritten(), margins), lse(rows, unwritten(), margins);
  Output<int32_t> status(rows, kUnwritten, margins);
  Values<float> numbers = inputs.uniforms();
  const int64_t block_stride = numbers.row_stride;
  numbers.row_stride = 0;
  specens::sample({inputs.ensemble(), -1, s.batch, s.rows, numbers, tokens.data(), log_probs.data(),
                   lse.data(), status.data(), count, block_stride},
                  threads);
  return {tokens.take(), settled(log_probs.take()), settled(lse.take()), status.take()};
}

// A rule and its parameters.
struct Asked {
  RuleId rule;
  double parameters[specens::kMaxParameters];
  bool tree = false;         // the situation's, else a chain
  bool independent = false;  // its siblings are
};

// Parameters of the rules that are not `Situation::rule`'s, which neither always nor never keep a
// draft.
inline Asked asked(RuleId rule, uint64_t seed) {
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

inline Verdict run_verify(const Situation& s, const Asked& asked, const Inputs& inputs, int threads,
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
  if (asked.tree) params.parents = inputs.parents();
  params.independent = asked.independent;
  params.without = s.without && !asked.independent;
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

inline Swept run_floor_sweep(const Situation& s, const Inputs& inputs, int threads) {
  const specens::Ensemble& ensemble = inputs.ensemble();
  specens::FloorParams params = {{}, ensemble.num_members, s.batch, s.rows, s.vocab_size};
  std::copy_n(ensemble.members, ensemble.num_members, params.members);
  const double total = specens::floor_sweep(params, threads);
  return {{std::isnan(total) ? std::nan("") : total}};
}

}  // namespace native_tests
