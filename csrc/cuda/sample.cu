// SPDX-License-Identifier: Apache-2.0
// `sample`: the totals of every row, then a block for each row walks to its token.
#include "draw.cuh"

namespace specens {
namespace {

struct SampleShared {
  Position position;
  DrawScratch scratch;
};

// Of the law that a row was drawn from, before it was normalised.
__device__ double log_sum_exp(const Problem& problem, const Position& position) {
  if (position.empty) return kNoMass;
  const bool mixture = position.is_mixture && !position.warped;
  if (mixture && !problem.alone) return 0.0;
  const Field& field = problem.alone ? position.members[0] : position.target;
  const double temperature =
      field.temperature > 0.0f ? static_cast<double>(field.temperature) : 1.0;
  return field.top / temperature + field.log_sum;
}

__global__ void __launch_bounds__(kThreads, 1) draw_tokens(Problem problem, SampleParams params) {
  SPECENS_SHARED(SampleShared, shared);
  const int64_t place = blockIdx.x;
  Position& position = shared.position;
  const bool cutoffs_known = problem.cut || problem.folds_warped();
  if (cutoffs_known) await_previous();  // else `read_position` reads the caller's tensors only
  if (warp_id() == 0) read_position(problem, place, position, cutoffs_known);
  await_previous();
  if (warp_id() == 0) read_laws(problem, place, position, true);
  __syncthreads();
  const int64_t token =
      position.greedy ? load_fresh(problem.best + place)
                      : draw_target(problem, position, params.uniforms, place, shared.scratch);
  if (threadIdx.x != 0) return;
  store(params.tokens + place, token);
  store(params.log_probs + place,
        static_cast<float>(value_log_mass(position, token_value(position, token))));
  store(params.lse + place, static_cast<float>(log_sum_exp(problem, position)));
  store(params.status + place, position_status(position));
}

// A member alone is a mixture of one, warped by its own temperature.
Problem problem_of(const SampleParams& params) {
  Problem problem = make_problem(params.ensemble, params.batch, params.rows);
  if (params.member < 0) return problem;
  Ensemble& ensemble = problem.ensemble;
  ensemble.members[0] = ensemble.members[params.member];
  ensemble.temperature.data += params.member * ensemble.temperature.member_stride;
  ensemble.num_members = 1;
  ensemble.space = Space::kProbabilities;
  ensemble.warp_members = true;
  ensemble.plausibility = 0.0;
  problem.alone = true;
  return problem;
}

}  // namespace

size_t cuda_sample_workspace(const SampleParams& params) {
  Problem problem = problem_of(params);
  return attach(problem, nullptr);
}

int cuda_sample(const SampleParams& params, void* workspace, size_t workspace_bytes,
                cudaStream_t stream) {
  Problem problem = problem_of(params);
  const size_t needed = attach(problem, workspace);
  if (const int error = check(problem, needed, workspace_bytes)) return error;
  if (problem.batch * problem.rows == 0) return 0;
  launch_stats(problem, stream);
  const dim3 grid(static_cast<unsigned>(problem.batch * problem.rows));
  SPECENS_LAUNCH_EARLY(draw_tokens, grid, dim3(kThreads), sizeof(SampleShared), stream, problem,
                       params);
  return launch_error();
}

}  // namespace specens
