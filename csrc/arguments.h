// SPDX-License-Identifier: Apache-2.0
// Reads the flat lists of addresses, strides and numbers that specens_kernels/native.py writes, in
// its order, into the parameters of specens.h. Python has checked every shape; what is checked here
// is that the two files agree.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "specens.h"

namespace specens {

namespace py = pybind11;

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

inline Logits read_logits(Reader& in) {
  const void* data = in.address<const void>();
  const auto dtype = static_cast<DType>(in.integer());
  const int64_t batch_stride = in.integer();
  return {data, dtype, batch_stride, in.integer()};
}

template <typename T>
Values<T> read_values(Reader& in) {
  const T* data = in.address<const T>();
  const int64_t batch_stride = in.integer();
  const int64_t row_stride = in.integer();
  return {data, batch_stride, row_stride, in.integer()};
}

inline Integers read_integers(Reader& in) {
  const void* data = in.address<const void>();
  const bool wide = in.integer() != 0;
  const int64_t batch_stride = in.integer();
  return {data, wide, batch_stride, in.integer()};
}

// An id that a table has.
template <typename Id, size_t kSize>
Id read_id(Reader& in, const Named<Id> (&table)[kSize]) {
  const int64_t id = in.integer();
  for (const Named<Id>& entry : table) {
    if (static_cast<int64_t>(entry.id) == id) return entry.id;
  }
  throw std::runtime_error("_C: no ensemble or rule has the id " + std::to_string(id));
}

inline int read_members(Reader& in, Logits* members) {
  const auto count = static_cast<int>(in.integer());
  if (count < 1 || count > kMaxMembers) {
    throw std::runtime_error("_C: the number of members is out of range");
  }
  for (int k = 0; k < count; ++k) members[k] = read_logits(in);
  return count;
}

inline Ensemble read_ensemble(Reader& in) {
  Ensemble ensemble;
  ensemble.num_members = read_members(in, ensemble.members);
  ensemble.weights = read_values<float>(in);
  ensemble.temperature = read_values<float>(in);
  ensemble.top_k = read_values<int32_t>(in);
  ensemble.top_p = read_values<float>(in);
  ensemble.min_p = read_values<float>(in);
  ensemble.space = read_id(in, kEnsembles);
  ensemble.warp_members = in.integer() != 0;
  ensemble.plausibility = in.real();
  ensemble.vocab_size = in.integer();
  return ensemble;
}

inline UniformsParams read_uniforms(Reader& in) {
  UniformsParams params;
  params.seeds = read_values<int64_t>(in);
  params.positions = read_values<int64_t>(in);
  params.stream = static_cast<uint32_t>(in.integer());
  params.index = static_cast<uint32_t>(in.integer());
  params.batch = in.integer();
  params.rows = in.integer();
  params.out = in.address<float>();
  return params;
}

inline MixParams read_mix(Reader& in) {
  MixParams params;
  params.ensemble = read_ensemble(in);
  params.batch = in.integer();
  params.rows = in.integer();
  params.log_probs = in.address<float>();
  params.status = in.address<int32_t>();
  return params;
}

inline SampleParams read_sample(Reader& in) {
  SampleParams params;
  params.ensemble = read_ensemble(in);
  params.member = static_cast<int>(in.integer());
  params.batch = in.integer();
  params.rows = in.integer();
  params.uniforms = read_values<float>(in);
  params.tokens = in.address<int64_t>();
  params.log_probs = in.address<float>();
  params.lse = in.address<float>();
  params.status = in.address<int32_t>();
  return params;
}

inline VerifyParams read_verify(Reader& in) {
  VerifyParams params;
  params.ensemble = read_ensemble(in);
  params.rule = read_id(in, kRules);
  for (double& parameter : params.parameters) parameter = in.real();
  params.memory = read_values<double>(in);
  params.bonus = in.integer() != 0;
  params.batch = in.integer();
  params.nodes = in.integer();
  params.draft_tokens = read_integers(in);
  params.proposers = read_integers(in);
  params.uniforms = read_values<float>(in);
  params.draft_logits = read_logits(in);
  params.draft_temperature = read_values<float>(in);
  params.ensemble.lse = read_values<float>(in);
  params.draft_lse = read_values<float>(in);
  params.tokens = in.address<int64_t>();
  params.log_probs = in.address<float>();
  params.num_accepted = in.address<int32_t>();
  params.path = in.address<int32_t>();
  params.status = in.address<int32_t>();
  return params;
}

template <typename Table>
py::dict names(const Table& table) {
  py::dict ids;
  for (const auto& entry : table) ids[entry.name] = static_cast<int>(entry.id);
  return ids;
}

}  // namespace specens
