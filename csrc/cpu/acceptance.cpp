// SPDX-License-Identifier: Apache-2.0
// Sweeps of both laws for the rules; the cheap ones need none.
#include "acceptance.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "../rules/k_seq.h"

namespace specens {
namespace {

// Masses of sub-tiles are of single precision.
constexpr double kMassSlack = 1e-5;

// Where `k_seq` leaves less of the target, the rounding of single precision would show.
constexpr double kLeastLeft = 1e-2;

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
  At(const VerifyParams& params, RowLaws& laws, const Leftover& target, const Drafted& drafted)
      : p(target.probability(drafted.token)),
        q(draft_probability(laws, drafted, drafted.token)),
        memory(drafted.memory),
        parameters(drafted.parameters),
        vocab_size(params.ensemble.vocab_size),
        at_zero(drafted.at_zero),
        laws_(laws),
        target_(target),
        drafted_(drafted) {}

  const double p, q, memory;
  const double* const parameters;
  const int64_t vocab_size;
  const bool at_zero;

  double highest(Side side) const {
    laws_.complete_draft();
    if (side == Side::kTarget) return target_.highest();
    if (!drafted_.dense()) return 1.0;
    if (drafted_.gone.empty()) return laws_.draft(drafted_.slot).highest();
    return largest_mass(
        laws_, [&](int sub_tile, double* out) { fill_draft(laws_, drafted_, sub_tile, out); });
  }

  double least_of_top(Side side, int64_t n) const {
    const bool drafts = side == Side::kDraft;
    if (drafts && !drafted_.dense()) return n == 1 ? 1.0 : 0.0;
    laws_.complete_draft();
    const RowLaw& target = laws_.target();
    if (drafts ? laws_.draft(drafted_.slot).empty() : target.empty()) return 0.0;
    Best best(n);
    laws_.team().for_each(target.sub_tiles(), kSubTilesPerPiece, [&](int, int64_t index) {
      const int sub_tile = static_cast<int>(index);
      const double most =
          drafts ? laws_.draft(drafted_.slot).masses()[index] * drafted_.share * (1.0 + kMassSlack)
                 : target_.bound(sub_tile);
      if (most < best.threshold()) return;
      double values[kSubTile];
      if (drafts) {
        fill_draft(laws_, drafted_, sub_tile, values);
      } else {
        target_.fill(sub_tile, values);
      }
      best.offer(values, target.count(sub_tile));
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
      target_.fill(sub_tile, whole);
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
  const Leftover& target_;
  const Drafted& drafted_;
};

}  // namespace

Judgement judge(const VerifyParams& params, RowLaws& laws, const Leftover& target,
                const Drafted& drafted) {
  const At at(params, laws, target, drafted);
  return with_rule(params.rule, [&](auto rule) { return rule.judge(at); });
}

double k_seq_ratio(const VerifyParams& params, RowLaws& laws, const Drafted& drafted,
                   int candidates) {
  const Leftover target(laws);
  // Log-sum-exps that were given need not make a law that sums to 1, which shows here.
  const bool given = params.ensemble.lse.data != nullptr || params.draft_lse.data != nullptr ||
                     params.layout.draft_probabilities;
  if (given) laws.refine();
  KSeqSearch search(candidates, given);
  for (bool refined = given; !search.found;) {
    const At at(params, laws, target, drafted);
    const Sums sums = at.sums(search.refused());
    if (!refined && sums.value[0] < kLeastLeft) {
      laws.refine();
      refined = true;
      continue;
    }
    search.step(sums);
  }
  return search.ratio;
}

Judgement k_seq_judgement(const RowLaws& laws, const Drafted& drafted, double ratio) {
  Judgement judgement;
  judgement.scale = 1.0 / ratio;
  judgement.kept = minimum(laws.target().probability(drafted.token) * judgement.scale,
                           draft_probability(laws, drafted, drafted.token));
  return judgement;
}

bool is_asked_at_zero(RuleId rule) {
  return with_rule(rule, [](auto chosen) { return decltype(chosen)::kAtZero; });
}

bool needs_draft_at_zero(RuleId rule) {
  return with_rule(rule, [](auto chosen) { return decltype(chosen)::kNeedsDraft; });
}

}  // namespace specens
