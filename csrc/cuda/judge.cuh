// SPDX-License-Identifier: Apache-2.0
// What `judge` leaves in the workspace for `verify_resample`: for each sequence how many drafts are
// kept, and what follows them. To add something that follows a chain: its `Follows`.
#pragma once

#include "cuda.h"
#include "position.cuh"

namespace specens {

enum class Follows : int {
  kNothing,
  kBest,    // decision.best
  kTarget,  // a token of the target's law
  kLeft,    // a token of what the judgement leaves
};

// One sequence's.
struct alignas(16) Decision {
  Judgement judgement;
  int64_t best;
  int64_t stop;  // the row after the drafts that are kept
  int32_t status;
  Follows follows;
};

__device__ inline void emit(const VerifyParams& params, const Position& position, int64_t b,
                            int64_t t, int64_t token) {
  const int64_t place = b * (params.nodes + 1) + t;
  store(params.tokens + place, token);
  store(params.log_probs + place,
        static_cast<float>(value_log_mass(position, token_value(position, token))));
}

// The child of row t, which is kept.
__device__ inline void keep(const VerifyParams& params, const Position& position, int64_t b,
                            int64_t t) {
  emit(params, position, b, t, position.token);
  store(params.path + b * params.nodes + t, static_cast<int32_t>(t + 1));
}

// Whether `judge` decides for a rule.
bool is_judged(RuleId rule);
// Whether a rule asks for the draft's law where all temperatures are 0, too.
bool dense_when_greedy(RuleId rule);

void launch_judge(const Problem& problem, const VerifyParams& params, cudaStream_t stream);

}  // namespace specens
