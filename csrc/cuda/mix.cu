// SPDX-License-Identifier: Apache-2.0
// `mix`: the totals of every row, then its log-probabilities, a warp for each sub-tile.
#include "stats.cuh"

namespace specens {
namespace {

__global__ void __launch_bounds__(kThreads, 1) write_log_probs(Problem problem, MixParams params) {
  SPECENS_SHARED(Position, position);
  const int64_t place = blockIdx.y, vocab_size = problem.ensemble.vocab_size;
  if (warp_id() == 0) {
    read_position(problem, place, position, problem.cut || problem.folds_warped());
    read_laws(problem, place, position, true);
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0) store(params.status + place, position_status(position));
  const int sub_tile = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  if (sub_tile >= problem.sub_tiles) return;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t begin = static_cast<int64_t>(sub_tile) * kSubTile + round * kRound;
    double values[kPerLane];
    lane_values(position, begin, vocab_size, values);
    float* out = params.log_probs + place * vocab_size + begin;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int at = lane_token(i);
      if (begin + at >= vocab_size) continue;
      store(out + at, static_cast<float>(value_log_mass(position, values[i])));
    }
  }
}

}  // namespace

size_t cuda_mix_workspace(const MixParams& params) {
  Problem problem = make_problem(params.ensemble, params.batch, params.rows);
  return attach(problem, nullptr);
}

int cuda_mix(const MixParams& params, void* workspace, size_t workspace_bytes,
             cudaStream_t stream) {
  Problem problem = make_problem(params.ensemble, params.batch, params.rows);
  const size_t needed = attach(problem, workspace);
  if (const int error = check(problem, needed, workspace_bytes)) return error;
  if (problem.batch * problem.rows == 0) return 0;
  launch_stats(problem, stream);
  const dim3 grid(tiles_of(problem), static_cast<unsigned>(problem.batch * problem.rows));
  SPECENS_LAUNCH(write_log_probs, grid, dim3(kThreads), sizeof(Position), stream, problem, params);
  return launch_error();
}

}  // namespace specens
