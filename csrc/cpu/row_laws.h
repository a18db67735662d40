// SPDX-License-Identifier: Apache-2.0
// Makes the ensemble's law and a proposer's at one (batch, row) after another; every op but
// `uniforms` goes through it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "mixture_law.h"

namespace specens {

// What a child of a row was drawn from, where it is not a point mass.
struct Proposal {
  int member = kPadding;
  const void* row = nullptr;  // of separate draft logits
  DType dtype = DType::kFloat32;
  double temperature = 1.0;
  double lse = kInfinity;  // not known
  bool filtered = true;    // as the target is
  bool probabilities = false;

  bool dense() const { return member != kPadding || row != nullptr; }
  // The place of a dense one's law among those of a row.
  int slot() const { return member != kPadding ? member : kMaxMembers; }
};

class RowLaws {
 public:
  // `team` outlives this.
  RowLaws(const Ensemble& ensemble, const Team& team);

  // Makes the ensemble's law at this row, and the proposal's if it is dense. Rows whose log-sum-exp
  // is known are not swept: single tokens can be asked for, all else of the target after
  // `complete`, of drafts after `complete_draft`, which completes both.
  void measure_target(int64_t batch, int64_t row, const Proposal& proposal);
  // Makes one more dense proposal's law at the row of the target.
  void measure_draft(const Proposal& proposal);
  void complete();
  void complete_draft();
  // Makes the law of one member alone.
  void measure_member(int64_t batch, int64_t row, int member);

  // The target's most probable token, the lowest id on ties.
  int64_t argmax();

  // Makes the normalisers of both exact up to double precision.
  void refine();

  const RowLaw& target() const { return *target_; }
  // Of a dense proposal that was measured at this row.
  const LogitsLaw& draft(int slot) const { return *drafts_[slot]; }
  // Of the rows of the target that were not known; of the last draft's, if it was not.
  int32_t status() const { return status_; }
  int32_t draft_status() const { return draft_status_; }
  const Team& team() const { return team_; }

 private:
  // Laws that are swept together.
  struct Sweep {
    LogitsLaw* laws[kMaxMembers + 2];
    int count = 0;

    void add(LogitsLaw& law) { laws[count++] = &law; }
    void run(const Team& team, bool tops_only = false) const {
      LogitsLaw::measure(laws, count, team, tops_only);
    }
  };

  void move_to(int64_t batch, int64_t row);
  double weight(int member) const {
    return counted_weight(ensemble_.weights.at(batch_, row_, member), ensemble_.space);
  }
  double temperature(int member) const;
  double member_temperature(int member) const;
  bool is_identity(double temperature) const;
  bool is_measured_as_member(const Proposal& proposal) const;
  bool is_known(double lse, double temperature) const;
  double lse_at(int member) const;
  void set_member(LogitsLaw& law, int member, double temperature, const Filter& filter) const;
  void set_draft(const Proposal& proposal, Sweep& sweep);
  double own_temperature(const Proposal& proposal) const;
  double own_lse(const Proposal& proposal) const;
  bool is_known(const Proposal& proposal) const;
  LogitsLaw& next_draft();
  void take_draft_status(const Proposal& proposal);
  void measure_mixture(Sweep& sweep);
  void finish_mixture();
  void measure_product(Sweep& sweep);
  int only_member() const;
  bool is_cut(int member) const;
  void add_sources(LogitsLaw& product);

  const Ensemble& ensemble_;
  const Team& team_;
  std::unique_ptr<LogitsLaw[]> laws_;  // of each member, of the product, of a draft
  // Of more drafts of one row that are no members of the mixture, made when they are needed.
  struct Another {
    LogitsLaw law;
    std::unique_ptr<Peak[]> peaks;
    std::unique_ptr<double[]> masses;
  };
  std::vector<std::unique_ptr<Another>> others_;
  size_t drafts_made_ = 0;  // at this row
  MixtureLaw mixture_;
  WarpedMixture warped_;
  std::unique_ptr<Peak[]> peaks_;
  std::unique_ptr<double[]> masses_;

  int64_t batch_ = 0, row_ = 0;
  int64_t place_ = 0;    // of the row in the members' logits
  bool greedy_ = false;  // all temperatures are 0
  Filter filter_;
  const RowLaw* target_ = nullptr;
  LogitsLaw* drafts_[kMaxMembers + 1] = {};  // by slot; null: not measured at this row
  // Not swept yet:
  Sweep late_;
  Sweep late_drafts_;
  bool refined_ = false;
  int32_t status_ = 0;
  int32_t draft_status_ = 0;
};

bool greedy_row(const Ensemble& ensemble, int64_t batch);
const void* row_of(const Logits& logits, int64_t batch, int64_t row);

// Calls function(laws, index) for every index below `count`, each about `sweeps` rows of work: on
// one thread each where there are enough of them, else one after another with the whole team.
template <typename Function>
void for_each_row(const Ensemble& ensemble, int64_t count, int64_t sweeps, int threads,
                  const Function& function) {
  const int64_t elements = count * sweeps * ensemble.num_members * ensemble.vocab_size;
  Team::run(threads, elements, [&](const Team& team) {
    const Team alone;
    const bool apart = team.size() > 1 && count >= team.size();
    std::vector<RowLaws> laws;
    for (int i = 0; i < (apart ? team.size() : 1); ++i) {
      laws.emplace_back(ensemble, apart ? alone : team);
    }
    if (apart) {
      team.for_each(count, 1, [&](int thread, int64_t i) { function(laws[thread], i); });
    } else {
      for (int64_t i = 0; i < count; ++i) function(laws[0], i);
    }
  });
}

}  // namespace specens
