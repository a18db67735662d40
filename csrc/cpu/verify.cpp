// SPDX-License-Identifier: Apache-2.0
// `verify`: from the root of a draft tree down, a sweep of a row for its laws, then each child's
// coin against what the rule keeps of it. A child that is rejected is taken from the target of the
// next; the first row without a child that is kept emits a token and stops. Rows that are not
// reached are not read. For the rule "block", which takes chains, every row is looked at before the
// last one kept is known.
#include <algorithm>
#include <cmath>
#include <vector>

#include "acceptance.h"
#include "draw.h"

namespace specens {
namespace {

// Where a block's reach, or what is left, is this near to all or nothing, single precision would
// show.
constexpr double kNearlyEqual = 1e-5;
constexpr double kLeastSlack = 1e-3;

// Where draws without replacement leave a draft less, the rounding of single precision would show.
constexpr double kLeastRest = 1e-2;

// The children of each node of one row's tree, in order; 0 is none, for no child is the root.
class Tree {
 public:
  Tree(const VerifyParams& params, int64_t batch)
      : params_(params), batch_(batch), drafts_(num_drafts(params, batch)) {
    if (params.parents.data == nullptr) return;
    const auto size = static_cast<size_t>(params.nodes + 1);
    first_.resize(size);
    next_.resize(size);
    refuses_.resize(size);
    for (int64_t node = drafts_; node > 0; --node) {
      const int64_t parent = params.parents.at(batch, node);
      const bool known = parent >= 0 && parent < node;
      if (token(node) == kPadding) {
        if (known && tells_refusals()) refuses_[parent] = true;
        continue;
      }
      if (!known) {
        lost_ = true;
        continue;
      }
      next_[node] = first_[parent];
      first_[parent] = node;
    }
  }

  int64_t token(int64_t node) const { return params_.draft_tokens.at(batch_, node - 1); }
  // Whether a draft hangs off no earlier node.
  bool loses_a_draft() const { return lost_; }

  int64_t first_child(int64_t node) const {
    if (!first_.empty()) return first_[node];
    return node < drafts_ && token(node + 1) != kPadding ? node + 1 : 0;
  }
  // Whether a draft below is one to refuse, after which a token is drawn even without a bonus.
  bool refuses(int64_t node) const {
    if (!refuses_.empty()) return refuses_[node];
    return tells_refusals() && node < drafts_ && token(node + 1) == kPadding;
  }

  int64_t next_sibling(int64_t node) const { return next_.empty() ? 0 : next_[node]; }

 private:
  bool tells_refusals() const { return params_.layout.num_drafts.data != nullptr; }

  static int64_t num_drafts(const VerifyParams& params, int64_t batch) {
    const Integers& given = params.layout.num_drafts;
    if (given.data == nullptr) return params.nodes;
    return std::clamp(given.at(batch, 0), int64_t{0}, params.nodes);
  }

  const VerifyParams& params_;
  int64_t batch_;
  int64_t drafts_;
  bool lost_ = false;
  std::vector<int64_t> first_, next_;  // empty: a chain
  std::vector<bool> refuses_;
};

// One batch row.
class Walk {
 public:
  Walk(const VerifyParams& params, RowLaws& laws, int64_t batch)
      : params_(params),
        laws_(laws),
        batch_(batch),
        tree_(params, batch),
        left_(laws),
        at_zero_(greedy_row(params.ensemble, batch)),
        greedy_(params.rule == RuleId::kGreedy || at_zero_),
        asks_(!greedy_ || (at_zero_ && is_asked_at_zero(params.rule))),
        dense_(!greedy_ || (at_zero_ && needs_draft_at_zero(params.rule))),
        memory_(params.memory.data == nullptr ? 0.0 : params.memory.at(batch)) {
    const EngineLayout& layout = params.layout;
    std::copy(std::begin(params.parameters), std::end(params.parameters), parameters_);
    if (layout.parameters.data == nullptr) return;
    for (int64_t i = 0; i < std::min<int64_t>(layout.num_parameters, kMaxParameters); ++i) {
      parameters_[i] = layout.parameters.at(batch, 0, i);
    }
  }

  void run();

 private:
  void run_tree();
  int64_t step(int64_t row);
  void choose_rate();
  void run_block();
  bool is_valid(int64_t node) const;
  Proposal proposal(int64_t row, int64_t node) const;
  bool measure(int64_t row, int64_t node, Drafted* drafted);
  bool measure_sibling(int64_t row, int64_t node, Drafted* drafted);
  void describe(int64_t node, const Proposal& proposal, Drafted* drafted);
  void take_away_siblings(Drafted* drafted);
  int candidates(int64_t node) const;
  bool is_last_valid(int64_t node) const;
  Judgement judge_node(int64_t node, const Drafted& drafted);
  bool accepts(int64_t node, const Drafted& drafted, const Judgement& judgement) const;
  void reject(int64_t node, const Drafted& drafted, const Judgement& judgement);
  void refine();
  void share_anew(Drafted* drafted);
  void complete();
  double mass_left(const Drafted& drafted, double reach);
  double block_reach(const Drafted& drafted, double reach);
  int64_t drawn(int64_t row) const;
  void write_token(int64_t place, int64_t token);
  void emit(int64_t place, int64_t token);
  void keep(int64_t node);
  void clear_from(int64_t place);

  const VerifyParams& params_;
  RowLaws& laws_;
  int64_t batch_;
  Tree tree_;
  Leftover left_;  // of the target at this row
  bool at_zero_;   // the temperature is 0
  bool greedy_;    // the target's most probable token is what is emitted
  bool asks_;      // the rule is asked at all
  bool dense_;     // it reads the draft's law
  double memory_;
  double parameters_[kMaxParameters];
  std::vector<Drafted> rejected_;  // at this row, where there are siblings
  bool exact_ = false;             // the laws of this row are
  int ratio_slot_ = kPadding;      // whose ratio of `k_seq` is known
  double ratio_ = 0.0;
  int64_t best_ = 0;
  int64_t accepted_ = 0;
  int32_t status_ = 0;
};

bool Walk::is_valid(int64_t node) const {
  const int64_t token = tree_.token(node);
  if (token < 0 || token >= params_.ensemble.vocab_size) return false;
  if (params_.proposers.data == nullptr) return true;
  const int64_t member = params_.proposers.at(batch_, node - 1);
  const int64_t known =
      params_.ensemble.num_members + (params_.draft_logits.data != nullptr ? 1 : 0);
  return member >= kPadding && member < known;
}

// Of a valid draft below this row.
Proposal Walk::proposal(int64_t row, int64_t node) const {
  Proposal proposal;
  if (!dense_) return proposal;
  const int64_t separate = params_.ensemble.num_members;
  const int64_t by = params_.proposers.data != nullptr      ? params_.proposers.at(batch_, node - 1)
                     : params_.draft_logits.data != nullptr ? separate
                                                            : kPadding;
  const EngineLayout& layout = params_.layout;
  proposal.filtered = layout.draft_filtered;
  if (by != separate) {
    proposal.member = static_cast<int>(by);
  } else {
    if (layout.draft_rows.data != nullptr) row = layout.draft_rows.at(batch_, row);
    proposal.row = row_of(params_.draft_logits, batch_, row);
    proposal.probabilities = layout.draft_probabilities;
    proposal.dtype = params_.draft_logits.dtype;
    proposal.temperature = bounded_temperature(params_.draft_temperature.at(batch_));
    if (params_.draft_lse.data != nullptr) proposal.lse = params_.draft_lse.at(batch_, row);
  }
  return proposal;
}

// Makes the laws of a row, and of a child of it; false if that is invalid, or there is none.
bool Walk::measure(int64_t row, int64_t node, Drafted* drafted) {
  const bool valid = node != 0 && is_valid(node);
  const Proposal from = valid ? proposal(row, node) : Proposal{};
  laws_.measure_target(batch_, row, from);
  left_ = Leftover(laws_);
  rejected_.clear();
  exact_ = false;
  ratio_slot_ = kPadding;
  status_ |= laws_.status() | laws_.draft_status() | (laws_.target().empty() ? kEmptyLaw : 0) |
             (node != 0 && !valid ? kInvalidDraft : 0);
  if (valid) describe(node, from, drafted);
  return valid;
}

// The same of one more child.
bool Walk::measure_sibling(int64_t row, int64_t node, Drafted* drafted) {
  if (!is_valid(node)) {
    status_ |= kInvalidDraft;
    return false;
  }
  const Proposal from = proposal(row, node);
  if (from.dense()) {
    laws_.measure_draft(from);
    status_ |= laws_.draft_status();
  }
  describe(node, from, drafted);
  return true;
}

void Walk::describe(int64_t node, const Proposal& proposal, Drafted* drafted) {
  const int slot = proposal.dense() ? proposal.slot() : kPadding;
  *drafted = {tree_.token(node), slot, at_zero_, memory_, parameters_};
  if (params_.without && drafted->dense()) take_away_siblings(drafted);
}

// Of draws without replacement.
void Walk::take_away_siblings(Drafted* drafted) {
  for (const Drafted& other : rejected_) {
    if (other.slot == drafted->slot) drafted->gone.push_back(other.token);
  }
  if (drafted->gone.empty()) return;
  double rest = rest_of(laws_, *drafted);
  if (rest < kLeastRest && !exact_) {
    refine();
    rest = rest_of(laws_, *drafted);
  }
  drafted->share = rest > 0.0 ? 1.0 / rest : 0.0;
}

int Walk::candidates(int64_t node) const {
  int count = 0;
  const bool whole = params_.parents.data != nullptr;
  int64_t sibling = whole ? tree_.first_child(params_.parents.at(batch_, node)) : node;
  for (; sibling != 0; sibling = tree_.next_sibling(sibling)) count += is_valid(sibling) ? 1 : 0;
  return count;
}

bool Walk::is_last_valid(int64_t node) const {
  int64_t next = tree_.next_sibling(node);
  while (next != 0 && !is_valid(next)) next = tree_.next_sibling(next);
  return next == 0;
}

Judgement Walk::judge_node(int64_t node, const Drafted& drafted) {
  if (!asks_) return Judgement{};
  const int count = params_.independent ? candidates(node) : 1;
  if (count == 1) return judge(params_, laws_, left_, drafted);
  if (!drafted.dense() || ratio_slot_ != drafted.slot) {
    ratio_ = k_seq_ratio(params_, laws_, drafted, count);
    ratio_slot_ = drafted.slot;
  }
  return k_seq_judgement(laws_, drafted, ratio_);
}

// Where a token is drawn, every row of the target is looked at.
void Walk::complete() {
  laws_.complete();
  status_ |= laws_.target().status() | (laws_.target().empty() ? kEmptyLaw : 0);
}

bool Walk::accepts(int64_t node, const Drafted& drafted, const Judgement& judgement) const {
  const double coin = params_.uniforms.at(batch_, node, 0);
  if (greedy_ && params_.rule != RuleId::kSynthetic) {
    if (!(coin < 1.0) || judgement.vetoed) return false;
    return judgement.trusted || (!laws_.target().empty() && drafted.token == best_);
  }
  const double draft = drafted.dense() ? draft_probability(laws_, drafted, drafted.token) : 1.0;
  return coin * draft < judgement.kept;
}

// Makes the laws of this row exact, and what earlier siblings have left.
void Walk::refine() {
  laws_.refine();
  exact_ = true;
  ratio_slot_ = kPadding;
  if (greedy_ || laws_.target().empty()) return;  // nothing that was computed is kept
  left_ = Leftover(laws_);
  for (Drafted& drafted : rejected_) {
    share_anew(&drafted);
    left_.reject(drafted, judge(params_, laws_, left_, drafted), /*exactly=*/true);
  }
}

// Of draws without replacement, by laws that are now exact.
void Walk::share_anew(Drafted* drafted) {
  if (drafted->gone.empty()) return;
  const double rest = rest_of(laws_, *drafted);
  drafted->share = rest > 0.0 ? 1.0 / rest : 0.0;
}

void Walk::reject(int64_t node, const Drafted& drafted, const Judgement& judgement) {
  if (greedy_) {
    if (judgement.vetoed) {
      left_.exclude(drafted.token);
      best_ = left_.argmax();
    }
  } else if (!laws_.target().empty() && (!params_.independent || is_last_valid(node))) {
    bool left = left_.reject(drafted, judgement, exact_);
    if (!left && !exact_) {
      // Two laws that are nearly equal differ by less than what their normalisers are good to.
      refine();
      Drafted exact = drafted;
      share_anew(&exact);
      left = left_.reject(exact, judge_node(node, exact), /*exactly=*/true);
    }
    if (!left) status_ |= kEmptyResidual;
  }
  if (!params_.independent && tree_.next_sibling(node) != 0) rejected_.push_back(drafted);
}

int64_t Walk::drawn(int64_t row) const {
  if (greedy_) return best_ == kPadding ? 0 : best_;
  if (left_.whole()) return draw_from(laws_.target(), params_.uniforms, batch_, row);
  return left_.draw_from(draw_numbers(params_.uniforms, batch_, row).value);
}

void Walk::write_token(int64_t place, int64_t token) {
  const EngineLayout& layout = params_.layout;
  const int64_t at = batch_ * layout.tokens_stride + place;
  if (layout.tokens == nullptr) {
    params_.tokens[batch_ * (params_.nodes + 1) + place] = token;
  } else if (layout.wide_tokens) {
    static_cast<int64_t*>(layout.tokens)[at] = token;
  } else {
    static_cast<int32_t*>(layout.tokens)[at] = static_cast<int32_t>(token);
  }
}

void Walk::emit(int64_t place, int64_t token) {
  const int64_t at = batch_ * (params_.nodes + 1) + place;
  write_token(place, token);
  params_.log_probs[at] = static_cast<float>(laws_.target().log_probability(token));
}

void Walk::keep(int64_t node) {
  emit(accepted_, tree_.token(node));
  params_.path[batch_ * params_.nodes + accepted_] = static_cast<int32_t>(node);
  ++accepted_;
}

// Pads what was not emitted.
void Walk::clear_from(int64_t place) {
  const int64_t nodes = params_.nodes;
  for (int64_t i = place; i <= nodes; ++i) write_token(i, kPadding);
  std::fill_n(params_.log_probs + batch_ * (nodes + 1) + place, nodes + 1 - place, 0.0f);
  std::fill_n(params_.path + batch_ * nodes + place, nodes - place, int32_t{kPadding});
}

// Of the depth that is judged next, the last one's for those beyond.
void Walk::choose_rate() {
  const EngineLayout& layout = params_.layout;
  if (params_.rule != RuleId::kSynthetic || layout.parameters.data == nullptr) return;
  const int64_t depth = std::min(accepted_, layout.num_parameters - 1);
  parameters_[0] = layout.parameters.at(batch_, 0, depth);
}

// The child of this row that is kept; 0 if none is, and a token is emitted instead.
int64_t Walk::step(int64_t row) {
  choose_rate();
  Drafted drafted;
  int64_t node = tree_.first_child(row);
  bool valid = measure(row, node, &drafted);
  if (greedy_) best_ = laws_.argmax();
  while (node != 0) {
    if (valid) {
      const Judgement judgement = judge_node(node, drafted);
      if (accepts(node, drafted, judgement)) {
        keep(node);
        if (params_.rule == RuleId::kLikelihood) {
          const double log_prob = laws_.target().log_probability(drafted.token);
          memory_ = remember(memory_, log_prob, parameters_[1]);
        }
        return node;
      }
      reject(node, drafted, judgement);
    }
    node = tree_.next_sibling(node);
    valid = node != 0 && measure_sibling(row, node, &drafted);
  }
  complete();
  emit(accepted_, drawn(row));
  return 0;
}

void Walk::run_tree() {
  int64_t row = 0;
  do {
    if (tree_.first_child(row) == 0 && !params_.bonus && !tree_.refuses(row)) return;
    row = step(row);
  } while (row != 0);
}

Judgement scaled(double scale) {
  Judgement judgement;
  judgement.scale = scale;
  return judgement;
}

// sum max(reach p - q, 0).
double Walk::mass_left(const Drafted& drafted, double reach) {
  if (reach == 0.0) return 0.0;
  Leftover left(laws_);
  const bool found = left.reject(drafted, scaled(reach), /*exactly=*/false);
  if (found && left.mass() + 1.0 - reach >= kLeastSlack) return left.mass();
  laws_.refine();
  left = Leftover(laws_);
  left.reject(drafted, scaled(reach), /*exactly=*/true);
  return left.mass();
}

double Walk::block_reach(const Drafted& drafted, double reach) {
  const auto ratio_is_near_1 = [&](double p, double q) {
    return std::abs(p - q) <= kNearlyEqual * q;
  };
  for (bool refined = false;; refined = true) {
    const double p = laws_.target().probability(drafted.token);
    const double q = draft_probability(laws_, drafted, drafted.token);
    if (refined || !ratio_is_near_1(p, q)) return block_step(reach, p, q);
    laws_.refine();
  }
}

// Emits the longest block that is kept and what follows it.
void Walk::run_block() {
  int64_t kept = 0;
  double reach = 1.0, kept_reach = 1.0;
  for (int64_t row = 0;; ++row) {
    const int64_t node = tree_.first_child(row);
    const bool ends = node == 0 && !params_.bonus && !tree_.refuses(row);
    Drafted drafted;
    const bool valid = !ends && measure(row, node, &drafted);
    const double threshold =
        valid && row > 0 ? block_threshold(reach, mass_left(drafted, reach)) : reach;
    if (row > 0 && params_.uniforms.at(batch_, row, 0) < threshold) {
      kept = row;
      kept_reach = reach;
    }
    if (!valid) {
      if (!ends && kept == row) {
        complete();
        emit(row, drawn(row));
      }
      if (kept == row) return;
      break;
    }
    keep(node);
    reach = block_reach(drafted, reach);
  }
  accepted_ = kept;
  clear_from(kept);
  Drafted drafted;
  measure(kept, tree_.first_child(kept), &drafted);
  complete();
  if (!laws_.target().empty()) {
    bool left = left_.reject(drafted, scaled(kept_reach), /*exactly=*/false);
    if (!left) {
      laws_.refine();
      left_ = Leftover(laws_);
      left = left_.reject(drafted, scaled(kept_reach), /*exactly=*/true);
    }
    if (!left) status_ |= kEmptyResidual;
  }
  emit(kept, drawn(kept));
}

void Walk::run() {
  clear_from(0);
  if (tree_.loses_a_draft()) status_ |= kInvalidDraft;
  if (params_.rule == RuleId::kBlock && !at_zero_) {
    run_block();
  } else {
    run_tree();
  }
  params_.num_accepted[batch_] = static_cast<int32_t>(accepted_);
  params_.status[batch_] = status_;
}

}  // namespace

void verify(const VerifyParams& params, int threads) {
  for_each_row(params.ensemble, params.batch, params.nodes + 1, threads,
               [&](RowLaws& laws, int64_t batch) { Walk(params, laws, batch).run(); });
}

}  // namespace specens
