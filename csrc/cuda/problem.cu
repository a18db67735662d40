// SPDX-License-Identifier: Apache-2.0
// Host code that the ops share: problems, their workspace, and what an error means.
#include "judge.cuh"
#include "stats.cuh"
#include "workspace.cuh"

namespace specens {
Problem make_problem(const Ensemble& ensemble, int64_t batch, int64_t rows) {
  Problem problem = {};
  problem.ensemble = ensemble;
  problem.temperatures = ensemble.temperature;
  problem.num_temperatures = ensemble.num_members;
  problem.cut = ensemble.top_k.data != nullptr || ensemble.top_p.data != nullptr ||
                ensemble.min_p.data != nullptr || ensemble.plausibility > 0.0;
  problem.batch = batch;
  problem.rows = rows;
  return problem;
}

size_t attach(Problem& problem, void* workspace) {
  const int64_t places = problem.batch * problem.rows;
  problem.sub_tiles = static_cast<int>((problem.ensemble.vocab_size + kSubTile - 1) / kSubTile);
  problem.slots = problem.warped_slot() + (problem.is_mixture() ? 1 : 0);
  Layout layout(workspace);
  problem.tickets = layout.tickets();
  problem.cutoffs = layout.take<double>(places * kCutoffs);
  problem.partials = layout.take<Partial>(places * problem.slots * problem.sub_tiles);
  problem.totals = layout.take<Total>(places * problem.slots);
  problem.best = layout.take<int64_t>(places);
  problem.residuals = layout.take<Residual>(problem.batch * problem.sub_tiles);
  problem.decisions = layout.take<Decision>(problem.batch);
  return layout.used();
}

int check(const Problem& problem, size_t needed, size_t given) {
  if (problem.ensemble.num_members > kCudaMaxMembers) return kTooManyMembers;
  if (problem.batch * problem.rows > kMaxPlaces) return kTooManyRows;
  if (problem.sub_tiles > kMaxSubTiles) return kVocabularyTooLarge;
  return needed > given ? kWorkspaceTooSmall : 0;
}

const char* cuda_error(int code) {
  switch (code) {
    case kWorkspaceTooSmall:
      return "the workspace is too small";
    case kTooManyMembers:
      return "more members than a kernel takes";
    case kTooManyRows:
      return "more rows than a grid has";
    case kVocabularyTooLarge:
      return "a larger vocabulary than a block can hold";
    case kHeadTooLarge:
      return "larger heads than a kernel takes";
    case kTooManySlots:
      return "more slots than a kernel counts";
    default:
      break;
  }
#if defined(SPECENS_SIMT)
  return "unknown error";
#else
  switch (code) {
    case cudaErrorInsufficientDriver:
      return "there is no CUDA driver, or it is older than the kernels need";
    case cudaErrorUnsupportedPtxVersion:
      return "the CUDA driver is older than the kernels' PTX, which the device would need";
    case cudaErrorNoKernelImageForDevice:
      return "the kernels were not built for this device";
    default:
      return cudaGetErrorString(static_cast<cudaError_t>(code));
  }
#endif
}

bool cuda_unsupported(int code) {
#if defined(SPECENS_SIMT)
  (void)code;
  return false;
#else
  return code == cudaErrorInsufficientDriver || code == cudaErrorUnsupportedPtxVersion ||
         code == cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace specens
