// SPDX-License-Identifier: Apache-2.0
// How an ensemble becomes the laws of a row: who is swept, at which temperature and filter, and
// what is left for later because its log-sum-exp is known.
#include "row_laws.h"

#include <algorithm>
#include <cmath>

namespace specens {
namespace {

// Single-precision normalisers cannot tell apart log-probabilities nearer than this, in nats.
constexpr double kNearTie = 1e-6;

}  // namespace

bool greedy_row(const Ensemble& ensemble, int64_t batch) {
  for (int k = 0; k < ensemble.num_members; ++k) {
    if (ensemble.temperature.at(batch, 0, k) > 0.0f) return false;
  }
  return true;
}

const void* row_of(const Logits& logits, int64_t batch, int64_t row) {
  const int64_t offset = batch * logits.batch_stride + row * logits.row_stride;
  return static_cast<const char*>(logits.data) + offset * element_size(logits.dtype);
}

RowLaws::RowLaws(const Ensemble& ensemble, const Team& team) : ensemble_(ensemble), team_(team) {
  const int count = ensemble.num_members + 2;
  const int64_t vocab_size = ensemble.vocab_size;
  const auto sub_tiles = static_cast<size_t>((vocab_size + kSubTile - 1) / kSubTile);
  const auto width = static_cast<size_t>(padded(static_cast<int>(sub_tiles)));
  laws_.reset(new LogitsLaw[count]);
  peaks_.reset(new Peak[(count + 1) * sub_tiles]);
  masses_.reset(new double[(count + 2) * width]);
  for (int i = 0; i < count; ++i) {
    laws_[i].attach(vocab_size, &peaks_[i * sub_tiles], &masses_[i * width]);
  }
  warped_.attach(vocab_size, &peaks_[count * sub_tiles], &masses_[count * width]);
  mixture_.attach(vocab_size, &masses_[(count + 1) * width]);
}

void RowLaws::move_to(int64_t batch, int64_t row) {
  batch_ = batch;
  row_ = row;
  place_ = ensemble_.rows.data == nullptr ? row : ensemble_.rows.at(batch, row);
  std::fill(std::begin(drafts_), std::end(drafts_), nullptr);
  late_.count = late_drafts_.count = 0;
  refined_ = false;
  drafts_made_ = 0;
  greedy_ = greedy_row(ensemble_, batch);
  filter_ = Filter{};
  if (greedy_) return;
  if (ensemble_.top_k.data != nullptr) filter_.top_k = ensemble_.top_k.at(batch);
  if (ensemble_.top_p.data != nullptr) filter_.top_p = ensemble_.top_p.at(batch);
  if (ensemble_.min_p.data != nullptr) filter_.min_p = ensemble_.min_p.at(batch);
}

double RowLaws::temperature(int member) const {
  return greedy_ ? 1.0 : bounded_temperature(ensemble_.temperature.at(batch_, 0, member));
}

// At which a member is folded.
double RowLaws::member_temperature(int member) const {
  return ensemble_.warp_members ? temperature(member) : 1.0;
}

// Whether the ensemble's warp changes nothing at this temperature.
bool RowLaws::is_identity(double temperature) const {
  return temperature == 1.0 && !filter_.active();
}

double RowLaws::lse_at(int member) const {
  return ensemble_.lse.data == nullptr ? kInfinity : ensemble_.lse.at(batch_, place_, member);
}

// Whether a row need not be swept for its normaliser.
bool RowLaws::is_known(double lse, double temperature) const {
  return !greedy_ && std::isfinite(lse) && temperature > 0.0;
}

void RowLaws::set_member(LogitsLaw& law, int member, double temperature,
                         const Filter& filter) const {
  const Logits& logits = ensemble_.members[member];
  law.set(temperature, filter);
  law.add_source(row_of(logits, batch_, place_), logits.dtype, 1.0);
}

void RowLaws::measure_member(int64_t batch, int64_t row, int member) {
  move_to(batch, row);
  LogitsLaw& law = laws_[member];
  set_member(law, member, temperature(member), filter_);
  Sweep sweep;
  sweep.add(law);
  sweep.run(team_);
  target_ = &law;
  status_ = law.status();
}

void RowLaws::measure_target(int64_t batch, int64_t row, const Proposal& proposal) {
  move_to(batch, row);
  Sweep sweep;
  if (proposal.dense()) set_draft(proposal, sweep);
  if (ensemble_.space == Space::kProbabilities) {
    measure_mixture(sweep);
  } else {
    measure_product(sweep);
  }
  status_ = target_->status();
  take_draft_status(proposal);
}

void RowLaws::measure_draft(const Proposal& proposal) {
  if (drafts_[proposal.slot()] == nullptr) {
    Sweep sweep;
    set_draft(proposal, sweep);
    sweep.run(team_);
    if (refined_) {  // a draft beside exact laws is exact, too
      complete_draft();
      drafts_[proposal.slot()]->refine(team_);
    }
  }
  take_draft_status(proposal);
}

double RowLaws::own_temperature(const Proposal& proposal) const {
  if (greedy_ || proposal.probabilities) return 1.0;
  return proposal.member == kPadding ? proposal.temperature : temperature(proposal.member);
}

double RowLaws::own_lse(const Proposal& proposal) const {
  if (proposal.probabilities) return 0.0;
  return proposal.member == kPadding ? proposal.lse : lse_at(proposal.member);
}

bool RowLaws::is_known(const Proposal& proposal) const {
  return proposal.probabilities || is_known(own_lse(proposal), own_temperature(proposal));
}

// Nobody reads a row that is known for its status.
void RowLaws::take_draft_status(const Proposal& proposal) {
  draft_status_ = 0;
  if (!proposal.dense() || is_known(proposal)) return;
  draft_status_ = drafts_[proposal.slot()]->status();
}

LogitsLaw& RowLaws::next_draft() {
  if (drafts_made_++ == 0) return laws_[ensemble_.num_members + 1];
  if (others_.size() < drafts_made_ - 1) {
    const int sub_tiles = mixture_.sub_tiles();
    others_.emplace_back(new Another);
    Another& another = *others_.back();
    another.peaks.reset(new Peak[sub_tiles]);
    another.masses.reset(new double[padded(sub_tiles)]);
    another.law.attach(ensemble_.vocab_size, another.peaks.get(), another.masses.get());
  }
  return others_[drafts_made_ - 2]->law;
}

// Whether a member's law among the mixture's is the one that it proposes by. It is not if the
// mixture is what is warped.
bool RowLaws::is_measured_as_member(const Proposal& proposal) const {
  if (ensemble_.space != Space::kProbabilities || weight(proposal.member) == 0.0) return false;
  if (ensemble_.warp_members) return proposal.filtered || !filter_.active();
  return is_identity(own_temperature(proposal));
}

void RowLaws::set_draft(const Proposal& proposal, Sweep& sweep) {
  const int member = proposal.member;
  const bool separate = member == kPadding;
  if (!separate && is_measured_as_member(proposal)) {
    drafts_[member] = &laws_[member];
    return;
  }
  const double own = own_temperature(proposal);
  const Filter filter = proposal.filtered && !proposal.probabilities ? filter_ : Filter{};
  LogitsLaw& draft = next_draft();
  drafts_[proposal.slot()] = &draft;
  if (separate) {
    draft.set(own, filter);
    Source& source = draft.add_source(proposal.row, proposal.dtype, 1.0);
    if (proposal.probabilities) source.cleaning = Cleaning::kLogarithm;
  } else {
    set_member(draft, member, own, filter);
  }
  if (is_known(proposal)) {
    draft.set_lse(own_lse(proposal));
    late_drafts_.add(draft);
  } else {
    sweep.add(draft);
  }
}

void RowLaws::complete() {
  if (late_.count == 0) return;
  late_.run(team_);
  late_.count = 0;
  finish_mixture();
}

void RowLaws::complete_draft() {
  complete();
  if (late_drafts_.count > 0) late_drafts_.run(team_);
  late_drafts_.count = 0;
}

void RowLaws::refine() {
  complete_draft();
  if (refined_) return;
  refined_ = true;
  // The values of a warped mixture, and so its cutoff, come from its parts as they are.
  for (int k = 0; k < ensemble_.num_members + 1; ++k) {
    LogitsLaw& law = laws_[k];
    if (&law == target_ || (target_ == &mixture_ && mixture_.has_part(law))) law.refine(team_);
  }
  for (LogitsLaw* draft : drafts_) {
    if (draft == nullptr || draft == target_) continue;
    if (target_ == &mixture_ && mixture_.has_part(*draft)) continue;
    draft->refine(team_);
  }
  if (target_ == &warped_) warped_.refine(team_);
}

int64_t RowLaws::argmax() {
  complete();
  const Argmax best = target_->argmax(kNearTie);
  if (!best.tied) return best.token;
  refine();
  return target_->argmax(kTieGap).token;
}

void RowLaws::measure_mixture(Sweep& sweep) {
  const Filter filter = ensemble_.warp_members ? filter_ : Filter{};
  for (int k = 0; k < ensemble_.num_members; ++k) {
    if (weight(k) == 0.0) continue;
    const double own = member_temperature(k), lse = lse_at(k);
    set_member(laws_[k], k, own, filter);
    const bool known = is_known(lse, own);
    if (known) laws_[k].set_lse(lse);
    (known ? late_ : sweep).add(laws_[k]);
  }
  sweep.run(team_);
  finish_mixture();
}

// From its parts, as far as they are measured.
void RowLaws::finish_mixture() {
  mixture_.clear();
  for (int k = 0; k < ensemble_.num_members; ++k) {
    if (weight(k) != 0.0) mixture_.add_part(laws_[k], weight(k));
  }
  target_ = &mixture_;
  if (late_.count > 0) {
    mixture_.finish_shares();
    return;
  }
  mixture_.finish();
  if (ensemble_.warp_members || is_identity(temperature(0)) || mixture_.empty()) return;
  warped_.set(mixture_, temperature(0), filter_, team_);
  target_ = &warped_;
}

// The member whose law the product is, if it is one's: weights 1 and 0, and no mask.
int RowLaws::only_member() const {
  int only = -1;
  if (ensemble_.plausibility > 0.0) return -1;
  for (int k = 0; k < ensemble_.num_members; ++k) {
    if (weight(k) == 0.0) continue;
    if (weight(k) != 1.0 || only >= 0) return -1;
    only = k;
  }
  return only;
}

void RowLaws::measure_product(Sweep& sweep) {
  LogitsLaw& product = laws_[ensemble_.num_members];
  const int alone = only_member();
  if (alone >= 0) {
    set_member(product, alone, temperature(alone), filter_);
  } else if (ensemble_.warp_members) {
    product.set(1.0, Filter{});
    product.set_infinite_wins();
    add_sources(product);
  } else {
    product.set(temperature(0), filter_);
    add_sources(product);
  }
  sweep.add(product);
  sweep.run(team_);
  target_ = &product;
}

// Members whose values are cut before they are folded are looked at on their own first.
bool RowLaws::is_cut(int member) const {
  const bool filtered = filter_.active() || !(member_temperature(member) > 0.0);
  return ensemble_.warp_members && weight(member) != 0.0 && filtered;
}

void RowLaws::add_sources(LogitsLaw& product) {
  const Ensemble& e = ensemble_;
  const Filter filter = e.warp_members ? filter_ : Filter{};
  const bool masks = e.plausibility > 0.0;  // member 0 does
  Sweep alone;
  for (int k = 0; k < e.num_members; ++k) {
    if (!is_cut(k) && !(k == 0 && masks)) continue;
    set_member(laws_[k], k, member_temperature(k), filter);
    alone.add(laws_[k]);
  }
  alone.run(team_, /*tops_only=*/true);
  for (int k = 0; k < e.num_members; ++k) {
    const LogitsLaw& member = laws_[k];
    const double own = member_temperature(k), scale = own > 0.0 ? own : 1.0;
    const void* row = row_of(e.members[k], batch_, place_);
    double least = -kInfinity;
    if (k == 0 && masks) least = member.value_top() + scale * logarithm(e.plausibility);
    if (weight(k) == 0.0) {
      if (least == -kInfinity) continue;
      Source& mask = product.add_source(row, e.members[k].dtype, 1.0);
      mask.cleaning = Cleaning::kMask;
      mask.threshold = round_up(least);
      continue;
    }
    Source& source = product.add_source(row, e.members[k].dtype, weight(k) / scale);
    const bool looked_at = is_cut(k) || (k == 0 && masks);
    if (looked_at && (member.status() & kNanLogits) != 0) product.set_nan(source);
    if (is_cut(k)) least = std::max(least, member.cutoff());
    source.cutoff = round_up(least);
  }
}

}  // namespace specens
