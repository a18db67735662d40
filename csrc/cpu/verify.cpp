// SPDX-License-Identifier: Apache-2.0
// `verify` for chains: row after row, a sweep for the laws, then the draft token's coin against a
// few gathered probabilities; the first rejection, or the end of the chain, emits a token and
// stops. Only a rejected dense draft costs a second sweep, of its own row, for the residual's
// sub-tile masses.
#include <cmath>
#include <memory>

#include "law.h"

namespace specens {
namespace {

// Below this total the rounding of single precision would show in a residual's masses.
constexpr double kLeastSingleResidual = 1e-4;

// A residual of less mass is rounding, and empty; the reference's LEAST_RESIDUAL.
constexpr double kLeastResidual = 0x1p-40;

constexpr int kSubTilesPerPiece = 8;

// max(target - kept, 0) for whole sub-tiles, where the draft is a law or a single token.
class Residual {
 public:
  Residual(const VerifyParams& params, RowLaws& laws, int64_t token)
      : params_(params), laws_(laws), target_(laws.target()), token_(token) {}

  // The token that replaces a rejected draft; false if the residual is empty.
  bool draw_from(bool dense, const double (&numbers)[3], int64_t* token);

 private:
  bool measure_point();
  bool measure_dense(bool single);
  void fill(bool dense, int sub_tile, double* out) const;

  const VerifyParams& params_;
  RowLaws& laws_;
  const Law& target_;
  int64_t token_;
  std::unique_ptr<double[]> masses_;
};

double left(const VerifyParams& params, double target, double draft) {
  return with_rule(params.rule, [&](auto rule) {
    return std::max(target - rule.kept(target, draft, params.lenience), 0.0);
  });
}

// A draft that is one token leaves every other token whole.
void Residual::fill(bool dense, int sub_tile, double* out) const {
  const int count = target_.count(sub_tile);
  std::fill_n(out, padded(count), 0.0);
  target_.add_masses(sub_tile, 1.0, out);
  if (dense) {
    double drafted[kSubTile] = {};
    laws_.draft().add_masses(sub_tile, 1.0, drafted);
    for (int i = 0; i < count; ++i) out[i] = left(params_, out[i], drafted[i]);
  } else if (token_ / kSubTile == sub_tile) {
    double& here = out[token_ % kSubTile];
    here = left(params_, here, 1.0);
  }
}

double sum(const double* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

bool Residual::measure_point() {
  const int sub_tile = static_cast<int>(token_ / kSubTile);
  double buffer[kSubTile];
  fill(false, sub_tile, buffer);
  std::copy_n(target_.masses(), target_.sub_tiles(), masses_.get());
  masses_[sub_tile] = sum(buffer, target_.count(sub_tile));
  return sum(masses_.get(), target_.sub_tiles()) > kLeastResidual;
}

bool Residual::measure_dense(bool single) {
  // Two laws that are nearly equal differ by less than what their normalisers are good to.
  if (!single) laws_.refine();
  laws_.team().for_each(target_.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
    const int sub_tile = static_cast<int>(index);
    masses_[index] = 0.0;
    if (target_.masses()[index] == 0.0) return;
    if (single) {
      masses_[index] = target_.residual(sub_tile, laws_.draft(), params_.rule, params_.lenience);
      return;
    }
    double buffer[kSubTile];
    fill(true, sub_tile, buffer);
    masses_[index] = sum(buffer, target_.count(sub_tile));
  });
  return sum(masses_.get(), target_.sub_tiles()) > (single ? kLeastSingleResidual : kLeastResidual);
}

bool Residual::draw_from(bool dense, const double (&numbers)[3], int64_t* token) {
  masses_.reset(new double[target_.sub_tiles()]);
  const bool single = target_.has_single_precision() && !laws_.draft_is_empty();
  const bool found =
      dense ? (single && measure_dense(true)) || measure_dense(false) : measure_point();
  if (!found) return false;
  *token = draw(masses_.get(), target_.vocab_size(), numbers,
                [&](int sub_tile, double* out) { fill(dense, sub_tile, out); });
  return true;
}

// One batch row.
class Walk {
 public:
  Walk(const VerifyParams& params, RowLaws& laws, int64_t batch)
      : params_(params),
        laws_(laws),
        batch_(batch),
        greedy_(params.rule == RuleId::kGreedy || greedy_row(params.ensemble, batch)) {}

  void run();

 private:
  bool step(int64_t row);
  bool has_child(int64_t row) const;
  bool read_proposal(int64_t row, Proposal* proposal) const;
  bool accepts(int64_t row, int64_t token, const Proposal& proposal) const;
  int64_t replacement(int64_t row, int64_t token, const Proposal& proposal);
  void emit(int64_t row, int64_t token);

  const VerifyParams& params_;
  RowLaws& laws_;
  int64_t batch_;
  bool greedy_;
  int64_t best_ = 0;
  int32_t status_ = 0;
};

bool Walk::has_child(int64_t row) const {
  return row < params_.nodes && params_.draft_tokens.at(batch_, row) != kPadding;
}

// False if the draft is invalid.
bool Walk::read_proposal(int64_t row, Proposal* proposal) const {
  const int64_t token = params_.draft_tokens.at(batch_, row);
  if (token < 0 || token >= params_.ensemble.vocab_size) return false;
  if (params_.proposers.data != nullptr) {
    const int64_t member = params_.proposers.at(batch_, row);
    if (member < kPadding || member >= params_.ensemble.num_members) return false;
    if (!greedy_) proposal->member = static_cast<int>(member);
  } else if (params_.draft_logits.data != nullptr && !greedy_) {
    proposal->row = row_of(params_.draft_logits, batch_, row);
    proposal->dtype = params_.draft_logits.dtype;
    proposal->temperature = params_.draft_temperature.at(batch_);
  }
  return true;
}

bool Walk::accepts(int64_t row, int64_t token, const Proposal& proposal) const {
  const double coin = params_.uniforms.at(batch_, row + 1, 0);
  const Law& target = laws_.target();
  if (greedy_) return !target.empty() && token == best_ && coin < 1.0;
  const double draft = proposal.dense() ? laws_.draft().probability(token) : 1.0;
  const double mass = target.probability(token);
  return with_rule(params_.rule, [&](auto rule) {
    return coin * draft < rule.kept(mass, draft, params_.lenience);
  });
}

// Of a rejected draft.
int64_t Walk::replacement(int64_t row, int64_t token, const Proposal& proposal) {
  if (greedy_) return best_;
  if (laws_.target().empty()) return 0;
  int64_t drawn = 0;
  Residual residual(params_, laws_, token);
  if (residual.draw_from(proposal.dense(), draw_numbers(params_.uniforms, batch_, row).value,
                         &drawn)) {
    return drawn;
  }
  status_ |= kEmptyResidual;
  return draw_from(laws_.target(), params_.uniforms, batch_, row);
}

void Walk::emit(int64_t row, int64_t token) {
  const int64_t place = batch_ * (params_.nodes + 1) + row;
  params_.tokens[place] = token;
  params_.log_probs[place] = static_cast<float>(laws_.target().log_probability(token));
}

// Whether the child of this row is kept.
bool Walk::step(int64_t row) {
  Proposal proposal;
  const bool child = has_child(row);
  const bool valid = child && read_proposal(row, &proposal);
  laws_.measure_target(batch_, row, proposal);
  const Law& target = laws_.target();
  status_ |= laws_.status() | laws_.draft_status() | (target.empty() ? kEmptyLaw : 0) |
             (child && !valid ? kInvalidDraft : 0);
  if (greedy_) best_ = laws_.argmax();
  const int64_t token = valid ? params_.draft_tokens.at(batch_, row) : kPadding;
  if (valid && accepts(row, token, proposal)) {
    emit(row, token);
    params_.path[batch_ * params_.nodes + row] = static_cast<int32_t>(row + 1);
    return true;
  }
  if (valid) {
    emit(row, replacement(row, token, proposal));
  } else {
    emit(row, greedy_ ? best_ : draw_from(target, params_.uniforms, batch_, row));
  }
  return false;
}

void Walk::run() {
  const int64_t nodes = params_.nodes;
  std::fill_n(params_.tokens + batch_ * (nodes + 1), nodes + 1, int64_t{kPadding});
  std::fill_n(params_.log_probs + batch_ * (nodes + 1), nodes + 1, 0.0f);
  std::fill_n(params_.path + batch_ * nodes, nodes, int32_t{kPadding});
  int64_t row = 0;
  while ((has_child(row) || params_.bonus) && step(row)) ++row;
  params_.num_accepted[batch_] = static_cast<int32_t>(row);
  params_.status[batch_] = status_;
}

}  // namespace

void verify(const VerifyParams& params, int threads) {
  for_each_row(params.ensemble, params.batch, params.nodes + 1, threads,
               [&](RowLaws& laws, int64_t batch) { Walk(params, laws, batch).run(); });
}

}  // namespace specens
