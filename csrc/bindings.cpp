// SPDX-License-Identifier: Apache-2.0
// The module specens_kernels._C: each function takes one flat list of addresses, strides and
// numbers, in the order that specens_kernels/native.py writes them, and releases the GIL while it
// runs. Python has checked every shape; what is checked here is that the two files agree.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "specens.h"

namespace py = pybind11;

namespace {

class Reader {
 public:
  explicit Reader(const py::list& arguments)
      : arguments_(arguments.ptr()), size_(PyList_GET_SIZE(arguments_)) {}

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  double real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  template <typename T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }

  void finish() const {
    if (at_ != size_) throw std::runtime_error("_C: too many arguments");
  }

 private:
  PyObject* next() {
    if (at_ == size_) throw std::runtime_error("_C: too few arguments");
    return PyList_GET_ITEM(arguments_, at_++);
  }

  PyObject* arguments_;
  Py_ssize_t size_;
  Py_ssize_t at_ = 0;
};

specens::Logits read_logits(Reader& in) {
  const void* data = in.address<const void>();
  const auto dtype = static_cast<specens::DType>(in.integer());
  const int64_t batch_stride = in.integer();
  return {data, dtype, batch_stride, in.integer()};
}

template <typename T>
specens::Values<T> read_values(Reader& in) {
  const T* data = in.address<const T>();
  const int64_t batch_stride = in.integer();
  const int64_t row_stride = in.integer();
  return {data, batch_stride, row_stride, in.integer()};
}

specens::Integers read_integers(Reader& in) {
  const void* data = in.address<const void>();
  const bool wide = in.integer() != 0;
  const int64_t batch_stride = in.integer();
  return {data, wide, batch_stride, in.integer()};
}

int read_members(Reader& in, specens::Logits* members) {
  const auto count = static_cast<int>(in.integer());
  if (count < 1 || count > specens::kMaxMembers) {
    throw std::runtime_error("_C: the number of members is out of range");
  }
  for (int k = 0; k < count; ++k) members[k] = read_logits(in);
  return count;
}

specens::Ensemble read_ensemble(Reader& in) {
  specens::Ensemble ensemble;
  ensemble.num_members = read_members(in, ensemble.members);
  ensemble.weights = read_values<float>(in);
  ensemble.temperature = read_values<float>(in);
  ensemble.top_k = read_values<int32_t>(in);
  ensemble.top_p = read_values<float>(in);
  ensemble.min_p = read_values<float>(in);
  ensemble.id = static_cast<specens::EnsembleId>(in.integer());
  ensemble.warp_members = in.integer() != 0;
  ensemble.plausibility = in.real();
  ensemble.vocab_size = in.integer();
  return ensemble;
}

void uniforms(const py::list& arguments) {
  Reader in(arguments);
  specens::UniformsParams params;
  params.seeds = read_values<int64_t>(in);
  params.positions = read_values<int64_t>(in);
  params.stream = static_cast<uint32_t>(in.integer());
  params.index = static_cast<uint32_t>(in.integer());
  params.batch = in.integer();
  params.rows = in.integer();
  params.out = in.address<float>();
  in.finish();
  py::gil_scoped_release release;
  specens::uniforms(params);
}

void mix(const py::list& arguments) {
  Reader in(arguments);
  specens::MixParams params;
  params.ensemble = read_ensemble(in);
  params.batch = in.integer();
  params.rows = in.integer();
  params.log_probs = in.address<float>();
  params.status = in.address<int32_t>();
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::mix(params, threads);
}

void sample(const py::list& arguments) {
  Reader in(arguments);
  specens::SampleParams params;
  params.ensemble = read_ensemble(in);
  params.member = static_cast<int>(in.integer());
  params.batch = in.integer();
  params.rows = in.integer();
  params.uniforms = read_values<float>(in);
  params.tokens = in.address<int64_t>();
  params.log_probs = in.address<float>();
  params.lse = in.address<float>();
  params.status = in.address<int32_t>();
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::sample(params, threads);
}

void verify(const py::list& arguments) {
  Reader in(arguments);
  specens::VerifyParams params;
  params.ensemble = read_ensemble(in);
  params.rule = static_cast<specens::RuleId>(in.integer());
  params.lenience = in.real();
  params.bonus = in.integer() != 0;
  params.batch = in.integer();
  params.nodes = in.integer();
  params.draft_tokens = read_integers(in);
  params.proposers = read_integers(in);
  params.uniforms = read_values<float>(in);
  params.draft_logits = read_logits(in);
  params.draft_temperature = read_values<float>(in);
  params.tokens = in.address<int64_t>();
  params.log_probs = in.address<float>();
  params.num_accepted = in.address<int32_t>();
  params.path = in.address<int32_t>();
  params.status = in.address<int32_t>();
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  specens::verify(params, threads);
}

double floor_sweep(const py::list& arguments) {
  Reader in(arguments);
  specens::Logits members[specens::kMaxMembers];
  const int count = read_members(in, members);
  const int64_t batch = in.integer();
  const int64_t rows = in.integer();
  const int64_t vocab_size = in.integer();
  const auto threads = static_cast<int>(in.integer());
  in.finish();
  py::gil_scoped_release release;
  return specens::floor_sweep(members, count, batch, rows, vocab_size, threads);
}

template <typename Table>
py::dict names(const Table& table) {
  py::dict ids;
  for (const auto& entry : table) ids[entry.name] = static_cast<int>(entry.id);
  return ids;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("MAX_MEMBERS") = specens::kMaxMembers;
  module.def("uniforms", &uniforms);
  module.def("mix", &mix);
  module.def("sample", &sample);
  module.def("verify", &verify);
  module.def("floor_sweep", &floor_sweep);
  module.def("cpu_isa", &specens::cpu_isa);
  module.def("rules", [] { return names(specens::kRules); });
  module.def("ensembles", [] { return names(specens::kEnsembles); });
}
