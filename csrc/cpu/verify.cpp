// SPDX-License-Identifier: Apache-2.0
// `verify` for chains: row after row, a sweep for the laws, then the draft token's coin against
// what the rule keeps of it; the first rejection, or the end of the chain, emits a token and stops.
// For the rule "block" every row is looked at before the last one kept is known.
#include <cmath>

#include "acceptance.h"
#include "draw.h"

namespace specens {
namespace {

// Where a block's reach, or what is left, is this near to all or nothing, single precision would
// show.
constexpr double kNearlyEqual = 1e-5;
constexpr double kLeastSlack = 1e-3;

// One batch row.
class ChainWalk {
 public:
  ChainWalk(const VerifyParams& params, RowLaws& laws, int64_t batch)
      : params_(params),
        laws_(laws),
        batch_(batch),
        at_zero_(greedy_row(params.ensemble, batch)),
        greedy_(params.rule == RuleId::kGreedy || at_zero_),
        asks_(!greedy_ || (at_zero_ && is_asked_at_zero(params.rule))),
        dense_(!greedy_ || (at_zero_ && needs_draft_at_zero(params.rule))),
        memory_(params.memory.data == nullptr ? 0.0 : params.memory.at(batch)) {}

  void run();

 private:
  bool step(int64_t row);
  int64_t run_block();
  bool has_child(int64_t row) const;
  bool read_proposal(int64_t row, Proposal* proposal) const;
  bool measure(int64_t row, Drafted* drafted);
  void complete();
  double mass_left(const Drafted& drafted, double reach);
  double block_reach(const Drafted& drafted, double reach);
  bool accepts(int64_t row, const Drafted& drafted, const Judgement& judgement) const;
  int64_t replacement(int64_t row, const Drafted& drafted, const Judgement& judgement);
  int64_t drawn(int64_t row) const;
  void emit(int64_t row, int64_t token);
  void keep(int64_t row, int64_t token);
  void clear_from(int64_t row);

  const VerifyParams& params_;
  RowLaws& laws_;
  int64_t batch_;
  bool at_zero_;  // the temperature is 0
  bool greedy_;   // the target's most probable token is what is emitted
  bool asks_;     // the rule is asked at all
  bool dense_;    // it reads the draft's law
  double memory_;
  int64_t best_ = 0;
  int32_t status_ = 0;
};

bool ChainWalk::has_child(int64_t row) const {
  return row < params_.nodes && params_.draft_tokens.at(batch_, row) != kPadding;
}

// False if the draft is invalid.
bool ChainWalk::read_proposal(int64_t row, Proposal* proposal) const {
  const int64_t token = params_.draft_tokens.at(batch_, row);
  if (token < 0 || token >= params_.ensemble.vocab_size) return false;
  if (params_.proposers.data != nullptr) {
    const int64_t member = params_.proposers.at(batch_, row);
    if (member < kPadding || member >= params_.ensemble.num_members) return false;
    if (dense_) proposal->member = static_cast<int>(member);
  } else if (params_.draft_logits.data != nullptr && dense_) {
    proposal->row = row_of(params_.draft_logits, batch_, row);
    proposal->dtype = params_.draft_logits.dtype;
    proposal->temperature = bounded_temperature(params_.draft_temperature.at(batch_));
    if (params_.draft_lse.data != nullptr) proposal->lse = params_.draft_lse.at(batch_, row);
  }
  return true;
}

// Makes the laws of a row; false if its child is invalid, or there is none.
bool ChainWalk::measure(int64_t row, Drafted* drafted) {
  Proposal proposal;
  const bool child = has_child(row);
  const bool valid = child && read_proposal(row, &proposal);
  laws_.measure_target(batch_, row, proposal);
  status_ |= laws_.status() | laws_.draft_status() | (laws_.target().empty() ? kEmptyLaw : 0) |
             (child && !valid ? kInvalidDraft : 0);
  if (valid) {
    *drafted = {params_.draft_tokens.at(batch_, row), proposal.dense(), at_zero_, memory_};
  }
  return valid;
}

// Where a token is drawn, every row of the target is looked at.
void ChainWalk::complete() {
  laws_.complete();
  status_ |= laws_.target().status() | (laws_.target().empty() ? kEmptyLaw : 0);
}

bool ChainWalk::accepts(int64_t row, const Drafted& drafted, const Judgement& judgement) const {
  const double coin = params_.uniforms.at(batch_, row + 1, 0);
  const RowLaw& target = laws_.target();
  if (greedy_) {
    if (!(coin < 1.0) || judgement.vetoed) return false;
    return judgement.trusted || (!target.empty() && drafted.token == best_);
  }
  return coin * (drafted.dense ? laws_.draft().probability(drafted.token) : 1.0) < judgement.kept;
}

int64_t ChainWalk::drawn(int64_t row) const {
  return draw_from(laws_.target(), params_.uniforms, batch_, row);
}

// Of a rejected draft.
int64_t ChainWalk::replacement(int64_t row, const Drafted& drafted, const Judgement& judgement) {
  if (greedy_) return judgement.vetoed ? best_but(laws_, drafted.token) : best_;
  if (laws_.target().empty()) return 0;
  if (judgement.left == Left::kTarget && !judgement.without_token) return drawn(row);
  const DrawNumbers numbers = draw_numbers(params_.uniforms, batch_, row);
  Leftover left(laws_, drafted, judgement);
  if (left.measure(false)) return left.draw_from(numbers.value);
  // Two laws that are nearly equal differ by less than what their normalisers are good to.
  laws_.refine();
  const bool again = params_.rule != RuleId::kBlock;
  Leftover exact(laws_, drafted, again ? judge(params_, laws_, drafted) : judgement);
  if (exact.measure(true)) return exact.draw_from(numbers.value);
  status_ |= kEmptyResidual;
  return drawn(row);
}

void ChainWalk::emit(int64_t row, int64_t token) {
  const int64_t place = batch_ * (params_.nodes + 1) + row;
  params_.tokens[place] = token;
  params_.log_probs[place] = static_cast<float>(laws_.target().log_probability(token));
}

void ChainWalk::keep(int64_t row, int64_t token) {
  emit(row, token);
  params_.path[batch_ * params_.nodes + row] = static_cast<int32_t>(row + 1);
}

// Pads what was not emitted.
void ChainWalk::clear_from(int64_t row) {
  const int64_t nodes = params_.nodes;
  std::fill_n(params_.tokens + batch_ * (nodes + 1) + row, nodes + 1 - row, int64_t{kPadding});
  std::fill_n(params_.log_probs + batch_ * (nodes + 1) + row, nodes + 1 - row, 0.0f);
  std::fill_n(params_.path + batch_ * nodes + row, nodes - row, int32_t{kPadding});
}

// Whether the child of this row is kept.
bool ChainWalk::step(int64_t row) {
  Drafted drafted;
  const bool valid = measure(row, &drafted);
  if (greedy_) best_ = laws_.argmax();
  if (!valid) {
    complete();
    emit(row, greedy_ ? best_ : drawn(row));
    return false;
  }
  const Judgement judgement = asks_ ? judge(params_, laws_, drafted) : Judgement{};
  if (!accepts(row, drafted, judgement)) {
    complete();
    emit(row, replacement(row, drafted, judgement));
    return false;
  }
  keep(row, drafted.token);
  if (params_.rule == RuleId::kLikelihood) {
    const double log_prob = laws_.target().log_probability(drafted.token);
    memory_ = remember(memory_, log_prob, params_.parameters[1]);
  }
  return true;
}

Judgement scaled(double scale) {
  Judgement judgement;
  judgement.scale = scale;
  return judgement;
}

// sum max(reach p - q, 0).
double ChainWalk::mass_left(const Drafted& drafted, double reach) {
  if (reach == 0.0) return 0.0;
  Leftover left(laws_, drafted, scaled(reach));
  if (left.measure(false) && left.mass() + 1.0 - reach >= kLeastSlack) return left.mass();
  laws_.refine();
  left.measure(true);
  return left.mass();
}

double ChainWalk::block_reach(const Drafted& drafted, double reach) {
  const auto ratio_is_near_1 = [&](double p, double q) {
    return std::abs(p - q) <= kNearlyEqual * q;
  };
  for (bool refined = false;; refined = true) {
    const double p = laws_.target().probability(drafted.token);
    const double q = drafted.dense ? laws_.draft().probability(drafted.token) : 1.0;
    if (refined || !ratio_is_near_1(p, q)) return block_step(reach, p, q);
    laws_.refine();
  }
}

// Emits the longest block that is kept and what follows it; returns how many drafts are kept.
int64_t ChainWalk::run_block() {
  int64_t row = 0, kept = 0;
  double reach = 1.0, kept_reach = 1.0;
  for (;; ++row) {
    const bool ends = !has_child(row) && !params_.bonus;
    Drafted drafted;
    const bool valid = !ends && measure(row, &drafted);
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
      break;
    }
    keep(row, drafted.token);
    reach = block_reach(drafted, reach);
  }
  if (kept == row) return kept;
  clear_from(kept);
  Drafted drafted;
  measure(kept, &drafted);
  complete();
  emit(kept, replacement(kept, drafted, scaled(kept_reach)));
  return kept;
}

void ChainWalk::run() {
  clear_from(0);
  int64_t row = 0;
  if (params_.rule == RuleId::kBlock && !at_zero_) {
    row = run_block();
  } else {
    while ((has_child(row) || params_.bonus) && step(row)) ++row;
  }
  params_.num_accepted[batch_] = static_cast<int32_t>(row);
  params_.status[batch_] = status_;
}

}  // namespace

void verify(const VerifyParams& params, int threads) {
  for_each_row(params.ensemble, params.batch, params.nodes + 1, threads,
               [&](RowLaws& laws, int64_t batch) { ChainWalk(params, laws, batch).run(); });
}

}  // namespace specens
