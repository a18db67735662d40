// SPDX-License-Identifier: Apache-2.0
// Reads a position: its fields from the op's arguments and, once they are known, its laws from the
// totals of the workspace.
#pragma once

#include "law.cuh"

namespace specens {

__device__ __forceinline__ bool filters_at(const Ensemble& ensemble, int64_t b) {
  return (ensemble.top_k.data != nullptr && ensemble.top_k.at(b) > 0) ||
         (ensemble.top_p.data != nullptr && ensemble.top_p.at(b) < 1.0f) ||
         (ensemble.min_p.data != nullptr && ensemble.min_p.at(b) > 0.0f);
}

__device__ __forceinline__ void set_temperature(Field& field, float given) {
  const float temperature = bounded_temperature(given);
  field.temperature = temperature;
  field.inverse_temperature =
      temperature > 0.0f ? 1.0 / static_cast<double>(temperature) : -static_cast<double>(kNoMass);
}

// The start of a field, which has no law yet.
__device__ __forceinline__ void clear_law(Field& field) {
  field.flags = 0;
  field.empty = false;
  field.known = false;
  field.late = false;
  field.top = 0.0;
  field.log_sum = 0.0;
}

// The law of a field whose log-sum-exp was given, if that counts.
__device__ __forceinline__ void set_lse(Field& field, const Position& position, float lse) {
  if (position.greedy || !(field.temperature > 0.0f) || !isfinite(lse)) return;
  field.known = true;
  const double given = static_cast<double>(lse);
  // Any number will do. Likely tokens are near this one, where single precision is at its best; and
  // it has few digits, so that the distance of a logit to it is exact.
  const double top = rint(given * static_cast<double>(field.temperature) * 16.0) / 16.0;
  field.top = static_cast<double>(static_cast<float>(top));
  field.log_sum = given - field.top * field.inverse_temperature;
}

// What there is to know of a member before the totals; each lane takes one.
__device__ inline void read_member(const Problem& problem, int64_t b, int64_t t, Position& position,
                                   int k, float temperature, const double* cutoffs) {
  const Ensemble& ensemble = problem.ensemble;
  Field& field = position.members[k];
  field.data = row_data(ensemble.members[k], b, t);
  field.dtype = ensemble.members[k].dtype;
  field.weight =
      problem.alone ? 1.0f : counted_weight(ensemble.weights.at(b, t, k), ensemble.space);
  field.share = 0.0;
  clear_law(field);
  field.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + k);
  const bool warps = ensemble.warp_members && !position.greedy;
  set_temperature(field, warps ? temperature : 1.0f);
  field.coefficient = static_cast<double>(field.weight);
  if (field.temperature > 0.0f) field.coefficient /= static_cast<double>(field.temperature);
  if (ensemble.lse.data != nullptr) set_lse(field, position, ensemble.lse.at(b, t, k));
  // Where there is no draft to decide about, the row is read only if the chain comes here.
  field.late = problem.defers() && !position.greedy && (field.known || !position.valid);
  if (position.valid) position.drafted[k] = clean(load_raw(field, position.token));
}

// Who the child of this row was drawn from, and whether it is a token at all; one lane.
__device__ inline void read_child(const Problem& problem, int64_t b, int64_t t,
                                  Position& position) {
  const int members = problem.ensemble.num_members;
  position.token = t < problem.nodes ? problem.draft_tokens.at(b, t) : kPadding;
  position.has_child = position.token != kPadding;
  position.valid = position.token >= 0 && position.token < problem.ensemble.vocab_size;
  position.proposer = kNobody;
  if (problem.proposers.data != nullptr && t < problem.nodes) {
    const int64_t member = problem.proposers.at(b, t);
    position.valid = position.valid && member >= kPadding && member < members;
    if (position.valid && member != kPadding) position.proposer = static_cast<int>(member);
  } else if (problem.draft_logits.data != nullptr && position.valid) {
    position.proposer = kSeparateDraft;
  }
  if ((position.greedy && !problem.dense_when_greedy) || problem.collapsed)
    position.proposer = kNobody;
}

__device__ inline void read_proposal(const Problem& problem, int64_t b, int64_t t,
                                     Position& position, const double* cutoffs) {
  const Ensemble& ensemble = problem.ensemble;
  Field& field = position.proposal;
  clear_law(field);
  field.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + kProposalCutoff);
  if (position.proposer == kNobody) return;
  if (position.proposer == kSeparateDraft) {
    field.data = row_data(problem.draft_logits, b, t);
    field.dtype = problem.draft_logits.dtype;
    set_temperature(field, position.greedy ? 1.0f : problem.draft_temperature.at(b));
    if (problem.draft_lse.data != nullptr) set_lse(field, position, problem.draft_lse.at(b, t));
    field.late = problem.late && field.known;
  } else {
    field.data = row_data(ensemble.members[position.proposer], b, t);
    field.dtype = ensemble.members[position.proposer].dtype;
    set_temperature(field,
                    position.greedy ? 1.0f : ensemble.temperature.at(b, 0, position.proposer));
  }
  position.drafted[kFields] = clean(load_raw(field, position.token));
}

// Fills `position` but for what depends on totals; the whole warp calls this. With `cutoffs_known`,
// they are read, too.
__device__ inline void read_position(const Problem& problem, int64_t place, Position& position,
                                     bool cutoffs_known) {
  const Ensemble& ensemble = problem.ensemble;
  const int lane = lane_id();
  const int64_t b = place / problem.rows, t = place % problem.rows;
  const bool is_member = lane < ensemble.num_members;
  const float temperature = is_member ? ensemble.temperature.at(b, 0, lane) : 0.0f;
  const bool heats = lane < problem.num_temperatures && problem.temperatures.at(b, 0, lane) > 0.0f;
  const bool greedy = __ballot_sync(kAllLanes, heats) == 0;
  const double* cutoffs = cutoffs_known ? problem.cutoffs + place * kCutoffs : nullptr;
  if (lane == 0) {
    position.count = ensemble.num_members;
    position.is_mixture = problem.is_mixture();
    position.greedy = greedy;
    position.empty = false;
    position.plausible =
        cutoffs == nullptr ? kNoMass : static_cast<float>(load_fresh(cutoffs + kPlausibleCutoff));
    read_child(problem, b, t, position);
    Field& target = position.target;
    clear_law(target);
    target.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + kTargetCutoff);
    set_temperature(target, ensemble.warp_members || greedy ? 1.0f : temperature);
    position.warped = position.is_mixture && !ensemble.warp_members && !greedy &&
                      (temperature != 1.0f || filters_at(ensemble, b));
  }
  __syncwarp();
  if (is_member) read_member(problem, b, t, position, lane, temperature, cutoffs);
  if (lane == kLanes - 1) read_proposal(problem, b, t, position, cutoffs);
  __syncwarp();
}

// A mixture of warped members has the proposer's law already.
__device__ __forceinline__ bool proposal_is_member(const Problem& problem,
                                                   const Position& position) {
  return problem.is_mixture() && problem.ensemble.warp_members && position.proposer != kNobody &&
         position.proposer != kSeparateDraft;
}

__device__ __forceinline__ void set_law(Field& field, const Total& total) {
  if (field.known) {
    field.log_sum += (field.top - total.top) * field.inverse_temperature;
  } else {
    field.log_sum = log(total.sum);
    field.empty = !(total.sum > 0.0);
  }
  field.top = total.top;
  field.flags = total.flags;
}

__device__ __forceinline__ void read_law(const Problem& problem, int64_t place, int slot,
                                         Field& field) {
  if (field.late) return;
  set_law(field, load_fresh(&problem.totals[place * problem.slots + slot]));
}

// The shares of the members of a mixture; one lane. A member that is known is never empty, but the
// mixture is if they have no mass.
__device__ inline void share_out(Position& position) {
  double total = 0.0;
  bool has_mass = false;
  for (int k = 0; k < position.count; ++k) {
    const Field& field = position.members[k];
    if (field.weight == 0.0f || field.empty) continue;
    total += static_cast<double>(field.weight);
    has_mass |= !field.known || field.late || field_mass(field, field.top) > 0.0;
  }
  position.empty = !(total > 0.0) || !has_mass;
  for (int k = 0; k < position.count; ++k) {
    Field& field = position.members[k];
    const bool shares = !position.empty && field.weight != 0.0f && !field.empty;
    field.share = shares ? static_cast<double>(field.weight) / total : 0.0;
  }
}

// The laws of a row whose totals are known; the whole warp calls this. The mixture's logarithm has
// a law only after its own sweep: without `warps_known` the mixture is taken as it is.
__device__ inline void read_laws(const Problem& problem, int64_t place, Position& position,
                                 bool warps_known) {
  const int lane = lane_id();
  const bool aliased = proposal_is_member(problem, position);
  if (position.is_mixture && lane < position.count) {
    const bool read =
        position.members[lane].weight != 0.0f || (aliased && position.proposer == lane);
    if (read) read_law(problem, place, lane, position.members[lane]);
  }
  if (!position.is_mixture && lane == 0) read_law(problem, place, 0, position.target);
  if (position.proposer != kNobody && !aliased && lane == kLanes - 1) {
    read_law(problem, place, problem.proposal_slot(), position.proposal);
  }
  __syncwarp();
  if (lane == 0) {
    if (position.is_mixture) share_out(position);
    if (!position.is_mixture) position.empty = position.target.empty;
    if (!warps_known) position.warped = false;
    if (position.warped) read_law(problem, place, problem.warped_slot(), position.target);
    if (aliased) position.proposal = position.members[position.proposer];
  }
  __syncwarp();
}

// Status bits of members; of those that are known they count where a token is drawn only.
__device__ inline int32_t member_status(const Position& position, bool known) {
  int32_t flags = 0;
  for (int k = 0; k < position.count && position.is_mixture; ++k) {
    const Field& field = position.members[k];
    if (field.weight != 0.0f && field.known == known) flags |= field.flags;
  }
  return flags & (kNanLogits | kInfiniteLogits);
}

// Status bits of the target but for members that are known; of the proposal where it was consulted.
__device__ inline int32_t position_status(const Position& position) {
  int32_t flags = position.is_mixture ? 0 : position.target.flags;
  if (position.proposer != kNobody && !position.proposal.known) flags |= position.proposal.flags;
  flags &= kNanLogits | kInfiniteLogits;
  return flags | member_status(position, false) | (position.empty ? kEmptyLaw : 0);
}

}  // namespace specens
