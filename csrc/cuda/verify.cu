// SPDX-License-Identifier: Apache-2.0
// `verify` for chains, in two launches where nothing is filtered: `row_stats`, and
// `verify_resample`, in which every block of a sequence walks the chain by itself, a warp for each
// row, for the walk needs the totals and a few logits only. What follows the last kept draft is
// drawn by one block, unless a dense draft was rejected: then all of them sweep its row once more,
// for the residual, and the last one draws.
#include "draw.cuh"

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
  bool bare;
};

// The rules that have CUDA kernels (specens_kernels/cuda.py names them) sweep nothing, and leave
// what `rejection` does.
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

__device__ __forceinline__ double left(double target, double draft) {
  return left_of(Judgement{}, target, draft);
}

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

__device__ void emit(const VerifyParams& params, const Row& row, const Chain& chain, int64_t t,
                     int64_t token) {
  const int64_t place = chain.b * (params.nodes + 1) + t;
  store(params.tokens + place, token);
  store(params.log_probs + place, static_cast<float>(value_log_mass(row, token_value(row, token))));
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
      shared.status[w] = shared.outcomes[w] == kEnds ? 0 : row_status(row);
      if (shared.outcomes[w] == kStops && row.has_child && !row.valid) {
        shared.status[w] |= kInvalidDraft;
      }
    }
    __syncthreads();
    int kept = 0;
    for (; kept < kWarps && shared.outcomes[kept] == kKept; ++kept) {
      chain.status |= shared.status[kept];
    }
    if (blockIdx.x == 0 && w < kept && lane_id() == 0) {
      emit(params, row, chain, t, row.token);
      store(params.path + chain.b * params.nodes + t, static_cast<int32_t>(t + 1));
    }
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
  if (chain.emits) emit(params, row, chain, chain.stop, token);
  store(params.num_accepted + chain.b, static_cast<int32_t>(chain.stop));
  store(params.status + chain.b, chain.status);
}

// --- residuals ---

__device__ double residual_mass(const Row& row, int64_t token) {
  const double target = value_mass(row, token_value(row, token));
  if (row.proposer == kNobody) return token == row.token ? left(target, 1.0) : target;
  const auto logit = static_cast<double>(clean(load_raw(row.proposal, token)));
  return left(target, field_mass(row.proposal, logit));
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
// mixture that is warped as a whole.
__device__ double lane_residual(const Problem& problem, const Row& row, int64_t begin) {
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
    load_lane(field, begin, vocab_size, logits);
    if (proposes) add_draft(row, logits, drafted);
    if (!used) continue;
    const double scale = field.share * scale_of(field);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!row.is_mixture) {
        values[i] = fold_in(row, k, values[i], logits[i]);
      } else if (row.warped) {
        values[i] = mix_in(row, k, values[i], logits[i]);
      } else {
        values[i] = WeightedSum::fold(values[i], single_mass(field, logits[i]), scale);
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
    residual += left(target, static_cast<double>(drafted[i]) * scale);
  }
  return residual;
}

// The same in one sub-tile; one warp.
__device__ double sweep_residual(const Problem& problem, const Row& row, int sub_tile) {
  double residual = 0.0;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile + round * kRound;
    residual += lane_residual(problem, row, begin);
  }
  return warp_sum(residual);
}

// Sum of mass(token) over the vocabulary, in double precision; the whole block.
template <typename Mass>
__device__ double sum_tokens(const Problem& problem, Walk& walk, const Mass& mass) {
  double sum = 0.0;
  for (int64_t token = threadIdx.x; token < problem.ensemble.vocab_size; token += kThreads) {
    sum += mass(token);
  }
  sum = warp_sum(sum);
  if (lane_id() == 0) walk.totals[warp_id()] = sum;
  __syncthreads();
  sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += walk.totals[w];
  __syncthreads();
  return sum;
}

// Makes the normaliser of a field exact up to double precision.
template <typename Value>
__device__ void refine_field(const Problem& problem, Walk& walk, Field& field, const Value& value) {
  if (field.empty) return;
  if (threadIdx.x == 0) field.log_sum = 0.0;
  __syncthreads();
  const double sum =
      sum_tokens(problem, walk, [&](int64_t token) { return field_mass(field, value(token)); });
  if (threadIdx.x == 0) field.log_sum = log(sum);
  __syncthreads();
}

__device__ void refine(const Problem& problem, Walk& walk, Row& row) {
  for (int k = 0; k < row.count && row.is_mixture; ++k) {
    Field& field = row.members[k];
    if (field.share == 0.0 && !(row.proposer == k && proposal_is_member(problem, row))) continue;
    refine_field(problem, walk, field,
                 [&](int64_t token) { return static_cast<double>(clean(load_raw(field, token))); });
  }
  // The cutoff of a mixture's logarithm was found by the members' normalisers as they were.
  if (row.warped && threadIdx.x == 0) row.target.cutoff -= 1e-6;
  if (!row.is_mixture || row.warped) {
    refine_field(problem, walk, row.target, [&](int64_t token) {
      const double value = token_value(row, token);
      return row.is_mixture ? log(value) : value;
    });
  }
  if (proposal_is_member(problem, row)) {
    if (threadIdx.x == 0) row.proposal = row.members[row.proposer];
    __syncthreads();
    return;
  }
  refine_field(problem, walk, row.proposal, [&](int64_t token) {
    return static_cast<double>(clean(load_raw(row.proposal, token)));
  });
}

// Two laws that are nearly equal differ by less than what their normalisers are good to: everything
// once more, in double precision. That is rare, and one block does it.
__device__ void measure_exactly(const Problem& problem, Row& row, Walk& walk) {
  refine(problem, walk, row);
  for (int s = warp_id(); s < problem.sub_tiles; s += kWarps) {
    double mass = 0.0;
    for (int i = lane_id(); i < kSubTile; i += kLanes) {
      const int64_t token = static_cast<int64_t>(s) * kSubTile + i;
      if (token < problem.ensemble.vocab_size) mass += residual_mass(row, token);
    }
    mass = warp_sum(mass);
    if (lane_id() == 0) walk.masses[s] = mass;
  }
  __syncthreads();
}

// A draft that was one token leaves every other token whole.
__device__ void measure_point(const Problem& problem, const Row& row, int64_t place, Walk& walk) {
  read_masses(problem, row, place, walk);
  const int sub_tile = static_cast<int>(row.token / kSubTile);
  fill(problem, sub_tile, walk, [&](int64_t token) { return residual_mass(row, token); });
  if (warp_id() == 0) {
    double mass = 0.0;
    for (int i = lane_id(); i < kSubTile; i += kLanes) mass += walk.tokens[i];
    mass = warp_sum(mass);
    if (lane_id() == 0) walk.masses[sub_tile] = mass;
  }
  __syncthreads();
}

// The token of a residual whose masses are known, or of the target if there is none.
__device__ int64_t draw_residual(const Problem& problem, const VerifyParams& params, const Row& row,
                                 Chain& chain, Walk& walk) {
  if (total_mass(problem, walk) > kLeastResidual) {
    return draw(problem, params.uniforms, chain.b, chain.stop, walk,
                [&](int64_t token) { return residual_mass(row, token); });
  }
  chain.status |= kEmptyResidual;
  const int64_t place = chain.b * problem.rows + chain.stop;
  return draw_target(problem, row, params.uniforms, place, walk);
}

// Of a stop that needs no sweep.
__device__ int64_t draw_alone(const Problem& problem, const VerifyParams& params, const Row& row,
                              Chain& chain, Walk& walk) {
  const int64_t place = chain.b * problem.rows + chain.stop;
  if (row.empty) return 0;
  if (is_greedy(problem, row)) return load_fresh(problem.best + place);
  if (!row.valid) return draw_target(problem, row, params.uniforms, place, walk);
  measure_point(problem, row, place, walk);
  return draw_residual(problem, params, row, chain, walk);
}

__global__ void __launch_bounds__(kThreads, 1)
    verify_resample(Problem problem, VerifyParams params) {
  SPECENS_SHARED(VerifyShared, shared);
  Walk& walk = shared.walk;
  Chain chain = walk_chain(problem, params, shared);
  Row& row = shared.rows[chain.stop % kWarps];
  if (blockIdx.x == 0) pad(params, chain);
  const bool sweeps = chain.emits && row.valid && row.proposer != kNobody && !row.empty;
  if (!sweeps) {
    if (blockIdx.x != 0) return;
    const int64_t token =
        chain.emits ? draw_alone(problem, params, row, chain, walk) : int64_t{kPadding};
    finish(params, row, chain, token);
    return;
  }
  double* residuals = problem.residuals + chain.b * problem.sub_tiles;
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (sub_tile < problem.sub_tiles) {
    const double residual = sweep_residual(problem, row, sub_tile);
    if (lane_id() == 0) store(residuals + sub_tile, residual);
  }
  if (!last_block(problem.tickets + chain.b, gridDim.x, &shared.is_last)) return;
  for (int s = static_cast<int>(threadIdx.x); s < problem.sub_tiles; s += kThreads) {
    walk.masses[s] = load_fresh(residuals + s);
  }
  __syncthreads();
  if (total_mass(problem, walk) <= kLeastSingleResidual) {
    measure_exactly(problem, row, walk);
  }
  finish(params, row, chain, draw_residual(problem, params, row, chain, walk));
}

Problem problem_of(const VerifyParams& params) {
  const int64_t rows = params.bonus ? params.nodes + 1 : params.nodes;
  Problem problem = make_problem(params.ensemble, params.batch, rows);
  problem.collapsed = params.rule == RuleId::kGreedy;
  problem.nodes = params.nodes;
  problem.draft_tokens = params.draft_tokens;
  problem.proposers = params.proposers;
  problem.draft_logits = params.draft_logits;
  problem.draft_temperature = params.draft_temperature;
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
  const dim3 grid(dense ? tiles_of(problem) : 1, static_cast<unsigned>(problem.batch));
  SPECENS_LAUNCH_EARLY(verify_resample, grid, dim3(kThreads), sizeof(VerifyShared), stream, problem,
                       params);
  return launch_error();
}

}  // namespace specens
