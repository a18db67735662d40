// SPDX-License-Identifier: Apache-2.0
// `verify` for chains, in two launches where nothing is filtered: `row_stats`, and
// `verify_resample`, in which every block of a sequence walks the chain by itself, a warp for each
// row, for the walk needs the totals and a few logits only. What follows the last kept draft is
// drawn by one block, unless a dense draft was rejected: then all of them sweep its row once more,
// for the residual, and the last one draws. So they do with rows that are late (problem.cuh). For
// rules that look at whole laws, or at whole chains, `judge` walks between the two launches
// (judge.cu), and `verify_resample` only draws.
#include "judge.cuh"
#include "residual.cuh"
#include "sweep.cuh"

namespace specens {
namespace {

enum Outcome : int { kKept, kStops, kEnds };

struct VerifyShared {
  Position positions[kWarps];
  Outcome outcomes[kWarps];
  int32_t status[kWarps];
  DrawScratch scratch;
  bool is_last;
};

// One sequence, as one thread of its block sees it.
struct Chain {
  int64_t b;
  int64_t stop;  // the row that emits the last token; as many drafts were kept
  bool emits;
  int32_t status;
};

__device__ __forceinline__ bool is_greedy(const Problem& problem, const Position& position) {
  return position.greedy || problem.collapsed;
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

// What becomes of the child of a row; one lane.
__device__ Outcome decide(const Problem& problem, const VerifyParams& params,
                          const Position& position, int64_t b, int64_t t) {
  if (!position.has_child && !params.bonus) return kEnds;
  if (!position.valid || position.empty) return kStops;
  const auto coin = static_cast<double>(params.uniforms.at(b, t + 1, 0));
  if (is_greedy(problem, position)) {
    const int64_t best = load_fresh(problem.best + b * problem.rows + t);
    return position.token == best && coin < 1.0 ? kKept : kStops;
  }
  const double target = value_mass(position, value_of(position, position.drafted));
  const double draft =
      position.proposer == kNobody
          ? 1.0
          : field_mass(position.proposal, static_cast<double>(position.drafted[kFields]));
  return coin * draft < kept(params, target, draft) ? kKept : kStops;
}

// Looks at kWarps rows at a time; the kept ones are written by the first block.
__device__ Chain walk_chain(const Problem& problem, const VerifyParams& params,
                            VerifyShared& shared) {
  Chain chain = {static_cast<int64_t>(blockIdx.y), 0, false, 0};
  const int w = warp_id();
  const bool cutoffs_known = problem.cut || problem.folds_warped();
  if (cutoffs_known) await_previous();  // else `read_position` reads the caller's tensors only
  for (int64_t first = 0;; first += kWarps) {
    const int64_t t = first + w, place = chain.b * problem.rows + t;
    Position& position = shared.positions[w];
    if (t < problem.rows) read_position(problem, place, position, cutoffs_known);
    await_previous();  // returns at once when it has returned before
    if (t < problem.rows) read_laws(problem, place, position, true);
    if (lane_id() == 0) {
      shared.outcomes[w] = t < problem.rows ? decide(problem, params, position, chain.b, t) : kEnds;
      const bool stops = shared.outcomes[w] == kStops;
      shared.status[w] = shared.outcomes[w] == kEnds ? 0 : position_status(position);
      if (stops) shared.status[w] |= member_status(position, true);
      if (stops && position.has_child && !position.valid) shared.status[w] |= kInvalidDraft;
    }
    __syncthreads();
    int kept = 0;
    for (; kept < kWarps && shared.outcomes[kept] == kKept; ++kept) {
      chain.status |= shared.status[kept];
    }
    if (blockIdx.x == 0 && w < kept && lane_id() == 0) keep(params, position, chain.b, t);
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

__device__ void finish(const VerifyParams& params, const Position& position, const Chain& chain,
                       int64_t token) {
  if (threadIdx.x != 0) return;
  if (chain.emits) emit(params, position, chain.b, chain.stop, token);
  store(params.num_accepted + chain.b, static_cast<int32_t>(chain.stop));
  store(params.status + chain.b, chain.status);
}

// Whether there are members that must be swept before a token of the target can be drawn.
__device__ bool is_late(const Position& position) {
  bool late = false;
  for (int k = 0; k < position.count; ++k)
    late |= position.members[k].late && position.members[k].weight != 0.0f;
  return late;
}

// One sub-tile of all of them; one warp.
__device__ void sweep_late(const Problem& problem, const Position& position, int64_t place,
                           int sub_tile) {
#pragma unroll 1
  for (int k = 0; k < position.count; ++k) {
    if (position.members[k].late) sweep_logits(problem, position, place, k, sub_tile);
  }
}

// Their laws, and so the target's, when all sub-tiles are swept; the whole block.
__device__ void combine_late(const Problem& problem, Position& position, int64_t place) {
  for (int k = warp_id(); k < position.count; k += kWarps) {
    Field& field = position.members[k];
    if (!field.late || field.weight == 0.0f) continue;
    const Total total = combine(problem, place, k, field.inverse_temperature);
    __syncwarp();  // all have seen that it is late
    if (lane_id() != 0) continue;
    set_law(field, total);
    field.late = false;
  }
  __syncthreads();
  if (threadIdx.x == 0) share_out(position);
  __syncthreads();
}

// A row whose residual is empty is drawn from after all: that is rare, and one block does it.
__device__ void complete(const Problem& problem, Position& position, int64_t place) {
  if (!is_late(position)) return;
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps)
    sweep_late(problem, position, place, s);
  __syncthreads();
  combine_late(problem, position, place);
}

// The token of a residual whose masses are known, or of the target if there is none.
template <typename LeftOver>
__device__ int64_t draw_residual(const Problem& problem, const VerifyParams& params,
                                 Position& position, const LeftOver& left, Chain& chain,
                                 DrawScratch& scratch) {
  if (total_mass(problem, scratch) > kLeastResidual) {
    return draw(problem, params.uniforms, chain.b, chain.stop, scratch,
                [&](int64_t token) { return residual_mass(position, left, token); });
  }
  const int64_t place = chain.b * problem.rows + chain.stop;
  if constexpr (LeftOver::kMayBeLate) complete(problem, position, place);
  chain.status |= position.empty ? kEmptyLaw : kEmptyResidual;
  return draw_target(problem, position, params.uniforms, place, scratch);
}

// Of a stop that needs no residual.
__device__ int64_t draw_alone(const Problem& problem, const VerifyParams& params,
                              Position& position, Chain& chain, DrawScratch& scratch) {
  const int64_t place = chain.b * problem.rows + chain.stop;
  if (position.empty) return 0;
  if (is_greedy(problem, position)) return load_fresh(problem.best + place);
  if (!position.valid) return draw_target(problem, position, params.uniforms, place, scratch);
  measure_point(problem, position, PlainLeft{}, place, scratch);
  return draw_residual(problem, params, position, PlainLeft{}, chain, scratch);
}

// Calls sweep(sub_tile) in a warp of a block of the sequence for each; true in the last block, when
// all have.
template <typename Sweep>
__device__ bool sweep_together(const Problem& problem, const Chain& chain, VerifyShared& shared,
                               const Sweep& sweep) {
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (sub_tile < problem.sub_tiles) sweep(sub_tile);
  return last_block(problem.tickets + chain.b, gridDim.x, &shared.is_last);
}

// Leaves the residual that sweep(sub_tile) finds in `scratch` of the last block of the sequence,
// and its status bits in `chain`; that block gets true.
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
    shared.scratch.masses[s] = residual.mass;
    flags |= residual.flags;
  }
  flags = warp_or(flags);
  if (lane_id() == 0) shared.status[warp_id()] = flags;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) chain.status |= shared.status[w];
  return true;
}

__device__ void resample(const Problem& problem, const VerifyParams& params, VerifyShared& shared) {
  DrawScratch& scratch = shared.scratch;
  Chain chain = walk_chain(problem, params, shared);
  Position& position = shared.positions[chain.stop % kWarps];
  if (blockIdx.x == 0) pad(params, chain);
  if (chain.emits && position.valid && position.proposer != kNobody && !position.empty) {
    const auto sweep = [&](int sub_tile) { return sweep_residual(problem, position, sub_tile); };
    if (!sweep_residuals(problem, chain, shared, sweep)) return;
    if (total_mass(problem, scratch) <= kLeastSingleResidual)
      measure_exactly(problem, position, scratch);
    finish(params, position, chain,
           draw_residual(problem, params, position, PlainLeft{}, chain, scratch));
    return;
  }
  if (chain.emits && is_late(position)) {
    const int64_t place = chain.b * problem.rows + chain.stop;
    const auto sweep = [&](int sub_tile) { sweep_late(problem, position, place, sub_tile); };
    if (!sweep_together(problem, chain, shared, sweep)) return;
    combine_late(problem, position, place);
    chain.status |= position_status(position) | member_status(position, true);
  } else if (blockIdx.x != 0) {
    return;
  }
  const int64_t token =
      chain.emits ? draw_alone(problem, params, position, chain, scratch) : int64_t{kPadding};
  finish(params, position, chain, token);
}

// Of a decision that needs no sweep.
__device__ int64_t draw_decided(const Problem& problem, const VerifyParams& params,
                                Position& position, const Decision& decision, Chain& chain,
                                DrawScratch& scratch) {
  if (decision.follows == Follows::kBest) return decision.best;
  const int64_t place = chain.b * problem.rows + chain.stop;
  if (position.empty || decision.follows == Follows::kTarget) {
    return draw_target(problem, position, params.uniforms, place, scratch);
  }
  const JudgedLeft left = {decision.judgement};
  measure_point(problem, position, left, place, scratch);
  return draw_residual(problem, params, position, left, chain, scratch);
}

// What `judge` decided; it has made the normalisers exact where a residual is drawn from.
__device__ void resample_decided(const Problem& problem, const VerifyParams& params,
                                 VerifyShared& shared) {
  await_previous();
  const auto b = static_cast<int64_t>(blockIdx.y);
  const Decision decision = load_fresh(problem.decisions + b);
  Chain chain = {b, decision.stop, decision.follows != Follows::kNothing, decision.status};
  Position& position = shared.positions[0];
  if (chain.emits && warp_id() == 0) {
    const int64_t place = b * problem.rows + chain.stop;
    read_position(problem, place, position, problem.cut || problem.folds_warped());
    read_laws(problem, place, position, true);
  }
  __syncthreads();
  if (chain.emits) chain.status |= member_status(position, true);
  if (blockIdx.x == 0) pad(params, chain);
  const bool sweeps = decision.follows == Follows::kLeft && position.proposer != kNobody &&
                      !position.empty && decision.judgement.left != Left::kTarget;
  if (!sweeps) {
    if (blockIdx.x != 0) return;
    const int64_t token =
        chain.emits ? draw_decided(problem, params, position, decision, chain, shared.scratch)
                    : int64_t{kPadding};
    finish(params, position, chain, token);
    return;
  }
  const JudgedLeft left = {decision.judgement};
  const auto sweep = [&](int sub_tile) {
    return Residual{sweep_exactly(problem, position, left, sub_tile), 0};
  };
  if (!sweep_residuals(problem, chain, shared, sweep)) return;
  finish(params, position, chain,
         draw_residual(problem, params, position, left, chain, shared.scratch));
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
