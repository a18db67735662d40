// SPDX-License-Identifier: Apache-2.0
// Sweeps of both laws for the rules. The cheap rules need none; a gate's replacement is the target
// itself; and max(scale p - q, 0) has a kernel in single precision, unless it is next to nothing.
#include "acceptance.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "draw.h"

namespace specens {
namespace {

// Below this total the rounding of single precision would show in what is left.
constexpr double kLeastSingle = 1e-4;

// What is left of less mass is rounding, and empty; the reference's LEAST_RESIDUAL.
constexpr double kLeast = 0x1p-40;

double sum(const double* values, int64_t count) {
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

void fill_law(const RowLaw& law, int sub_tile, double* out) {
  std::fill_n(out, padded(law.count(sub_tile)), 0.0);
  law.add_masses(sub_tile, 1.0, out);
}

// q of a sub-tile.
void fill_draft(const RowLaws& laws, const Drafted& drafted, int sub_tile, double* out) {
  if (drafted.dense) {
    fill_law(laws.draft(), sub_tile, out);
    return;
  }
  std::fill_n(out, padded(laws.target().count(sub_tile)), 0.0);
  if (drafted.token / kSubTile == sub_tile) out[drafted.token % kSubTile] = 1.0;
}

// Finds the n-th largest probability in one sweep: a list of the largest so far, cut in half when
// it is full, whose least is a threshold for all that comes.
class Best {
 public:
  explicit Best(int64_t n) : n_(static_cast<size_t>(n)) {}

  double threshold() const { return threshold_.load(std::memory_order_relaxed); }

  void offer(const double* values, int count) {
    const double threshold = this->threshold();
    double found[kSubTile];
    int size = 0;
    for (int i = 0; i < count; ++i) {
      if (values[i] > threshold) found[size++] = values[i];
    }
    if (size == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    listed_.insert(listed_.end(), found, found + size);
    if (listed_.size() >= 2 * n_ + kSubTile) cut();
  }

  double nth_largest() {
    if (listed_.size() < n_) return threshold();
    cut();
    return threshold();
  }

 private:
  void cut() {
    const auto nth = listed_.begin() + static_cast<int64_t>(n_) - 1;
    std::nth_element(listed_.begin(), nth, listed_.end(), std::greater<double>());
    threshold_.store(*nth, std::memory_order_relaxed);
    listed_.resize(n_);
  }

  size_t n_;
  std::mutex mutex_;
  std::vector<double> listed_;
  std::atomic<double> threshold_{0.0};  // no fewer than n are as large, or it is 0
};

// The `At` of rules/judgement.h.
class At {
 public:
  At(const VerifyParams& params, RowLaws& laws, const Drafted& drafted)
      : p(laws.target().probability(drafted.token)),
        q(drafted.dense ? laws.draft().probability(drafted.token) : 1.0),
        memory(drafted.memory),
        parameters(params.parameters),
        vocab_size(params.ensemble.vocab_size),
        at_zero(drafted.at_zero),
        laws_(laws),
        drafted_(drafted) {}

  const double p, q, memory;
  const double* const parameters;
  const int64_t vocab_size;
  const bool at_zero;

  double highest(Side side) const {
    laws_.complete_draft();
    if (side == Side::kTarget) return laws_.target().highest();
    return drafted_.dense ? laws_.draft().highest() : 1.0;
  }

  double least_of_top(Side side, int64_t n) const {
    if (side == Side::kDraft && !drafted_.dense) return n == 1 ? 1.0 : 0.0;
    laws_.complete_draft();
    const RowLaw& law = side == Side::kTarget ? laws_.target() : laws_.draft();
    if (law.empty()) return 0.0;
    Best best(n);
    laws_.team().for_each(law.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
      // No token has more than its sub-tile, whose mass is of single precision.
      if (law.masses()[index] * (1.0 + 1e-5) < best.threshold()) return;
      double values[kSubTile];
      fill_law(law, static_cast<int>(index), values);
      best.offer(values, law.count(static_cast<int>(index)));
    });
    return best.nth_largest();
  }

  template <typename Sum>
  Sums sums(const Sum& sum) const {
    laws_.complete_draft();
    const RowLaw& target = laws_.target();
    std::unique_ptr<Sums[]> parts(new Sums[target.sub_tiles()]);
    laws_.team().for_each(target.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
      const int sub_tile = static_cast<int>(index);
      double whole[kSubTile], drafted[kSubTile];
      fill_law(target, sub_tile, whole);
      if (Sum::kReadsDraft) fill_draft(laws_, drafted_, sub_tile, drafted);
      parts[index] = kernels().sums[index_of_sum<Sum>()](
          &sum, whole, Sum::kReadsDraft ? drafted : whole, target.count(sub_tile));
    });
    Sums total = {};
    for (int s = 0; s < target.sub_tiles(); ++s) {
      for (int k = 0; k < Sum::kSums; ++k) total.value[k] += parts[s].value[k];
    }
    return total;
  }

 private:
  RowLaws& laws_;
  Drafted drafted_;
};

}  // namespace

Judgement judge(const VerifyParams& params, RowLaws& laws, const Drafted& drafted) {
  const At at(params, laws, drafted);
  return with_rule(params.rule, [&](auto rule) { return rule.judge(at); });
}

bool is_asked_at_zero(RuleId rule) {
  return with_rule(rule, [](auto chosen) { return decltype(chosen)::kAtZero; });
}

bool needs_draft_at_zero(RuleId rule) {
  return with_rule(rule, [](auto chosen) { return decltype(chosen)::kNeedsDraft; });
}

void Leftover::fill(int sub_tile, double* out) const {
  const RowLaw& target = laws_.target();
  const int count = target.count(sub_tile);
  fill_law(target, sub_tile, out);
  if (judgement_.left != Left::kTarget) {
    double drafted[kSubTile];
    fill_draft(laws_, drafted_, sub_tile, drafted);
    for (int i = 0; i < count; ++i) out[i] = left_of(judgement_, out[i], drafted[i]);
  }
  if (judgement_.without_token && drafted_.token / kSubTile == sub_tile) {
    out[drafted_.token % kSubTile] = 0.0;
  }
}

double Leftover::measure_sub_tile(int sub_tile) const {
  double buffer[kSubTile];
  fill(sub_tile, buffer);
  return sum(buffer, laws_.target().count(sub_tile));
}

// Where q is 0 for every token but x, of every other one the same part is left.
void Leftover::measure_point() {
  const RowLaw& target = laws_.target();
  const double scale = judgement_.left == Left::kTarget ? 1.0 : judgement_.scale;
  for (int s = 0; s < target.sub_tiles(); ++s) masses_[s] = scale * target.masses()[s];
  const int sub_tile = static_cast<int>(drafted_.token / kSubTile);
  masses_[sub_tile] = measure_sub_tile(sub_tile);
}

void Leftover::measure_dense(bool exactly) {
  const RowLaw& target = laws_.target();
  const bool single = !exactly && judgement_.left == Left::kScaled;
  laws_.team().for_each(target.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
    const int sub_tile = static_cast<int>(index);
    const bool excludes = judgement_.without_token && drafted_.token / kSubTile == index;
    masses_[index] = target.masses()[index] == 0.0 ? 0.0
                     : single && !excludes
                         ? residual(target, laws_.draft(), sub_tile, judgement_.scale)
                         : measure_sub_tile(sub_tile);
  });
}

bool Leftover::measure(bool exactly) {
  laws_.complete_draft();
  const RowLaw& target = laws_.target();
  const bool scaled = judgement_.left == Left::kScaled;
  if (scaled && judgement_.scale == 0.0) return false;
  masses_.reset(new double[target.sub_tiles()]);
  const bool dense = drafted_.dense && judgement_.left != Left::kTarget;
  Part parts[kMaxMembers];
  if (!dense) {
    measure_point();
  } else if (exactly || !scaled || (target.parts(parts) > 0 && !laws_.draft_is_empty())) {
    measure_dense(exactly);
  } else {
    return false;
  }
  mass_ = sum(masses_.get(), target.sub_tiles());
  return mass_ > (exactly || !dense ? kLeast : kLeastSingle);
}

int64_t Leftover::draw_from(const double (&numbers)[3]) const {
  return draw(masses_.get(), laws_.target().vocab_size(), numbers,
              [&](int sub_tile, double* out) { fill(sub_tile, out); });
}

int64_t best_but(RowLaws& laws, int64_t token) {
  laws.refine();
  const RowLaw& target = laws.target();
  const auto masses = [&](int sub_tile, double* out) {
    fill_law(target, sub_tile, out);
    if (token / kSubTile == sub_tile) out[token % kSubTile] = 0.0;
  };
  std::unique_ptr<double[]> best(new double[target.sub_tiles()]);
  laws.team().for_each(target.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
    double here[kSubTile];
    masses(static_cast<int>(index), here);
    best[index] = *std::max_element(here, here + target.count(static_cast<int>(index)));
  });
  const double most = *std::max_element(best.get(), best.get() + target.sub_tiles());
  if (!(most > 0.0)) return 0;
  const double tied = least(most);
  const auto first = static_cast<int>(std::find_if(best.get(), best.get() + target.sub_tiles(),
                                                   [&](double mass) { return mass >= tied; }) -
                                      best.get());
  double here[kSubTile];
  masses(first, here);
  const double* place =
      std::find_if(here, here + target.count(first), [&](double mass) { return mass >= tied; });
  return static_cast<int64_t>(first) * kSubTile + (place - here);
}

}  // namespace specens
