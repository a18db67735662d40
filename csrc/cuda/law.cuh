// SPDX-License-Identifier: Apache-2.0
// The laws at one row, as a warp or a block sees them. A `Row` in shared memory says where the
// members' logits lie, how they are weighted and warped, and, once the totals are known, what the
// normalisers are; everything else is computed again from the logits. A *value* of a token is its
// probability in a mixture and its folded logit in a product; `value_mass` and `value_log_mass`
// make the law's mass of it. `row_stats` (stats.cu) writes what `read_laws` reads, but for fields
// that are *late*: `verify_resample` sweeps these where it draws from them, and only there.
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

// Logits, or values made of them, with their temperature and cutoff, and the law they have.
struct Field {
  const void* data;
  DType dtype;
  float weight;       // 0: not part of the ensemble
  float temperature;  // 0: the largest values share the mass
  bool known;         // its log-sum-exp was given: `top` and `log_sum` are some that make it
  bool late;          // it is not swept yet
  double cutoff;      // a single-precision number, where the values are logits
  double inverse_temperature;
  double coefficient;  // of a product
  // Known with the totals:
  double share;  // of a mixture; 0 where the member is empty
  double top;
  double log_sum;
  bool empty;
  int32_t flags;
};

struct Row {
  Field members[kFields];
  Field proposal;
  Field target;  // of the product, or of the mixture's logarithm if `warped`
  int count;
  int proposer;  // a member, kSeparateDraft or kNobody; not kNobody means a dense draft
  float plausible;
  bool is_mixture;
  bool greedy;  // all temperatures are 0
  bool warped;  // a mixture that is warped as a whole
  bool empty;
  bool has_child;
  bool valid;                  // so is the child
  int64_t token;               // the child's
  float drafted[kFields + 1];  // every field's value of it
};

// --- single values ---

__device__ __forceinline__ double shifted(double value, double top, double inverse_temperature) {
  return value == top ? 0.0 : (value - top) * inverse_temperature;
}

__device__ __forceinline__ double field_log_mass(const Field& field, double value) {
  if (field.empty || value == kNoMass || value < field.cutoff) return kNoMass;
  return shifted(value, field.top, field.inverse_temperature) - field.log_sum;
}

__device__ __forceinline__ double field_mass(const Field& field, double value) {
  return exp(field_log_mass(field, value));
}

__device__ __forceinline__ float clean(float value) { return isnan(value) ? kNoMass : value; }

// One step of a product: NaN where the token has no mass.
__device__ __forceinline__ double fold_in(const Row& row, int member, double folded, float value) {
  const Field& field = row.members[member];
  const bool used = field.weight != 0.0f, cut = value < static_cast<float>(field.cutoff);
  const bool vetoed = (member == 0 && value < row.plausible) || (used && (value == kNoMass || cut));
  if (vetoed) return static_cast<double>(NAN);
  if (field.weight == 0.0f) return folded;
  return folded + field.coefficient * static_cast<double>(value);
}

__device__ __forceinline__ double folded(double value) { return isnan(value) ? kNoMass : value; }

// One step of a mixture.
__device__ __forceinline__ double mix_in(const Row& row, int member, double mixed, float value) {
  const Field& field = row.members[member];
  if (field.share == 0.0) return mixed;
  return mixed + field.share * field_mass(field, value);
}

// The value of a token with these logits.
__device__ inline double value_of(const Row& row, const float* logits) {
  double value = 0.0;
  for (int k = 0; k < row.count; ++k) {
    value = row.is_mixture ? mix_in(row, k, value, logits[k]) : fold_in(row, k, value, logits[k]);
  }
  return row.is_mixture ? value : folded(value);
}

__device__ __forceinline__ double value_log_mass(const Row& row, double value) {
  if (row.empty) return kNoMass;
  if (!row.is_mixture) return field_log_mass(row.target, value);
  return row.warped ? field_log_mass(row.target, log(value)) : log(value);
}

__device__ __forceinline__ double value_mass(const Row& row, double value) {
  if (row.is_mixture && !row.warped) return row.empty ? 0.0 : value;
  return exp(value_log_mass(row, value));
}

// --- reading logits ---

__device__ __forceinline__ int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ const void* row_data(const Logits& logits, int64_t b, int64_t t) {
  const int64_t offset = b * logits.batch_stride + t * logits.row_stride;
  return static_cast<const char*>(logits.data) + offset * bytes_of(logits.dtype);
}

__device__ __forceinline__ float load_raw(const Field& field, int64_t token) {
  if (field.dtype == DType::kFloat32) return load(static_cast<const float*>(field.data) + token);
  const uint32_t bits = load(static_cast<const uint16_t*>(field.data) + token);
  return field.dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

__device__ __forceinline__ bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Bits) == 0;
}

// Eight neighbours from `first` on, which is a multiple of 8.
__device__ __forceinline__ void load_eight(const Field& field, int64_t first, float* out) {
  const char* from = static_cast<const char*>(field.data) + first * bytes_of(field.dtype);
  if (field.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Bits bits = load_bits(from + i * sizeof(Bits));
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i * 4 + j] = __uint_as_float(bits.word[j]);
    }
    return;
  }
  const bool bfloat16 = field.dtype == DType::kBFloat16;
  const Bits bits = load_bits(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = bits.word[j] & 0xFFFF, high = bits.word[j] >> 16;
    out[2 * j] = bfloat16 ? from_bfloat16(low) : from_float16(low);
    out[2 * j + 1] = bfloat16 ? from_bfloat16(high) : from_float16(high);
  }
}

// A lane's share of a round: kPerLane values in groups of eight, a warp's width apart.
__device__ __forceinline__ int lane_token(int i) {
  return i / 8 * (8 * kLanes) + lane_id() * 8 + i % 8;
}

// The share of a lane in the round from `begin` on, NaN as -inf and -inf beyond the vocabulary;
// returns the status bits.
__device__ inline int32_t load_lane(const Field& field, int64_t begin, int64_t vocab_size,
                                    float (&out)[kPerLane]) {
  const bool aligned = is_aligned(field.data);
#pragma unroll
  for (int group = 0; group < kPerLane; group += 8) {
    const int64_t first = begin + lane_token(group);
    if (aligned && first + 8 <= vocab_size) {
      load_eight(field, first, &out[group]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[group + i] = first + i < vocab_size ? load_raw(field, first + i) : kNoMass;
      }
    }
  }
  int32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    flags |= (isnan(out[i]) ? kNanLogits : 0) | (out[i] == -kNoMass ? kInfiniteLogits : 0);
    out[i] = clean(out[i]);
  }
  return flags;
}

// The values of a lane's share of a round, in double precision.
__device__ inline void lane_values(const Row& row, int64_t begin, int64_t vocab_size,
                                   double (&values)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] = 0.0;
  for (int k = 0; k < row.count; ++k) {
    const Field& field = row.members[k];
    const bool masks = k == 0 && row.plausible > kNoMass;
    if (row.is_mixture ? field.share == 0.0 : field.weight == 0.0f && !masks) continue;
    float logits[kPerLane];
    load_lane(field, begin, vocab_size, logits);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = row.is_mixture ? mix_in(row, k, values[i], logits[i])
                                 : fold_in(row, k, values[i], logits[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool inside = begin + lane_token(i) < vocab_size;
    if (row.is_mixture) {
      values[i] = inside ? values[i] : 0.0;
    } else {
      values[i] = inside ? folded(values[i]) : kNoMass;
    }
  }
}

// The same for one token.
__device__ inline double token_value(const Row& row, int64_t token) {
  double value = 0.0;
  for (int k = 0; k < row.count; ++k) {
    const Field& field = row.members[k];
    const bool masks = k == 0 && row.plausible > kNoMass;
    if (row.is_mixture ? field.share == 0.0 : field.weight == 0.0f && !masks) continue;
    const float logit = clean(load_raw(field, token));
    value = row.is_mixture ? mix_in(row, k, value, logit) : fold_in(row, k, value, logit);
  }
  return row.is_mixture ? value : folded(value);
}

// --- warps ---

template <typename T, typename Function>
__device__ __forceinline__ T warp_reduce(T value, const Function& function) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    value = function(value, __shfl_xor_sync(kAllLanes, value, bits));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce(value, [](T a, T b) { return a > b ? a : b; });
}

__device__ __forceinline__ int32_t warp_or(int32_t value) {
  return warp_reduce(value, [](int32_t a, int32_t b) { return a | b; });
}

// --- rows ---

__device__ __forceinline__ bool filters_at(const Ensemble& ensemble, int64_t b) {
  return (ensemble.top_k.data != nullptr && ensemble.top_k.at(b) > 0) ||
         (ensemble.top_p.data != nullptr && ensemble.top_p.at(b) < 1.0f) ||
         (ensemble.min_p.data != nullptr && ensemble.min_p.at(b) > 0.0f);
}

__device__ __forceinline__ void set_temperature(Field& field, float temperature) {
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
__device__ __forceinline__ void set_lse(Field& field, const Row& row, float lse) {
  if (row.greedy || !(field.temperature > 0.0f) || !isfinite(lse)) return;
  field.known = true;
  const double given = static_cast<double>(lse);
  // Any number will do. Likely tokens are near this one, where single precision is at its best; and
  // it has few digits, so that the distance of a logit to it is exact.
  const double top = rint(given * static_cast<double>(field.temperature) * 16.0) / 16.0;
  field.top = static_cast<double>(static_cast<float>(top));
  field.log_sum = given - field.top * field.inverse_temperature;
}

// What there is to know of a member before the totals; each lane takes one.
__device__ inline void read_member(const Problem& problem, int64_t b, int64_t t, Row& row, int k,
                                   float temperature, const double* cutoffs) {
  const Ensemble& ensemble = problem.ensemble;
  Field& field = row.members[k];
  field.data = row_data(ensemble.members[k], b, t);
  field.dtype = ensemble.members[k].dtype;
  field.weight = problem.alone ? 1.0f : ensemble.weights.at(b, t, k);
  field.share = 0.0;
  clear_law(field);
  field.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + k);
  const bool warps = ensemble.warp_members && !row.greedy;
  set_temperature(field, warps ? temperature : 1.0f);
  field.coefficient = static_cast<double>(field.weight);
  if (field.temperature > 0.0f) field.coefficient /= static_cast<double>(field.temperature);
  if (ensemble.lse.data != nullptr) set_lse(field, row, ensemble.lse.at(b, t, k));
  // Where there is no draft to decide about, the row is read only if the chain comes here.
  field.late = problem.defers() && !row.greedy && (field.known || !row.valid);
  if (row.valid) row.drafted[k] = clean(load_raw(field, row.token));
}

// Who the child of this row was drawn from, and whether it is a token at all; one lane.
__device__ inline void read_child(const Problem& problem, int64_t b, int64_t t, Row& row) {
  const int members = problem.ensemble.num_members;
  row.token = t < problem.nodes ? problem.draft_tokens.at(b, t) : kPadding;
  row.has_child = row.token != kPadding;
  row.valid = row.token >= 0 && row.token < problem.ensemble.vocab_size;
  row.proposer = kNobody;
  if (problem.proposers.data != nullptr && t < problem.nodes) {
    const int64_t member = problem.proposers.at(b, t);
    row.valid = row.valid && member >= kPadding && member < members;
    if (row.valid && member != kPadding) row.proposer = static_cast<int>(member);
  } else if (problem.draft_logits.data != nullptr && row.valid) {
    row.proposer = kSeparateDraft;
  }
  if ((row.greedy && !problem.dense_when_greedy) || problem.collapsed) row.proposer = kNobody;
}

__device__ inline void read_proposal(const Problem& problem, int64_t b, int64_t t, Row& row,
                                     const double* cutoffs) {
  const Ensemble& ensemble = problem.ensemble;
  Field& field = row.proposal;
  clear_law(field);
  field.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + kProposalCutoff);
  if (row.proposer == kNobody) return;
  if (row.proposer == kSeparateDraft) {
    field.data = row_data(problem.draft_logits, b, t);
    field.dtype = problem.draft_logits.dtype;
    set_temperature(field, row.greedy ? 1.0f : problem.draft_temperature.at(b));
    if (problem.draft_lse.data != nullptr) set_lse(field, row, problem.draft_lse.at(b, t));
    field.late = problem.late && field.known;
  } else {
    field.data = row_data(ensemble.members[row.proposer], b, t);
    field.dtype = ensemble.members[row.proposer].dtype;
    set_temperature(field, row.greedy ? 1.0f : ensemble.temperature.at(b, 0, row.proposer));
  }
  row.drafted[kFields] = clean(load_raw(field, row.token));
}

// Fills `row` but for what depends on totals; the whole warp calls this. With `cutoffs_known`, they
// are read, too.
__device__ inline void read_row(const Problem& problem, int64_t place, Row& row,
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
    row.count = ensemble.num_members;
    row.is_mixture = problem.is_mixture();
    row.greedy = greedy;
    row.empty = false;
    row.plausible =
        cutoffs == nullptr ? kNoMass : static_cast<float>(load_fresh(cutoffs + kPlausibleCutoff));
    read_child(problem, b, t, row);
    Field& target = row.target;
    clear_law(target);
    target.cutoff = cutoffs == nullptr ? kNoMass : load_fresh(cutoffs + kTargetCutoff);
    set_temperature(target, ensemble.warp_members || greedy ? 1.0f : temperature);
    row.warped = row.is_mixture && !ensemble.warp_members && !greedy &&
                 (temperature != 1.0f || filters_at(ensemble, b));
  }
  __syncwarp();
  if (is_member) read_member(problem, b, t, row, lane, temperature, cutoffs);
  if (lane == kLanes - 1) read_proposal(problem, b, t, row, cutoffs);
  __syncwarp();
}

// A mixture of warped members has the proposer's law already.
__device__ __forceinline__ bool proposal_is_member(const Problem& problem, const Row& row) {
  return problem.is_mixture() && problem.ensemble.warp_members && row.proposer != kNobody &&
         row.proposer != kSeparateDraft;
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
__device__ inline void share_out(Row& row) {
  double total = 0.0;
  bool has_mass = false;
  for (int k = 0; k < row.count; ++k) {
    const Field& field = row.members[k];
    if (field.weight == 0.0f || field.empty) continue;
    total += static_cast<double>(field.weight);
    has_mass |= !field.known || field.late || field_mass(field, field.top) > 0.0;
  }
  row.empty = !(total > 0.0) || !has_mass;
  for (int k = 0; k < row.count; ++k) {
    Field& field = row.members[k];
    const bool shares = !row.empty && field.weight != 0.0f && !field.empty;
    field.share = shares ? static_cast<double>(field.weight) / total : 0.0;
  }
}

// The laws of a row whose totals are known; the whole warp calls this. The mixture's logarithm has
// a law only after its own sweep: without `warps_known` the mixture is taken as it is.
__device__ inline void read_laws(const Problem& problem, int64_t place, Row& row,
                                 bool warps_known) {
  const int lane = lane_id();
  const bool aliased = proposal_is_member(problem, row);
  if (row.is_mixture && lane < row.count) {
    const bool read = row.members[lane].weight != 0.0f || (aliased && row.proposer == lane);
    if (read) read_law(problem, place, lane, row.members[lane]);
  }
  if (!row.is_mixture && lane == 0) read_law(problem, place, 0, row.target);
  if (row.proposer != kNobody && !aliased && lane == kLanes - 1) {
    read_law(problem, place, problem.proposal_slot(), row.proposal);
  }
  __syncwarp();
  if (lane == 0) {
    if (row.is_mixture) share_out(row);
    if (!row.is_mixture) row.empty = row.target.empty;
    if (!warps_known) row.warped = false;
    if (row.warped) read_law(problem, place, problem.warped_slot(), row.target);
    if (aliased) row.proposal = row.members[row.proposer];
  }
  __syncwarp();
}

// Status bits of members; of those that are known they count where a token is drawn only.
__device__ inline int32_t member_status(const Row& row, bool known) {
  int32_t flags = 0;
  for (int k = 0; k < row.count && row.is_mixture; ++k) {
    const Field& field = row.members[k];
    if (field.weight != 0.0f && field.known == known) flags |= field.flags;
  }
  return flags & (kNanLogits | kInfiniteLogits);
}

// Status bits of the target but for members that are known; of the proposal where it was consulted.
__device__ inline int32_t row_status(const Row& row) {
  int32_t flags = row.is_mixture ? 0 : row.target.flags;
  if (row.proposer != kNobody && !row.proposal.known) flags |= row.proposal.flags;
  flags &= kNanLogits | kInfiniteLogits;
  return flags | member_status(row, false) | (row.empty ? kEmptyLaw : 0);
}

}  // namespace specens
