// SPDX-License-Identifier: Apache-2.0
// `attention` to bfloat16.
#include "attend_halves.cuh"

namespace specens {

void launch_bfloat16(const AttentionProblem& problem, cudaStream_t stream) {
  launch_sizes<BFloat16>(problem, stream);
}

}  // namespace specens
