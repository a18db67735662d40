// SPDX-License-Identifier: Apache-2.0
// The module specens_kernels._C: each op takes one flat list (flat.h) and releases the GIL while it
// runs. To add an op: its line here.
#include "flat.h"

#if defined(SPECENS_CUDA)
#include "cuda/bindings.h"
#endif

namespace specens {
namespace {

template <typename Run>
void bind(py::module_& module, const char* name, Run* run) {
  module.def(name, [run](const py::list& flat) { return call(flat, run); });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("MAX_MEMBERS") = kMaxMembers;
#if defined(SPECENS_CUDA)
  bind_cuda(module);
#endif
  bind(module, "uniforms", &uniforms);
  bind(module, "mix", &mix);
  bind(module, "sample", &sample);
  bind(module, "verify", &verify);
  bind(module, "first_outside", &first_outside);
  bind(module, "attention", &attention);
  bind(module, "compact", &compact);
  bind(module, "floor_sweep", &floor_sweep);
  module.def("cpu_isa", &cpu_isa);
  module.def("rules", [] { return names(kRules); });
  module.def("spaces", [] { return names(kSpaces); });
}

}  // namespace specens
