// SPDX-License-Identifier: Apache-2.0
// The CPU kernels over random situations, for sanitizers: no torch, no Python. Every input ends
// with its last addressed element and starts where it likes. A situation is run with 1 to 4
// threads, in two layouts and on every instruction set of this machine, one process each: the bits
// must be equal. What `mix` says is the oracle of `sample` and `verify`; `mix` has a direct
// computation of its own. `test_kernels SEED` runs one situation. To cover one more parameter:
// situations.h and inputs.h.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>

#include "checks.h"
#include "trees.h"

namespace native_tests {
namespace {

constexpr int kThreads = 4;

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Below this many logits there is nothing for more threads to do.
constexpr int64_t kWorthThreads = 40000;
constexpr int kTinyLaws = 200;
constexpr int kTrees = 64;

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
    for (int64_t b = 0; b < s.batch; ++b) ChainCheck(s, mixed, proposals, result, b).check();
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
      for (int64_t b = 0; b < s.batch; ++b)
        ChainCheck(s, mixed, proposals, result, b).check_shape();
    });
    digest.add(found.tokens);
    digest.add(found.log_probs);
    digest.add(found.num_accepted);
    digest.add(found.status);
  }

  // And on a tree, where it may be one.
  for (uint64_t turn = 0; turn < 2; ++turn) {
    const auto& rule =
        specens::kRules[(seed / 20 + 5 * seed + 9 * turn) % std::size(specens::kRules)];
    if (rule.id == RuleId::kBlock) continue;
    Asked chosen = asked(rule.id, seed);
    chosen.tree = true;
    chosen.independent = std::string(rule.name) == "k_seq";
    const auto verify_tree = [&](const Inputs& inputs, int threads, bool margins) {
      return run_verify(s, chosen, inputs, threads, margins);
    };
    const std::string name = std::string("tree, ") + rule.name;
    const Verdict found =
        repeat(name.c_str(), s, one, other, verify_tree, [&](const Verdict& result) {
          check_tokens(s, result.tokens, true);
          for (int64_t b = 0; b < s.batch; ++b) check_tree(s, result, b);
        });
    digest.add(found.tokens);
    digest.add(found.log_probs);
    digest.add(found.num_accepted);
    digest.add(found.path);
    digest.add(found.status);
  }

  // Several draws of a row.
  const auto sample_several = [&](const Inputs& inputs, int threads, bool margins) {
    return run_sample_several(s, inputs, threads, margins);
  };
  const Sampled several = repeat("sample several", s, one, other, sample_several,
                                 [&](const Sampled& result) { check_several(s, result); });
  digest.add(several.tokens);
  digest.add(several.log_probs);

  const auto sweep = [&](const Inputs& inputs, int threads, bool) {
    return run_floor_sweep(s, inputs, threads);
  };
  const Swept swept = repeat("floor_sweep", s, one, other, sweep,
                             [&](const Swept& result) { check_floor_sweep(s, result.total[0]); });
  digest.add(swept.total);
  expect(one.untouched() && other.untouched(), "an input was written to", 0);
  return digest.value();
}

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
  for (uint64_t seed = 1; seed <= kTrees; ++seed) all.push_back({check_attention, seed});
  for (uint64_t seed = 1; seed <= kTrees; ++seed) all.push_back({check_compact, seed});
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

// The situation of this seed alone, if it is not 0.
int run_all(uint64_t only) {
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

}  // namespace
}  // namespace native_tests

int main(int argc, char** argv) {
  return native_tests::run_all(argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0);
}
