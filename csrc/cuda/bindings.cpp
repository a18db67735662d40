// SPDX-License-Identifier: Apache-2.0
// The functions `cuda_*` of a module: the lists of arguments.h, then the stream's workspace (its
// address and bytes) and the stream; `cuda_*_workspace` takes the list alone and says how many
// bytes are needed. `_C` has them with kernels from nvcc, `specens_simt` with the emulator's.
#include "bindings.h"

#include <mutex>
#include <stdexcept>
#include <string>

#include "../arguments.h"
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
// in which one launch leaves what the next reads, so those of two ops must not alternate. It is
// taken after the GIL is released and given back before the GIL is asked for, so neither waits for
// the other. The emulator, too, runs one launch at a time.
std::mutex one_op_at_a_time;

void launch_uniforms(const py::list& arguments) {
  Reader in(arguments);
  const UniformsParams params = read_uniforms(in);
  auto* stream = in.address<std::remove_pointer_t<cudaStream_t>>();
  in.finish();
  int code;
  {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(one_op_at_a_time);
    code = cuda_uniforms(params, stream);
  }
  raise(code);
}

// Reads what follows the parameters, and launches.
template <typename Params>
void launch(Reader& in, const Params& params,
            int (*launcher)(const Params&, void*, size_t, cudaStream_t)) {
  void* workspace = in.address<void>();
  const auto bytes = static_cast<size_t>(in.integer());
  auto* stream = in.address<std::remove_pointer_t<cudaStream_t>>();
  in.finish();
  int code;
  {
    py::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(one_op_at_a_time);
    code = launcher(params, workspace, bytes, stream);
  }
  raise(code);
}

}  // namespace

void bind_cuda(py::module_& module) {
  py::register_local_exception<CudaUnsupported>(module, "CudaUnsupported", PyExc_RuntimeError);
  module.attr("CUDA_MAX_MEMBERS") = kCudaMaxMembers;
  module.def("cuda_uniforms", &launch_uniforms);
  module.def("cuda_mix", [](const py::list& arguments) {
    Reader in(arguments);
    launch(in, read_mix(in), &cuda_mix);
  });
  module.def("cuda_sample", [](const py::list& arguments) {
    Reader in(arguments);
    launch(in, read_sample(in), &cuda_sample);
  });
  module.def("cuda_verify", [](const py::list& arguments) {
    Reader in(arguments);
    launch(in, read_verify(in), &cuda_verify);
  });
  module.def("cuda_mix_workspace", [](const py::list& arguments) {
    Reader in(arguments);
    return cuda_mix_workspace(read_mix(in));
  });
  module.def("cuda_sample_workspace", [](const py::list& arguments) {
    Reader in(arguments);
    return cuda_sample_workspace(read_sample(in));
  });
  module.def("cuda_verify_workspace", [](const py::list& arguments) {
    Reader in(arguments);
    return cuda_verify_workspace(read_verify(in));
  });
}

}  // namespace specens
