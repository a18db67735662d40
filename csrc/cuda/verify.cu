// SPDX-License-Identifier: Apache-2.0
// `verify` for chains, in two launches where nothing is filtered: `row_stats`, and
// `verify_resample`, in which every block of a sequence walks the chain by itself, a warp for each
// row, for the walk needs the totals and a few logits only. What follows the last kept draft is
// drawn by one block, unless a dense draft was rejected: then all of them sweep its row once more,
// for the residual, and the last one draws. So they do with rows that are late (law.cuh). For rules
// that look at whole laws, or at whole chains, `judge` walks between the two launches (judge.cu),
// and `verify_resample` only draws.
#include "draw.cuh"
#include "exact.cuh"
#include "judge.cuh"
#include "sweep.cuh"

namespace specens {
namespace {

// Below this total the rounding of single precision would show in a residual's masses.
constexpr double kLeastSingleResidual = 1e-4;

// A residual of less mass is rounding, and empty; the reference's LEAST_RESIDUAL.
constexpr double kLeastResidual = 0x1p-40;

enum Outcome : int { kKept, kStops, kEnds };

struct VerifyShared {
  Row rows[kWarps];
  Outcome outcomes[kWarps];
  int32_t status[kWarps];
  Walk walk;
  bool is_last;
};

// One sequence, as one thread of its block sees it.
struct Chain {
  int64_t b;
  int64_t stop;  // the row that emits the last token; as many drafts were kept
  bool emits;
  int32_t status;
};

__device__ __forceinline__ bool is_greedy(const Problem& problem, const Row& row) {
  return row.greedy || problem.collapsed;
}

// What a rule that sweeps nothing is asked about.
struct At {
  double p, q, memory;
  const double* parameters;
  int64_t vocab_size;
  bool at_zero;
};

// The rules that are decided here sweep nothing, and leave what `rejection` does.
__device__ __forceinline__ double kept(const VerifyParams& params, double target, double draft) {
  const At at = {target, draft, 0.0, params.parameters, params.ensemble.vocab_size, false};
  return with_rule(params.rule, [&](auto rule) {
    if constexpr (decltype(rule)::kSweeps) {
      return 0.0;
    } else {
      return rule.judge(at).kept;
    }
  });
}

// What is left of a token, as a rule that sweeps nothing has it.
struct PlainLeft {
  static constexpr bool kMayBeLate = true;

  __device__ double operator()(const Row& /*row*/, int64_t /*token*/, double p, double q) const {
    return left_of(Judgement{}, p, q);
  }
  __device__ double of_others() const { return 1.0; }
};

// As `judge` found it.
struct JudgedLeft {
  static constexpr bool kMayBeLate = false;
  Judgement judgement;

  __device__ double operator()(const Row& row, int64_t token, double p, double q) const {
    if (judgement.without_token && token == row.token) return 0.0;
    return left_of(judgement, p, q);
  }
  // The part that stays of a token which the draft does not have.
  __device__ double of_others() const {
    return judgement.left == Left::kTarget ? 1.0 : judgement.scale;
  }
};

// --- the chain ---

// What becomes of the child of a row; one lane.
__device__ Outcome decide(const Problem& problem, const VerifyParams& params, const Row& row,
                          int64_t b, int64_t t) {
  if (!row.has_child && !params.bonus) return kEnds;
  if (!row.valid || row.empty) return kStops;
  const auto coin = static_cast<double>(params.uniforms.at(b, t + 1, 0));
  if (is_greedy(problem, row)) {
    const int64_t best = load_fresh(problem.best + b * problem.rows + t);
    return row.token == best && coin < 1.0 ? kKept : kStops;
  }
  const double target = value_mass(row, value_of(row, row.drafted));
  const double draft = row.proposer == kNobody
                           ? 1.0
                           : field_mass(row.proposal, static_cast<double>(row.drafted[kFields]));
  return coin * draft < kept(params, target, draft) ? kKept : kStops;
}

// Looks at kWarps rows at a time; the kept ones are written by the first block.
__device__ Chain walk_chain(const Problem& problem, const VerifyParams& params,
                            VerifyShared& shared) {
  Chain chain = {static_cast<int64_t>(blockIdx.y), 0, false, 0};
  const int w = warp_id();
  const bool cutoffs_known = problem.cut || problem.folds_warped();
  if (cutoffs_known) await_previous();  // else `read_row` reads the caller's tensors only
  for (int64_t first = 0;; first += kWarps) {
    const int64_t t = first + w, place = chain.b * problem.rows + t;
    Row& row = shared.rows[w];
    if (t < problem.rows) read_row(problem, place, row, cutoffs_known);
    await_previous();  // returns at once when it has returned before
    if (t < problem.rows) read_laws(problem, place, row, true);
    if (lane_id() == 0) {
      shared.outcomes[w] = t < problem.rows ? decide(problem, params, row, chain.b, t) : kEnds;
      const bool stops = shared.outcomes[w] == kStops;
      shared.status[w] = shared.outcomes[w] == kEnds ? 0 : row_status(row);
      if (stops) shared.status[w] |= member_status(row, true);
      if (stops && row.has_child && !row.valid) shared.status[w] |= kInvalidDraft;
    }
    __syncthreads();
    int kept = 0;
    for (; kept < kWarps && shared.outcomes[kept] == kKept; ++kept) {
      chain.status |= shared.status[kept];
    }
    if (blockIdx.x == 0 && w < kept && lane_id() == 0) keep(params, row, chain.b, t);
    if (kept < kWarps) {
      chain.stop = first + kept;
      chain.emits = shared.outcomes[kept] == kStops;
      chain.status |= shared.status[kept];
      return chain;
    }
    __syncthreads();
  }
}

// Fills what the sequence does not use.
__device__ void pad(const VerifyParams& params, const Chain& chain) {
  const int64_t nodes = params.nodes;
  const int64_t used = chain.emits ? chain.stop + 1 : chain.stop;
  for (int64_t i = used + threadIdx.x; i <= nodes; i += kThreads) {
    store(params.tokens + chain.b * (nodes + 1) + i, static_cast<int64_t>(kPadding));
    store(params.log_probs + chain.b * (nodes + 1) + i, 0.0f);
  }
  for (int64_t i = chain.stop + threadIdx.x; i < nodes; i += kThreads) {
    store(params.path + chain.b * nodes + i, static_cast<int32_t>(kPadding));
  }
}

__device__ void finish(const VerifyParams& params, const Row& row, const Chain& chain,
                       int64_t token) {
  if (threadIdx.x != 0) return;
  if (chain.emits) emit(params, row, chain.b, chain.stop, token);
  store(params.num_accepted + chain.b, static_cast<int32_t>(chain.stop));
  store(params.status + chain.b, chain.status);
}

// --- residuals ---

template <typename LeftOver>
__device__ double residual_mass(const Row& row, const LeftOver& left, int64_t token) {
  return left(row, token, target_mass(row, token), draft_mass(row, token));
}

// exp((value - top) / temperature) in single precision.
template <typename T>
__device__ __forceinline__ double single_mass(const Field& field, T value) {
  if (field.empty || value == -HUGE_VAL || value < static_cast<T>(field.cutoff)) return 0.0;
  const T top = static_cast<T>(field.top);
  const float distance = value == top ? 0.0f : static_cast<float>(value - top);
  const auto inverse_temperature = static_cast<float>(field.inverse_temperature);
  return static_cast<double>(distance == 0.0f ? 1.0f : expf(distance * inverse_temperature));
}

__device__ __forceinline__ double scale_of(const Field& field) {
  return field.empty ? 0.0 : exp(-field.log_sum);
}

__device__ __forceinline__ void add_draft(const Row& row, const float (&logits)[kPerLane],
                                          float (&drafted)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    drafted[i] = static_cast<float>(single_mass(row.proposal, logits[i]));
  }
}

// The residual's mass in a lane's share of a round. Exponentials are of single precision, but for a
// mixture that is warped as a whole. Adds the status bits of members that are known.
__device__ double lane_residual(const Problem& problem, const Row& row, int64_t begin,
                                int32_t& flags) {
  const int64_t vocab_size = problem.ensemble.vocab_size;
  double values[kPerLane] = {};
  float drafted[kPerLane] = {};
#pragma unroll 1
  for (int k = 0; k <= row.count; ++k) {
    const bool separate = k == row.count;
    const bool proposes = row.proposer == (separate ? kSeparateDraft : k);
    const Field& field = separate ? row.proposal : row.members[k];
    const bool masks = k == 0 && row.plausible > kNoMass;
    const bool used =
        !separate && (row.is_mixture ? field.share != 0.0 : field.weight != 0.0f || masks);
    if (!used && !proposes) continue;
    float logits[kPerLane];
    const int32_t found = load_lane(field, begin, vocab_size, logits);
    if (proposes) add_draft(row, logits, drafted);
    if (!used) continue;
    if (field.known) flags |= found;
    const double scale = field.share * scale_of(field);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!row.is_mixture) {
        values[i] = fold_in(row, k, values[i], logits[i]);
      } else if (row.warped) {
        values[i] = mix_in(row, k, values[i], logits[i]);
      } else {
        values[i] += scale * single_mass(field, logits[i]);
      }
    }
  }
  const double scale = scale_of(row.proposal), target_scale = scale_of(row.target);
  double residual = 0.0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (begin + lane_token(i) >= vocab_size) continue;
    double target = values[i];
    if (!row.is_mixture) {
      target = single_mass(row.target, folded(target)) * target_scale;
    } else if (row.warped) {
      target = value_mass(row, target);
    }
    residual += left_of(Judgement{}, target, static_cast<double>(drafted[i]) * scale);
  }
  return residual;
}

// The same in one sub-tile; one warp.
__device__ Residual sweep_residual(const Problem& problem, const Row& row, int sub_tile) {
  double residual = 0.0;
  int32_t flags = 0;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile + round * kRound;
    residual += lane_residual(problem, row, begin, flags);
  }
  return {warp_sum(residual), warp_or(flags)};
}

// The residual's mass in one sub-tile, in double precision; one warp.
template <typename LeftOver>
__device__ double sweep_exactly(const Problem& problem, const Row& row, const LeftOver& left,
                                int sub_tile) {
  double mass = 0.0;
  for (int i = lane_id(); i < kSubTile; i += kLanes) {
    const int64_t token = static_cast<int64_t>(sub_tile) * kSubTile + i;
    if (token < problem.ensemble.vocab_size) mass += residual_mass(row, left, token);
  }
  return warp_sum(mass);
}

// Two laws that are nearly equal differ by less than what their normalisers are good to: everything
// once more, in double precision. That is rare, and one block does it.
__device__ void measure_exactly(const Problem& problem, Row& row, Walk& walk) {
  refine(problem, walk.totals, row);
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) {
    const double mass = sweep_exactly(problem, row, PlainLeft{}, s);
    if (lane_id() == 0) walk.masses[s] = mass;
  }
  __syncthreads();
}

// A draft that was one token leaves of every other token the same part.
template <typename LeftOver>
__device__ void measure_point(const Problem& problem, const Row& row, const LeftOver& left,
                              int64_t place, Walk& walk) {
  read_masses(problem, row, place, walk);
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    walk.masses[s] *= left.of_others();
  }
  __syncthreads();
  const int sub_tile = static_cast<int>(row.token / kSubTile);
  fill(problem, sub_tile, walk, [&](int64_t token) { return residual_mass(row, left, token); });
  if (warp_id() == 0) {
    double mass = 0.0;
    for (int i = lane_id(); i < kSubTile; i += kLanes) mass += walk.tokens[i];
    mass = warp_sum(mass);
    if (lane_id() == 0) walk.masses[sub_tile] = mass;
  }
  __syncthreads();
}

// --- late rows ---

// Whether there are members that must be swept before a token of the target can be drawn.
__device__ bool is_late(const Row& row) {
  bool late = false;
  for (int k = 0; k < row.count; ++k) late |= row.members[k].late && row.members[k].weight != 0.0f;
  return late;
}

// One sub-tile of all of them; one warp.
__device__ void sweep_late(const Problem& problem, const Row& row, int64_t place, int sub_tile) {
#pragma unroll 1
  for (int k = 0; k < row.count; ++k) {
    if (row.members[k].late) sweep_logits(problem, row, place, k, sub_tile);
  }
}

// Their laws, and so the target's, when all sub-tiles are swept; the whole block.
__device__ void combine_late(const Problem& problem, Row& row, int64_t place) {
  for (int k = warp_id(); k < row.count; k += kWarps) {
    Field& field = row.members[k];
    if (!field.late || field.weight == 0.0f) continue;
    const Total total = combine(problem, place, k, field.inverse_temperature);
    __syncwarp();  // all have seen that it is late
    if (lane_id() != 0) continue;
    set_law(field, total);
    field.late = false;
  }
  __syncthreads();
  if (threadIdx.x == 0) share_out(row);
  __syncthreads();
}

// A row whose residual is empty is drawn from after all: that is rare, and one block does it.
__device__ void complete(const Problem& problem, Row& row, int64_t place) {
  if (!is_late(row)) return;
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) sweep_late(problem, row, place, s);
  __syncthreads();
  combine_late(problem, row, place);
}

// --- what is drawn ---

// The token of a residual whose masses are known, or of the target if there is none.
template <typename LeftOver>
__device__ int64_t draw_residual(const Problem& problem, const VerifyParams& params, Row& row,
                                 const LeftOver& left, Chain& chain, Walk& walk) {
  if (total_mass(problem, walk) > kLeastResidual) {
    return draw(problem, params.uniforms, chain.b, chain.stop, walk,
                [&](int64_t token) { return residual_mass(row, left, token); });
  }
  const int64_t place = chain.b * problem.rows + chain.stop;
  if constexpr (LeftOver::kMayBeLate) complete(problem, row, place);
  chain.status |= row.empty ? kEmptyLaw : kEmptyResidual;
  return draw_target(problem, row, params.uniforms, place, walk);
}

// Of a stop that needs no residual.
__device__ int64_t draw_alone(const Problem& problem, const VerifyParams& params, Row& row,
                              Chain& chain, Walk& walk) {
  const int64_t place = chain.b * problem.rows + chain.stop;
  if (row.empty) return 0;
  if (is_greedy(problem, row)) return load_fresh(problem.best + place);
  if (!row.valid) return draw_target(problem, row, params.uniforms, place, walk);
  measure_point(problem, row, PlainLeft{}, place, walk);
  return draw_residual(problem, params, row, PlainLeft{}, chain, walk);
}

// --- the kernels ---

// Calls sweep(sub_tile) in a warp of a block of the sequence for each; true in the last block, when
// all have.
template <typename Sweep>
__device__ bool sweep_together(const Problem& problem, const Chain& chain, VerifyShared& shared,
                               const Sweep& sweep) {
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (sub_tile < problem.sub_tiles) sweep(sub_tile);
  return last_block(problem.tickets + chain.b, gridDim.x, &shared.is_last);
}

// Leaves the residual that sweep(sub_tile) finds in `walk` of the last block of the sequence, and
// its status bits in `chain`; that block gets true.
template <typename Sweep>
__device__ bool sweep_residuals(const Problem& problem, Chain& chain, VerifyShared& shared,
                                const Sweep& sweep) {
  Residual* residuals = problem.residuals + chain.b * problem.sub_tiles;
  const auto keep_residual = [&](int sub_tile) {
    const Residual residual = sweep(sub_tile);
    if (lane_id() == 0) store(residuals + sub_tile, residual);
  };
  if (!sweep_together(problem, chain, shared, keep_residual)) return false;
  int32_t flags = 0;
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    const Residual residual = load_fresh(residuals + s);
    shared.walk.masses[s] = residual.mass;
    flags |= residual.flags;
  }
  flags = warp_or(flags);
  if (lane_id() == 0) shared.status[warp_id()] = flags;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) chain.status |= shared.status[w];
  return true;
}

__device__ void resample(const Problem& problem, const VerifyParams& params, VerifyShared& shared) {
  Walk& walk = shared.walk;
  Chain chain = walk_chain(problem, params, shared);
  Row& row = shared.rows[chain.stop % kWarps];
  if (blockIdx.x == 0) pad(params, chain);
  if (chain.emits && row.valid && row.proposer != kNobody && !row.empty) {
    const auto sweep = [&](int sub_tile) { return sweep_residual(problem, row, sub_tile); };
    if (!sweep_residuals(problem, chain, shared, sweep)) return;
    if (total_mass(problem, walk) <= kLeastSingleResidual) measure_exactly(problem, row, walk);
    finish(params, row, chain, draw_residual(problem, params, row, PlainLeft{}, chain, walk));
    return;
  }
  if (chain.emits && is_late(row)) {
    const int64_t place = chain.b * problem.rows + chain.stop;
    const auto sweep = [&](int sub_tile) { sweep_late(problem, row, place, sub_tile); };
    if (!sweep_together(problem, chain, shared, sweep)) return;
    combine_late(problem, row, place);
    chain.status |= row_status(row) | member_status(row, true);
  } else if (blockIdx.x != 0) {
    return;
  }
  const int64_t token =
      chain.emits ? draw_alone(problem, params, row, chain, walk) : int64_t{kPadding};
  finish(params, row, chain, token);
}

// Of a decision that needs no sweep.
__device__ int64_t draw_decided(const Problem& problem, const VerifyParams& params, Row& row,
                                const Decision& decision, Chain& chain, Walk& walk) {
  if (decision.follows == Follows::kBest) return decision.best;
  const int64_t place = chain.b * problem.rows + chain.stop;
  if (row.empty || decision.follows == Follows::kTarget) {
    return draw_target(problem, row, params.uniforms, place, walk);
  }
  const JudgedLeft left = {decision.judgement};
  measure_point(problem, row, left, place, walk);
  return draw_residual(problem, params, row, left, chain, walk);
}

// What `judge` decided; it has made the normalisers exact where a residual is drawn from.
__device__ void resample_decided(const Problem& problem, const VerifyParams& params,
                                 VerifyShared& shared) {
  await_previous();
  const auto b = static_cast<int64_t>(blockIdx.y);
  const Decision decision = load_fresh(problem.decisions + b);
  Chain chain = {b, decision.stop, decision.follows != Follows::kNothing, decision.status};
  Row& row = shared.rows[0];
  if (chain.emits && warp_id() == 0) {
    const int64_t place = b * problem.rows + chain.stop;
    read_row(problem, place, row, problem.cut || problem.folds_warped());
    read_laws(problem, place, row, true);
  }
  __syncthreads();
  if (chain.emits) chain.status |= member_status(row, true);
  if (blockIdx.x == 0) pad(params, chain);
  const bool sweeps = decision.follows == Follows::kLeft && row.proposer != kNobody && !row.empty &&
                      decision.judgement.left != Left::kTarget;
  if (!sweeps) {
    if (blockIdx.x != 0) return;
    const int64_t token = chain.emits
                              ? draw_decided(problem, params, row, decision, chain, shared.walk)
                              : int64_t{kPadding};
    finish(params, row, chain, token);
    return;
  }
  const JudgedLeft left = {decision.judgement};
  const auto sweep = [&](int sub_tile) {
    return Residual{sweep_exactly(problem, row, left, sub_tile), 0};
  };
  if (!sweep_residuals(problem, chain, shared, sweep)) return;
  finish(params, row, chain, draw_residual(problem, params, row, left, chain, shared.walk));
}

enum class DecidedBy : int { kResample, kJudge };

template <DecidedBy kBy>
__global__ void __launch_bounds__(kThreads, 1)
    verify_resample(Problem problem, VerifyParams params) {
  SPECENS_SHARED(VerifyShared, shared);
  if constexpr (kBy == DecidedBy::kResample) {
    resample(problem, params, shared);
  } else {
    resample_decided(problem, params, shared);
  }
}

Problem problem_of(const VerifyParams& params) {
  const int64_t rows = params.bonus ? params.nodes + 1 : params.nodes;
  Problem problem = make_problem(params.ensemble, params.batch, rows);
  problem.collapsed = params.rule == RuleId::kGreedy;
  problem.dense_when_greedy = dense_when_greedy(params.rule);
  problem.nodes = params.nodes;
  problem.draft_tokens = params.draft_tokens;
  problem.proposers = params.proposers;
  problem.draft_logits = params.draft_logits;
  problem.draft_temperature = params.draft_temperature;
  problem.draft_lse = params.draft_lse;
  // What sweeps nothing decides by single tokens; without drafts there is nothing to decide.
  problem.late = !is_judged(params.rule) && !problem.collapsed && params.nodes > 0;
  return problem;
}

}  // namespace

size_t cuda_verify_workspace(const VerifyParams& params) {
  Problem problem = problem_of(params);
  return attach(problem, nullptr);
}

int cuda_verify(const VerifyParams& params, void* workspace, size_t workspace_bytes,
                cudaStream_t stream) {
  Problem problem = problem_of(params);
  const size_t needed = attach(problem, workspace);
  if (const int error = check(problem, needed, workspace_bytes)) return error;
  if (problem.batch == 0) return 0;
  launch_stats(problem, stream);
  const bool dense = params.proposers.data != nullptr || params.draft_logits.data != nullptr;
  const dim3 grid(dense || problem.defers() ? tiles_of(problem) : 1,
                  static_cast<unsigned>(problem.batch));
  if (!is_judged(params.rule)) {
    SPECENS_LAUNCH_EARLY(verify_resample<DecidedBy::kResample>, grid, dim3(kThreads),
                         sizeof(VerifyShared), stream, problem, params);
    return launch_error();
  }
  launch_judge(problem, params, stream);
  SPECENS_LAUNCH_EARLY(verify_resample<DecidedBy::kJudge>, grid, dim3(kThreads),
                       sizeof(VerifyShared), stream, problem, params);
  return launch_error();
}

}  // namespace specens
