// SPDX-License-Identifier: Apache-2.0
// What must hold of the results: a direct computation for `mix`, which is the oracle of the rest.
#pragma once

#include "outputs.h"

namespace native_tests {

inline bool close(double one, double other, double tolerance) {
  return one == other || std::fabs(one - other) <= tolerance * (1.0 + std::fabs(other));
}

// NaN and +inf among the logits of one row.
inline int32_t oddities(const Member& member, int64_t b, int64_t t) {
  int32_t status = 0;
  for (int64_t v = 0; v < member.logits.extents[2]; ++v) {
    const float value = member.logits.at(b, t, v);
    if (std::isnan(value)) status |= specens::kNanLogits;
    if (value == kInf) status |= specens::kInfiniteLogits;
  }
  return status;
}

inline void check_mix(const Situation& s, const Mixed& mixed) {
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
inline double slack(double log_prob) { return 1e-5 + 1.2e-7 * std::min(std::fabs(log_prob), 1e3); }

// Whether one uniform, up to `error`, picks [first, last) out of [begin, end).
inline void check_pick(const std::vector<double>& mass, const std::vector<double>& scale,
                       float number, int64_t begin, int64_t end, int64_t first, int64_t last) {
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
inline void check_draw(const Situation& s, const std::vector<double>& mass,
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

inline std::vector<double> exponentials(const float* row, int64_t size) {
  std::vector<double> result(static_cast<size_t>(size));
  std::transform(row, row + size, result.begin(), [](double x) { return std::exp(x); });
  return result;
}

inline void check_greedy(const Situation& s, const float* row, int64_t b, int64_t t,
                         int64_t token) {
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
inline void check_drawn(const Situation& s, const float* row, bool empty, bool greedy, int64_t b,
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

inline void check_tokens(const Situation& s, const std::vector<int64_t>& tokens, bool padded) {
  for (const int64_t token : tokens) {
    expect((0 <= token && token < s.vocab_size) || (padded && token == specens::kPadding),
           "not a token", double(token));
  }
}

// Against the law in `mixed`, which is that of greedy rows only for the ensemble.
inline void check_sample(const Situation& s, const Mixed& mixed, const Sampled& sampled,
                         int member) {
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

inline double kept(const Situation& s, double target, double draft) {
  return s.rule == RuleId::kLenient ? std::min(target / s.lenience, draft)
                                    : std::min(target, draft);
}

// One batch row of `verify`, walked again beside the law that `mix` has given.
class ChainCheck {
 public:
  ChainCheck(const Situation& s, const Mixed& mixed, Proposals& proposals, const Verdict& verdict,
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

// Tokens of a row that differ, and then none.
inline void check_several(const Situation& s, const Sampled& sampled) {
  const int64_t count = s.nodes + 1;
  for (int64_t place = 0; place < s.batch * s.rows; ++place) {
    const int64_t* tokens = &sampled.tokens[place * count];
    for (int64_t i = 0; i < count; ++i) {
      expect(specens::kPadding <= tokens[i] && tokens[i] < s.vocab_size, "token",
             double(tokens[i]));
      if (s.hostile || tokens[i] == specens::kPadding) continue;
      for (int64_t j = 0; j < i; ++j) expect(tokens[i] != tokens[j], "twice", double(tokens[i]));
    }
  }
}

// What holds for a tree under every rule: the path goes down, and its tokens are emitted.
inline void check_tree(const Situation& s, const Verdict& verdict, int64_t b) {
  const int64_t accepted = verdict.num_accepted[b];
  const int64_t* tokens = &verdict.tokens[b * (s.nodes + 1)];
  expect(0 <= accepted && accepted <= s.nodes, "num_accepted", double(accepted));
  int64_t node = 0;
  for (int64_t i = 0; i < s.nodes; ++i) {
    const int32_t next = verdict.path[b * s.nodes + i];
    expect((next == specens::kPadding) == (i >= accepted), "padding of the path", next);
    if (i >= accepted) continue;
    expect(next > node && s.parents.at(b, next) == node, "a path that does not go down", next);
    expect(tokens[i] == s.draft_tokens.at(b, next - 1), "not the token accepted",
           double(tokens[i]));
    node = next;
  }
  bool leaf = true;
  for (int64_t other = node + 1; other <= s.nodes; ++other) {
    const bool exists = s.draft_tokens.at(b, other - 1) != specens::kPadding;
    leaf &= !(exists && s.parents.at(b, other) == node);
  }
  const int64_t emitted = accepted + (leaf && !s.bonus ? 0 : 1);
  for (int64_t i = 0; i <= s.nodes; ++i) {
    expect((tokens[i] == specens::kPadding) == (i >= emitted), "padding of tokens",
           double(tokens[i]));
  }
}

inline void check_floor_sweep(const Situation& s, double total) {
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

}  // namespace native_tests
