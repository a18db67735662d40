// SPDX-License-Identifier: Apache-2.0
// What every op of the CUDA backend starts with: a Problem, its place in the workspace, and the
// launches that fill the workspace's totals.
#pragma once

#include "cuda.h"
#include "position.cuh"

namespace specens {

// Which cutoffs a launch finds: those that logits alone decide, or that of a mixture's logarithm,
// which needs the members' totals.
enum class Thresholds { kBefore, kOfMixture };

// A block holds the masses of all sub-tiles of a row.
constexpr int kMaxSubTiles = 2048;

inline unsigned tiles_of(const Problem& problem) {
  return static_cast<unsigned>((problem.sub_tiles + kSubTilesPerTile - 1) / kSubTilesPerTile);
}

// A problem without drafts. Its workspace follows, with `attach`.
Problem make_problem(const Ensemble& ensemble, int64_t batch, int64_t rows);

// Points the problem into the workspace; returns the bytes it takes, and does no more than that if
// there is no workspace.
size_t attach(Problem& problem, void* workspace);

// Whether kernels take this problem and the workspace is large enough; an error's code, or 0.
int check(const Problem& problem, size_t needed, size_t given);

void launch_thresholds(const Problem& problem, Thresholds which, cudaStream_t stream);
void launch_stats(const Problem& problem, cudaStream_t stream);

}  // namespace specens
