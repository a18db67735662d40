// SPDX-License-Identifier: Apache-2.0
// What the kernels of one call share: the op's arguments, and a workspace, of which `row_stats`
// (stats.cu) writes the partials and totals. Fields that are *late* are not among them:
// `verify_resample` sweeps these where it draws from them, and only there.
#pragma once

#include "../specens.h"
#include "compat.cuh"

namespace specens {

constexpr int kFields = 8;  // members that a kernel takes
constexpr int kWarps = 8;   // of a block; a warp sweeps one sub-tile, so a block sweeps a tile
constexpr int kThreads = kWarps * kLanes;
constexpr int kPerLane = 16;  // values that a lane holds at once
constexpr int kRound = kPerLane * kLanes;
constexpr int kRounds = kSubTile / kRound;  // for a warp to go through a sub-tile
static_assert(kWarps == kSubTilesPerTile, "a block sweeps a tile");

constexpr int kNobody = -1;
constexpr int kSeparateDraft = kFields;  // a proposer that is none of the members

// Statistics of a sub-tile: what survives the cutoff, and status bits; from bit 8 on, which members
// hold a +inf.
struct alignas(16) Partial {
  double top;
  float sum;  // of exp((value - top) / temperature)
  int32_t flags;
};

struct alignas(16) Total {
  double sum;
  double top;
  int32_t flags;
};

// What is left of a target in a sub-tile.
struct alignas(16) Residual {
  double mass;
  int32_t flags;  // of late members
};

struct Decision;

// What the kernels of one call share: the op's arguments and where the workspace's parts lie.
struct Problem {
  Ensemble ensemble;
  Values<float> temperatures;  // of all members: rows where they are 0 are greedy
  int num_temperatures;
  bool alone;              // one member's law; it has no weight
  bool collapsed;          // the rule looks at the most probable token only
  bool cut;                // there are filters or plausibility
  bool dense_when_greedy;  // the draft's law is asked for where all temperatures are 0, too
  bool late;               // what no decision needs to be swept for is late
  int64_t batch;
  int64_t rows;   // of logits in each sequence
  int64_t nodes;  // of these, the first that have a draft
  Integers draft_tokens;
  Integers proposers;
  Logits draft_logits;
  Values<float> draft_temperature;
  Values<float> draft_lse;

  int sub_tiles;
  int slots;            // of totals at each row; see `proposal_slot` and `warped_slot`
  unsigned* tickets;    // zero between launches
  double* cutoffs;      // (rows, kCutoffs)
  Partial* partials;    // (rows, slots, sub_tiles)
  Total* totals;        // (rows, slots)
  int64_t* best;        // (rows,): the most probable token, where it is asked for
  Residual* residuals;  // (batch, sub_tiles)
  Decision* decisions;  // (batch,), of `judge`

  SPECENS_HOST_DEVICE bool is_mixture() const { return ensemble.space == Space::kProbabilities; }
  // The members' slots come first, or the product's.
  SPECENS_HOST_DEVICE int proposal_slot() const { return is_mixture() ? ensemble.num_members : 1; }
  // Of the mixture's logarithm.
  SPECENS_HOST_DEVICE int warped_slot() const { return proposal_slot() + 1; }
  SPECENS_HOST_DEVICE bool folds_warped() const { return !is_mixture() && ensemble.warp_members; }
  // Whether members may be late.
  SPECENS_HOST_DEVICE bool defers() const {
    return late && is_mixture() && ensemble.warp_members && !cut;
  }
};

// Cutoffs of a row: each member's, the proposal's, the ensemble's, and what is plausible.
constexpr int kProposalCutoff = kFields;
constexpr int kTargetCutoff = kFields + 1;
constexpr int kPlausibleCutoff = kFields + 2;
constexpr int kCutoffs = kFields + 3;

}  // namespace specens
