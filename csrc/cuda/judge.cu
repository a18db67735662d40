// SPDX-License-Identifier: Apache-2.0
// `judge`: the decisions of rules that look at whole laws, or at whole chains. A block for each
// sequence walks its chain, row after row, and asks the rule; a sweep computes both laws again, in
// double precision, from normalisers that are first made as exact. These go back to the workspace
// for what `verify_resample` draws; drafts that are kept are written here.
// To add what a rule may ask for: its member of `At`.
#include "exact.cuh"
#include "judge.cuh"

namespace specens {
namespace {

// The digits of a search, each of a sweep; below the last of them is rounding.
constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kFirstShift = 62 - kDigitBits;  // probabilities are below 2
constexpr int kLastShift = kFirstShift - 4 * kDigitBits;
static_assert(52 - kLastShift > 40, "a search is finer than what is tied");

struct JudgeShared {
  Position position;
  double totals[kWarps];
  unsigned counts[kDigits];
  int digit;
  int64_t above;
};

// The compiler's host pass cannot deduce what functions of a device return, and needs none of them.
#if !defined(SPECENS_HOST_PASS)

__device__ __forceinline__ double block_max(double own, double (&totals)[kWarps]) {
  own = warp_max(own);
  if (lane_id() == 0) totals[warp_id()] = own;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) own = totals[w] > own ? totals[w] : own;
  __syncthreads();
  return own;
}

// The `At` of rules/judgement.h, in every thread of the block.
class At {
 public:
  __device__ __forceinline__ At(const Problem& problem, const VerifyParams& params,
                                JudgeShared& shared, double remembered)
      : p(value_mass(shared.position, value_of(shared.position, shared.position.drafted))),
        q(shared.position.proposer == kNobody
              ? 1.0
              : field_mass(shared.position.proposal,
                           static_cast<double>(shared.position.drafted[kFields]))),
        memory(remembered),
        parameters(params.parameters),
        vocab_size(problem.ensemble.vocab_size),
        at_zero(shared.position.greedy),
        problem_(problem),
        shared_(shared) {}

  const double p, q, memory;
  const double* const parameters;
  const int64_t vocab_size;
  const bool at_zero;

  __device__ __forceinline__ double highest(Side side) const {
    const Position& position = shared_.position;
    if (side == Side::kDraft) {
      return position.proposer == kNobody ? 1.0
                                          : field_mass(position.proposal, position.proposal.top);
    }
    if (!position.is_mixture) return field_mass(position.target, position.target.top);
    double most = 0.0;
    for (int64_t token = threadIdx.x; token < vocab_size; token += kThreads) {
      const double mass = target_mass(position, token);
      most = mass > most ? mass : most;
    }
    return block_max(most, shared_.totals);
  }

  // Digit by digit; probabilities are in the order of their bits.
  __device__ __forceinline__ double least_of_top(Side side, int64_t n) const {
    uint64_t low = 0;
    if (threadIdx.x == 0) shared_.above = 0;
    for (int shift = kFirstShift; shift >= kLastShift; shift -= kDigitBits) {
      for (int d = static_cast<int>(threadIdx.x); d < kDigits; d += kThreads) shared_.counts[d] = 0;
      __syncthreads();
      for (int64_t token = threadIdx.x; token < vocab_size; token += kThreads) {
        const double mass = side == Side::kTarget ? target_mass(shared_.position, token)
                                                  : draft_mass(shared_.position, token);
        uint64_t bits;
        memcpy(&bits, &mass, sizeof bits);
        if ((bits ^ low) >> (shift + kDigitBits) == 0) {
          atomicAdd(&shared_.counts[bits >> shift & (kDigits - 1)], 1u);
        }
      }
      __syncthreads();
      if (warp_id() == 0) find_digit(n);
      __syncthreads();
      low |= static_cast<uint64_t>(shared_.digit) << shift;
    }
    double least;
    memcpy(&least, &low, sizeof least);
    return least;
  }

  template <typename Sum>
  __device__ __forceinline__ Sums sums(const Sum& sum) const {
    const Position& position = shared_.position;
    double own[Sum::kSums] = {};
    for (int64_t token = threadIdx.x; token < vocab_size; token += kThreads) {
      const double drafted = Sum::kReadsDraft ? draft_mass(position, token) : 0.0;
      sum.add(target_mass(position, token), drafted, StandardLog{}, own);
    }
    Sums sums = {};
#pragma unroll
    for (int k = 0; k < Sum::kSums; ++k) sums.value[k] = block_sum(own[k], shared_.totals);
    return sums;
  }

 private:
  // The digit that has the n-th largest probability, and how many are above it; one warp.
  __device__ __forceinline__ void find_digit(int64_t n) const {
    constexpr int kShare = kDigits / kLanes;
    const int last = kDigits - 1 - lane_id() * kShare;
    int64_t own = 0;
    for (int i = 0; i < kShare; ++i) own += shared_.counts[last - i];
    int64_t upto = own;
#pragma unroll
    for (int by = 1; by < kLanes; by *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, upto, static_cast<unsigned>(by));
      if (lane_id() >= by) upto += before;
    }
    int64_t above = shared_.above + upto - own;
    __syncwarp();
    if (!(above < n && above + own >= n)) return;
    int digit = last;
    for (; above + shared_.counts[digit] < n; --digit) above += shared_.counts[digit];
    shared_.digit = digit;
    shared_.above = above;
  }

  const Problem& problem_;
  JudgeShared& shared_;
};

// One block's walk.
class Judging {
 public:
  __device__ __forceinline__ Judging(const Problem& problem, const VerifyParams& params,
                                     JudgeShared& shared)
      : problem_(problem),
        params_(params),
        shared_(shared),
        b_(static_cast<int64_t>(blockIdx.x)),
        sweeps_(with_rule(params.rule, [](auto rule) { return decltype(rule)::kSweeps; })),
        asked_at_zero_(with_rule(params.rule, [](auto rule) { return decltype(rule)::kAtZero; })),
        memory_(params.memory.data == nullptr ? 0.0 : params.memory.at(b_)) {}

  __device__ __forceinline__ Decision run() {
    if (params_.rule == RuleId::kBlock && read(0) && !shared_.position.greedy) return block();
    return walk();
  }

 private:
  __device__ __forceinline__ double coin(int64_t t) const {
    return static_cast<double>(params_.uniforms.at(b_, t + 1, 0));
  }

  // False if nothing follows row t - 1, not even a bonus token.
  __device__ __forceinline__ bool read(int64_t t) {
    if (t == problem_.rows) return false;
    Position& position = shared_.position;
    __syncthreads();
    if (warp_id() == 0) {
      const int64_t place = b_ * problem_.rows + t;
      read_position(problem_, place, position, problem_.cut || problem_.folds_warped());
      read_laws(problem_, place, position, true);
    }
    __syncthreads();
    return position.has_child || params_.bonus;
  }

  __device__ __forceinline__ int32_t status() const {
    const Position& position = shared_.position;
    return position_status(position) | (position.has_child && !position.valid ? kInvalidDraft : 0);
  }

  // Makes the row's normalisers exact, here and for the next launch.
  __device__ __forceinline__ void refine_position(int64_t t) {
    Position& position = shared_.position;
    __syncthreads();  // the others may still ask by the normalisers as they were
    refine(problem_, shared_.totals, position);
    if (threadIdx.x != 0) return;
    const int64_t place = b_ * problem_.rows + t;
    Total* totals = problem_.totals + place * problem_.slots;
    const bool aliased = proposal_is_member(problem_, position);
    const auto write = [&](int slot, const Field& field) {
      store(totals + slot, Total{exp(field.log_sum), field.top, field.flags});
    };
    for (int k = 0; k < position.count && position.is_mixture; ++k) {
      const bool shares = position.members[k].share != 0.0 || (aliased && position.proposer == k);
      if (shares && !position.members[k].empty) write(k, position.members[k]);
    }
    if (position.warped)
      store(problem_.cutoffs + place * kCutoffs + kTargetCutoff, position.target.cutoff);
    if (!position.empty && (position.warped || !position.is_mixture)) {
      write(position.warped ? problem_.warped_slot() : 0, position.target);
    }
    if (position.proposer != kNobody && !aliased && !position.proposal.empty) {
      write(problem_.proposal_slot(), position.proposal);
    }
  }

  __device__ __forceinline__ Judgement ask() {
    const At at(problem_, params_, shared_, memory_);
    return with_rule(params_.rule, [&](auto rule) { return rule.judge(at); });
  }

  __device__ __forceinline__ bool keeps(int64_t t, const Judgement& judgement, int64_t best) const {
    const Position& position = shared_.position;
    if (position.greedy) {
      if (!(coin(t) < 1.0) || judgement.vetoed) return false;
      return judgement.trusted || (!position.empty && position.token == best);
    }
    return coin(t) * draft_mass(position, position.token) < judgement.kept;
  }

  // The target's most probable token but for the child, the lowest id on ties.
  __device__ __forceinline__ int64_t best_but_child() {
    const Position& position = shared_.position;
    const int64_t vocab_size = problem_.ensemble.vocab_size;
    double most = 0.0;
    for (int64_t token = threadIdx.x; token < vocab_size; token += kThreads) {
      const double mass = token == position.token ? 0.0 : target_mass(position, token);
      most = mass > most ? mass : most;
    }
    most = block_max(most, shared_.totals);
    if (!(most > 0.0)) return 0;
    double first = -static_cast<double>(vocab_size);
    for (int64_t token = threadIdx.x; token < vocab_size; token += kThreads) {
      if (token == position.token || target_mass(position, token) < least(most)) continue;
      first = -static_cast<double>(token);
      break;
    }
    return static_cast<int64_t>(-block_max(first, shared_.totals));
  }

  __device__ __forceinline__ Decision walk() {
    Decision decision = {};
    const Position& position = shared_.position;
    for (int64_t t = 0; read(t); ++t) {
      decision.stop = t;
      decision.status |= status();
      if (position.greedy) decision.best = load_fresh(problem_.best + b_ * problem_.rows + t);
      decision.follows = position.greedy ? Follows::kBest : Follows::kTarget;
      if (!position.valid || !step(t, decision)) return decision;
      decision.stop = t + 1;
      decision.follows = Follows::kNothing;
    }
    return decision;
  }

  // Whether the valid child of a row is kept; if not, what follows.
  __device__ __forceinline__ bool step(int64_t t, Decision& decision) {
    const Position& position = shared_.position;
    const bool asks = !position.greedy || asked_at_zero_;
    for (bool refined = sweeps_;; refined = true) {
      if (asks && refined) refine_position(t);
      decision.judgement = asks ? ask() : Judgement{};
      if (keeps(t, decision.judgement, decision.best)) {
        keep_child(t);
        return true;
      }
      if (position.greedy) {
        if (decision.judgement.vetoed) decision.best = best_but_child();
        return false;
      }
      if (decision.judgement.left == Left::kTarget && !decision.judgement.without_token) {
        return false;
      }
      decision.follows = Follows::kLeft;
      // Two laws that are nearly equal differ by less than what their normalisers were good to.
      if (refined) return false;
    }
  }

  __device__ __forceinline__ void keep_child(int64_t t) {
    const Position& position = shared_.position;
    if (threadIdx.x == 0) keep(params_, position, b_, t);
    if (params_.rule != RuleId::kLikelihood) return;
    const double log_prob = value_log_mass(position, value_of(position, position.drafted));
    memory_ = remember(memory_, log_prob, params_.parameters[1]);
  }

  // Every row is looked at before the last draft that is kept is known.
  __device__ __forceinline__ Decision block() {
    Decision decision = {};
    const Position& position = shared_.position;
    double reach = 1.0, kept_reach = 1.0;
    int64_t t = 0;
    for (;; ++t) {
      const bool follows = read(t), valid = follows && position.valid;
      if (follows) decision.status |= status();
      if (valid) refine_position(t);
      const double threshold = valid && t > 0 ? block_threshold(reach, mass_left(reach)) : reach;
      if (t > 0 && coin(t - 1) < threshold) {
        decision.stop = t;
        kept_reach = reach;
      }
      decision.follows = follows ? Follows::kTarget : Follows::kNothing;
      if (!valid) break;
      if (threadIdx.x == 0) keep(params_, position, b_, t);
      const At at(problem_, params_, shared_, memory_);
      reach = block_step(reach, at.p, at.q);
    }
    if (decision.stop < t) decision.follows = Follows::kLeft;
    decision.judgement.scale = kept_reach;
    return decision;
  }

  // sum max(reach p - q, 0).
  __device__ __forceinline__ double mass_left(double reach) {
    Judgement judgement;
    judgement.scale = reach;
    return sum_tokens(problem_, shared_.totals, [&](int64_t token) {
      return left_of(judgement, target_mass(shared_.position, token),
                     draft_mass(shared_.position, token));
    });
  }

  const Problem& problem_;
  const VerifyParams& params_;
  JudgeShared& shared_;
  int64_t b_;
  bool sweeps_;
  bool asked_at_zero_;  // the rule is asked where the temperature is 0
  double memory_;
};

__device__ __forceinline__ void judge_sequence(const Problem& problem, const VerifyParams& params,
                                               JudgeShared& shared) {
  release_next();
  const Decision decision = Judging(problem, params, shared).run();
  if (threadIdx.x == 0) store(problem.decisions + blockIdx.x, decision);
}

#else
__device__ inline void judge_sequence(const Problem&, const VerifyParams&, JudgeShared&) {}
#endif

__global__ void __launch_bounds__(kThreads, 1) judge(Problem problem, VerifyParams params) {
  SPECENS_SHARED(JudgeShared, shared);
  judge_sequence(problem, params, shared);
}

}  // namespace

bool is_judged(RuleId rule) {
  return rule != RuleId::kRejection && rule != RuleId::kLenient && rule != RuleId::kGreedy;
}

bool dense_when_greedy(RuleId rule) {
  return with_rule(rule, [](auto chosen) { return decltype(chosen)::kNeedsDraft; });
}

void launch_judge(const Problem& problem, const VerifyParams& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(problem.batch));
  SPECENS_LAUNCH(judge, grid, dim3(kThreads), sizeof(JudgeShared), stream, problem, params);
}

}  // namespace specens
