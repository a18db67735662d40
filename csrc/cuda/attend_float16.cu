// SPDX-License-Identifier: Apache-2.0
// `attention` to float16.
#include "attend_halves.cuh"

namespace specens {

void launch_float16(const AttentionProblem& problem, cudaStream_t stream) {
  launch_sizes<Float16>(problem, stream);
}

}  // namespace specens
