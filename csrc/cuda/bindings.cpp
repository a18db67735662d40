// SPDX-License-Identifier: Apache-2.0
// The functions `cuda_*` of a module: the lists of flat.h, then the stream's workspace (its
// address and bytes) and the stream; `cuda_*_workspace` takes the list alone and says how many
// bytes are needed. `_C` has them with kernels from nvcc, `specens_simt` with the emulator's.
#include "bindings.h"

#include <mutex>
#include <stdexcept>
#include <string>

#include "../flat.h"
#include "cuda.h"

namespace specens {
namespace {

// What Python hands to another backend.
struct CudaUnsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void raise(int code) {
  if (code == 0) return;
  const std::string message = std::string("cuda: ") + cuda_error(code);
  if (cuda_unsupported(code)) throw CudaUnsupported(message);
  throw std::runtime_error(message);
}

// Held while the launches of one op are enqueued: threads that share a stream share its workspace,
// in which one launch leaves what the next reads, so those of two ops must not alternate. The
// emulator, too, runs one launch at a time.
std::mutex one_op_at_a_time;

template <typename Launch>
void bind(py::module_& module, const char* name, Launch* launch) {
  module.def(name,
             [launch](const py::list& flat) { raise(call(flat, launch, &one_op_at_a_time)); });
}

template <typename Workspace>
void bind_workspace(py::module_& module, const char* name, Workspace* workspace) {
  module.def(name, [workspace](const py::list& flat) { return call(flat, workspace); });
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::register_local_exception<CudaUnsupported>(module, "CudaUnsupported", PyExc_RuntimeError);
  module.attr("CUDA_MAX_MEMBERS") = kCudaMaxMembers;
  bind(module, "cuda_uniforms", &cuda_uniforms);
  bind(module, "cuda_mix", &cuda_mix);
  bind(module, "cuda_sample", &cuda_sample);
  bind(module, "cuda_verify", &cuda_verify);
  bind(module, "cuda_attention", &cuda_attention);
  bind(module, "cuda_compact", &cuda_compact);
  bind_workspace(module, "cuda_mix_workspace", &cuda_mix_workspace);
  bind_workspace(module, "cuda_sample_workspace", &cuda_sample_workspace);
  bind_workspace(module, "cuda_verify_workspace", &cuda_verify_workspace);
  bind_workspace(module, "cuda_attention_workspace", &cuda_attention_workspace);
}

}  // namespace specens
