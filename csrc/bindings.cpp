// SPDX-License-Identifier: Apache-2.0
// The module specens_kernels._C: each function takes one flat list (arguments.h) and releases the
// GIL while it runs.
#include "arguments.h"

#if defined(SPECENS_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

void uniforms(const py::list& arguments) {
  specens::Reader in(arguments);
  const specens::UniformsParams params = specens::read_uniforms(in);
  in.finish();
  py::gil_scoped_release release;
  specens::uniforms(params);
}

void mix(const py::list& arguments) {
  specens::Reader in(arguments);
  const specens::MixParams params = specens::read_mix(in);
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::mix(params, threads);
}

void sample(const py::list& arguments) {
  specens::Reader in(arguments);
  const specens::SampleParams params = specens::read_sample(in);
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::sample(params, threads);
}

void verify(const py::list& arguments) {
  specens::Reader in(arguments);
  const specens::VerifyParams params = specens::read_verify(in);
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::verify(params, threads);
}

double floor_sweep(const py::list& arguments) {
  specens::Reader in(arguments);
  specens::Logits members[specens::kMaxMembers];
  const int count = specens::read_members(in, members);
  const int64_t batch = in.integer();
  const int64_t rows = in.integer();
  const int64_t vocab_size = in.integer();
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  return specens::floor_sweep(members, count, batch, rows, vocab_size, threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("MAX_MEMBERS") = specens::kMaxMembers;
#if defined(SPECENS_CUDA)
  specens::bind_cuda(module);
#endif
  module.def("uniforms", &uniforms);
  module.def("mix", &mix);
  module.def("sample", &sample);
  module.def("verify", &verify);
  module.def("floor_sweep", &floor_sweep);
  module.def("cpu_isa", &specens::cpu_isa);
  module.def("rules", [] { return specens::names(specens::kRules); });
  module.def("ensembles", [] { return specens::names(specens::kEnsembles); });
}
