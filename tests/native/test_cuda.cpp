// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels on the emulator, for sanitizers: no torch, no Python, no CUDA. Every input ends
// with its last addressed element, blocks run in any order, and what the CPU kernels say is the
// oracle. `test_cuda SEED` runs one situation. To cover one more parameter: a draw from `Dice` in
// `Situation`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/cuda.h"
#include "specens.h"
#include "trees.h"

namespace {

using namespace specens;

constexpr float kInf = std::numeric_limits<float>::infinity();

#if defined(__SANITIZE_THREAD__)
// A fiber costs ThreadSanitizer a millisecond. Among these a rule asks twice about a draft.
constexpr int64_t kVocabularies[] = {3, 1025, 8200};
constexpr uint64_t kFirst = 48, kSituations = 12;
constexpr uint64_t kKnown = 20;  // a situation with rows that are known and swept late
constexpr int kMostNodes = 1, kMostBatch = 1;
constexpr uint64_t kTrees = 40;
constexpr int64_t kMostBlocks = 6;  // of an attention that is tried
#else
constexpr int64_t kVocabularies[] = {2, 17, 100, 1000, 1024, 1025, 8191, 8193, 20000};
constexpr uint64_t kFirst = 0, kSituations = 250;
constexpr uint64_t kKnown = 250;
constexpr int kMostNodes = 4, kMostBatch = 3;
constexpr uint64_t kTrees = 60;
constexpr int64_t kMostBlocks = 1000;
#endif

class Dice {
 public:
  explicit Dice(uint64_t seed) : random_(seed * 2654435761u + 1) {}
  int below(int count) { return static_cast<int>(random_() % static_cast<uint64_t>(count)); }
  bool happens(double probability) { return uniform() < probability; }
  float uniform() { return static_cast<float>(random_() >> 40) * 0x1p-24f; }
  float normal() { return normal_(random_); }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
};

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

double value_at(const Logits& logits, int64_t offset) {
  float value;
  uint32_t bits = 0;
  if (logits.dtype == DType::kFloat32) {
    std::memcpy(&bits, static_cast<const char*>(logits.data) + offset * 4, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, static_cast<const char*>(logits.data) + offset * 2, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Logits of exactly as many bytes as are addressed.
struct Rows {
  std::vector<char> bytes;
  Logits logits;

  Rows(Dice& dice, int64_t batch, int64_t rows, int64_t vocab_size) {
    const int64_t width = vocab_size + (dice.happens(0.4) ? dice.below(9) : 0);
    const bool wide = dice.happens(0.5);
    const int64_t size = wide ? 4 : 2, count = (batch * rows - 1) * width + vocab_size;
    const float scale = dice.happens(0.5) ? 3.0f : 0.5f;
    const bool broken = dice.happens(0.15);
    bytes.resize(static_cast<size_t>((count > 0 ? count : 1) * size));
    bytes.shrink_to_fit();
    for (int64_t i = 0; i < count; ++i) {
      float value = dice.normal() * scale;
      if (broken && dice.happens(0.02)) {
        value = dice.happens(0.5) ? -kInf : dice.happens(0.5) ? kInf : std::nanf("");
      }
      const uint16_t half = to_bfloat16(value);
      std::memcpy(&bytes[static_cast<size_t>(i * size)],
                  wide ? static_cast<const void*>(&value) : &half, static_cast<size_t>(size));
    }
    logits = {bytes.data(), wide ? DType::kFloat32 : DType::kBFloat16, rows * width, width};
  }
};

// In every other situation the rule is of the next family that `judge` decides for.
bool has_judged_rule(uint64_t seed) { return seed % 2 == 1; }

struct Situation {
  Dice dice;
  int64_t vocab_size, batch, nodes, rows;
  Ensemble ensemble = {};
  std::vector<Rows> members;
  std::vector<float> weights, temperature, top_p, min_p, numbers;
  std::vector<double> memory;
  std::vector<int32_t> top_k, tokens, proposers;
  std::vector<Rows> draft;
  std::vector<float> lse, draft_lse;
  bool bonus;
  RuleId rule;
  double parameters[kMaxParameters] = {};

  explicit Situation(uint64_t seed)
      : dice(seed),
        vocab_size(kVocabularies[seed % std::size(kVocabularies)]),
        batch(1 + dice.below(kMostBatch)),
        nodes(has_judged_rule(seed) ? 1 + dice.below(kMostNodes) : dice.below(kMostNodes + 1)),
        bonus(nodes == 0 || dice.happens(0.8)) {
    rows = bonus ? nodes + 1 : nodes;
    const int count = 1 + dice.below(3);
    const bool mixture = dice.happens(0.6);
    float total = 0.0f;
    for (int k = 0; k < count; ++k) {
      members.emplace_back(dice, batch, rows, vocab_size);
      ensemble.members[k] = members.back().logits;
      weights.push_back(dice.uniform() + 0.1f);
      if (!mixture && dice.happens(0.3)) weights.back() *= -1.0f;
      total += weights.back();
    }
    for (float& weight : weights) weight /= mixture ? total : 1.0f;
    ensemble.num_members = count;
    ensemble.space = mixture ? Space::kProbabilities : Space::kLogits;
    ensemble.warp_members = dice.happens(0.5);
    ensemble.plausibility = !mixture && dice.happens(0.3) ? 0.1 : 0.0;
    ensemble.vocab_size = vocab_size;
    ensemble.weights = {weights.data(), 0, 0, 1};
    const int columns = ensemble.warp_members ? count : 1;
    for (int k = 0; k < columns; ++k) {
      temperature.push_back(dice.happens(0.25) ? 0.0f : 0.3f + dice.uniform());
    }
    ensemble.temperature = {temperature.data(), 0, 0, columns > 1 ? 1 : 0};
    set_filters();
    set_drafts();
    for (int64_t i = 0; i < batch * (nodes + 1) * 4; ++i) numbers.push_back(dice.uniform());
    set_rule(seed);
    set_lse();
  }

  void set_rule(uint64_t seed) {
    constexpr RuleId kFamilies[] = {RuleId::kBlock,      RuleId::kJs,          RuleId::kCascadeV1,
                                    RuleId::kCactus,     RuleId::kEntropyVeto, RuleId::kTypical,
                                    RuleId::kLikelihood, RuleId::kCascadeOpt,  RuleId::kTopK,
                                    RuleId::kKl,         RuleId::kCascadeV3,   RuleId::kCascadeChow,
                                    RuleId::kMentored};
    rule = has_judged_rule(seed) ? kFamilies[seed / 2 % std::size(kFamilies)]
                                 : static_cast<RuleId>(dice.below(3));
    const auto top = static_cast<double>(dice.below(3) * 4);
    set_parameters(rule == RuleId::kLenient || rule == RuleId::kCactus ? 0.8 : 0.2, top, 0.3, 5.0);
    if (rule == RuleId::kTopK) parameters[0] = 3.0;
    if (rule == RuleId::kTypical || rule == RuleId::kLikelihood) parameters[1] = 0.3;
    for (int64_t b = 0; b < batch; ++b) memory.push_back(static_cast<double>(dice.uniform()));
  }

  void set_parameters(double first, double second, double third, double fourth) {
    const double values[kMaxParameters] = {first, second, third, fourth};
    std::copy(std::begin(values), std::end(values), parameters);
  }

  void set_filters() {
    if (dice.happens(0.3)) {
      top_k.push_back(1 + dice.below(20));
      ensemble.top_k = {top_k.data(), 0, 0, 0};
    }
    if (dice.happens(0.3)) {
      top_p.push_back(dice.uniform());
      ensemble.top_p = {top_p.data(), 0, 0, 0};
    }
    if (dice.happens(0.2)) {
      min_p.push_back(dice.uniform() * 0.3f);
      ensemble.min_p = {min_p.data(), 0, 0, 0};
    }
  }

  void set_drafts() {
    for (int64_t i = 0; i < batch * nodes; ++i) {
      tokens.push_back(dice.below(static_cast<int>(vocab_size) + 2) - 1);
      proposers.push_back(dice.below(ensemble.num_members + 1) - 1);
    }
    if (nodes > 0 && dice.happens(0.3)) draft.emplace_back(dice, batch, nodes, vocab_size);
  }

  // Of rows in order; some are not told, none where a float is too coarse.
  float told(const Logits& logits, int64_t row, float over) {
    const float untold = std::nanf("");
    double sum = 0.0, top = -kInf;
    for (const bool sums : {false, true}) {
      for (int64_t i = 0; i < vocab_size; ++i) {
        const double value = value_at(logits, row * logits.row_stride + i) / over;
        if (std::isnan(value)) continue;
        if (sums && value > -kInf) sum += std::exp(value - top);
        top = std::max(top, value);
      }
    }
    const double found = top + std::log(sum);
    return dice.happens(0.2) || !(std::fabs(found) < 1e4) ? untold : static_cast<float>(found);
  }

  void set_lse() {
    if (!top_k.empty() || !top_p.empty() || !min_p.empty() || !dice.happens(0.8)) return;
    if (ensemble.space == Space::kProbabilities && ensemble.warp_members) {
      const size_t last = temperature.size() - 1;
      for (int64_t row = 0; row < batch * rows; ++row) {
        for (size_t k = 0; k < members.size(); ++k) {
          lse.push_back(told(members[k].logits, row, temperature[std::min(k, last)]));
        }
      }
    }
    for (int64_t row = 0; row < batch * nodes && !draft.empty(); ++row) {
      draft_lse.push_back(told(draft[0].logits, row, temperature[0]));
    }
  }

  SampleParams sample_params() const {
    SampleParams params = {};
    params.ensemble = ensemble;
    params.member = static_cast<int>(rows + nodes) % 3 == 0 ? 0 : -1;
    params.batch = batch;
    params.rows = rows;
    params.uniforms = {numbers.data(), (nodes + 1) * 4, 4, 1};
    return params;
  }

  VerifyParams verify_params() const {
    VerifyParams params = {};
    params.ensemble = ensemble;
    params.rule = rule;
    std::copy(std::begin(parameters), std::end(parameters), params.parameters);
    params.memory = {memory.data(), 1, 0, 0};
    params.bonus = bonus;
    params.batch = batch;
    params.nodes = nodes;
    params.draft_tokens = {tokens.data(), false, nodes, 1};
    if (draft.empty() && rows % 2 == 1) params.proposers = {proposers.data(), false, nodes, 1};
    if (!draft.empty()) params.draft_logits = draft[0].logits;
    params.uniforms = {numbers.data(), (nodes + 1) * 4, 4, 1};
    params.draft_temperature = {temperature.data(), 0, 0, 0};
    const auto count = static_cast<int64_t>(members.size());
    if (!lse.empty()) params.ensemble.lse = {lse.data(), rows * count, count, 1};
    if (!draft_lse.empty()) params.draft_lse = {draft_lse.data(), nodes, 1, 0};
    return params;
  }
};

uint64_t current_seed = 0;
int known_rows = 0;  // situations that have some
int attended = 0;    // trees

void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s, seed %llu\n", what.c_str(),
               static_cast<unsigned long long>(current_seed));
  std::exit(1);
}

template <typename T>
void expect_equal(const char* what, const std::vector<T>& expected, const std::vector<T>& found) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if constexpr (std::is_same_v<T, float>) {
      if (expected[i] == found[i]) continue;
      const float allowed = 1e-4f + 1e-5f * std::fabs(expected[i]);
      if (std::fabs(expected[i] - found[i]) <= allowed) continue;
    } else {
      if (expected[i] == found[i]) continue;
    }
    fail(std::string(what) + " at " + std::to_string(i) + ": expected " +
         std::to_string(expected[i]) + ", got " + std::to_string(found[i]));
  }
}

// Zeroed once; every call finds the tickets as the one before left them.
void* workspace(size_t bytes) {
  static std::vector<char> memory;
  if (memory.size() < bytes) memory.assign(bytes, 0);
  return memory.data();
}

void expect_success(int code) {
  if (code != 0) fail(cuda_error(code));
}

struct Drawn {
  std::vector<int64_t> tokens;
  std::vector<float> log_probs, lse;
  std::vector<int32_t> status, count, path;

  Drawn(int64_t outputs, int64_t batch, int64_t nodes)
      : tokens(outputs, -77),
        log_probs(outputs, -77.0f),
        lse(outputs, -77.0f),
        status(outputs, -77),
        count(batch, -77),
        path(batch * nodes, -77) {}

  void expect_same(const char* op, const Drawn& other) const {
    const std::string name = op;
    expect_equal((name + ": tokens").c_str(), tokens, other.tokens);
    expect_equal((name + ": log_probs").c_str(), log_probs, other.log_probs);
    expect_equal((name + ": lse").c_str(), lse, other.lse);
    expect_equal((name + ": status").c_str(), status, other.status);
    expect_equal((name + ": num_accepted").c_str(), count, other.count);
    expect_equal((name + ": path").c_str(), path, other.path);
  }
};

void test_mix(const Situation& now) {
  std::vector<float> log_probs[2];
  std::vector<int32_t> status[2];
  for (int i = 0; i < 2; ++i) {
    log_probs[i].resize(static_cast<size_t>(now.batch * now.rows * now.vocab_size));
    status[i].resize(static_cast<size_t>(now.batch * now.rows));
    const MixParams params = {now.ensemble, now.batch, now.rows, log_probs[i].data(),
                              status[i].data()};
    if (i == 0) {
      mix(params, 1);
    } else {
      const size_t bytes = cuda_mix_workspace(params);
      expect_success(cuda_mix(params, workspace(bytes), bytes, nullptr));
    }
  }
  expect_equal("mix: log_probs", log_probs[0], log_probs[1]);
  expect_equal("mix: status", status[0], status[1]);
}

void test_sample(const Situation& now) {
  Drawn expected(now.batch * now.rows, 0, 0), found = expected;
  for (Drawn* out : {&expected, &found}) {
    SampleParams params = now.sample_params();
    params.tokens = out->tokens.data();
    params.log_probs = out->log_probs.data();
    params.lse = out->lse.data();
    params.status = out->status.data();
    if (out == &expected) {
      sample(params, 1);
    } else {
      const size_t bytes = cuda_sample_workspace(params);
      expect_success(cuda_sample(params, workspace(bytes), bytes, nullptr));
    }
  }
  expected.expect_same("sample", found);
}

void test_verify(const Situation& now) {
  Drawn expected(now.batch * (now.nodes + 1), now.batch, now.nodes), found = expected;
  for (Drawn* out : {&expected, &found}) {
    VerifyParams params = now.verify_params();
    params.tokens = out->tokens.data();
    params.log_probs = out->log_probs.data();
    params.num_accepted = out->count.data();
    params.path = out->path.data();
    params.status = out->status.data();
    if (out == &expected) {
      verify(params, 1);
    } else {
      const size_t bytes = cuda_verify_workspace(params);
      expect_success(cuda_verify(params, workspace(bytes), bytes, nullptr));
    }
  }
  expected.expect_same("verify", found);
}

void test(uint64_t seed) {
  current_seed = seed;
  setenv("SIMT_SEED", std::to_string(seed + 1).c_str(), 1);
  const Situation now(seed);
  known_rows += !now.lse.empty() || !now.draft_lse.empty() ? 1 : 0;
  if (seed % 3 == 0) test_mix(now);
  if (seed % 3 == 1) test_sample(now);
  test_verify(now);
}

// In two layouts, whose blocks run in other orders.
void test_attention(uint64_t seed) {
  const native_tests::TreeCase c = native_tests::tree_case(seed, seed % 16 == 0);
  const int64_t rows = c.heads / c.key_heads * c.nodes, capacity = c.pages() * c.page;
  const int64_t blocks = c.batch * c.key_heads * (capacity / 256 + 1 + rows / 4);
  if (blocks > kMostBlocks) return;
  native_tests::context = {"simt", seed, "attention", 1, ""};
  const auto attend = [&](const AttentionParams& params) {
    const size_t bytes = cuda_attention_workspace(params, capacity);
    expect_success(cuda_attention(params, capacity, workspace(bytes), bytes, nullptr));
  };
  native_tests::Attended found[2];
  for (uint64_t i = 0; i < 2; ++i) {
    setenv("SIMT_SEED", std::to_string(2 * seed + i).c_str(), 1);
    found[i] = native_tests::Caches(c, 2 * seed + i).run(c, i == 1, attend);
  }
  native_tests::check_attended(c, found[0]);
  native_tests::expect(found[0] == found[1], "it depends on the layout", 0);
  ++attended;
}

void test_compact(uint64_t seed) {
  native_tests::check_moves(seed, [](const CompactParams& params) {
    expect_success(cuda_compact(params, params.pages.size, nullptr));
  });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    test(std::strtoull(argv[1], nullptr, 0));
    return 0;
  }
  for (uint64_t seed = kFirst; seed < kFirst + kSituations; ++seed) test(seed);
  test(kKnown);
  for (uint64_t seed = 1; seed <= kTrees; ++seed) {
    test_attention(seed);
    if (seed % 8 != 0 || kMostBlocks > 6) test_compact(seed);
  }
  std::printf("%llu situations, %d with known rows, %d trees\n",
              static_cast<unsigned long long>(kSituations), known_rows, attended);
  return 0;
}
