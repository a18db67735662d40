// SPDX-License-Identifier: Apache-2.0
// Reads the flat lists of addresses, strides and numbers that specens_kernels/flat.py writes, in
// its order, into the parameters of specens.h. Python has checked every shape; what is checked here
// is that the two files agree. To add a parameter: its place in its struct's `>>`.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "specens.h"

namespace specens {

namespace py = pybind11;

class Reader {
 public:
  explicit Reader(const py::list& flat) : flat_(flat.ptr()), size_(PyList_GET_SIZE(flat_)) {}

  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(next());
    if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  bool flag() { return integer() != 0; }

  double real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return value;
  }

  void finish() const {
    if (at_ != size_) throw std::runtime_error("_C: too many arguments");
  }

 private:
  PyObject* next() {
    if (at_ == size_) throw std::runtime_error("_C: too few arguments");
    return PyList_GET_ITEM(flat_, at_++);
  }

  PyObject* flat_;
  Py_ssize_t size_;
  Py_ssize_t at_ = 0;
};

// Numbers, dtypes and addresses.
template <typename T, typename = std::enable_if_t<std::is_scalar_v<T>>>
Reader& operator>>(Reader& in, T& value) {
  if constexpr (std::is_pointer_v<T>) {
    value = reinterpret_cast<T>(static_cast<uintptr_t>(in.integer()));
  } else if constexpr (std::is_floating_point_v<T>) {
    value = static_cast<T>(in.real());
  } else {
    value = static_cast<T>(in.integer());
  }
  return in;
}

// An id that a table has.
template <typename Id, size_t kSize>
Id read_id(Reader& in, const Named<Id> (&table)[kSize]) {
  const int64_t id = in.integer();
  for (const Named<Id>& entry : table) {
    if (static_cast<int64_t>(entry.id) == id) return entry.id;
  }
  throw std::runtime_error("_C: no space or rule has the id " + std::to_string(id));
}

inline Reader& operator>>(Reader& in, Logits& logits) {
  return in >> logits.data >> logits.dtype >> logits.batch_stride >> logits.row_stride;
}

template <typename T>
Reader& operator>>(Reader& in, Values<T>& values) {
  return in >> values.data >> values.batch_stride >> values.row_stride >> values.member_stride;
}

inline Reader& operator>>(Reader& in, Integers& integers) {
  return in >> integers.data >> integers.wide >> integers.batch_stride >> integers.row_stride;
}

inline void read_members(Reader& in, Logits (&members)[kMaxMembers], int& count) {
  in >> count;
  if (count < 1 || count > kMaxMembers) {
    throw std::runtime_error("_C: the number of members is out of range");
  }
  for (int k = 0; k < count; ++k) in >> members[k];
}

inline Reader& operator>>(Reader& in, Ensemble& ensemble) {
  read_members(in, ensemble.members, ensemble.num_members);
  in >> ensemble.weights >> ensemble.temperature;
  in >> ensemble.top_k >> ensemble.top_p >> ensemble.min_p;
  ensemble.space = read_id(in, kSpaces);
  return in >> ensemble.warp_members >> ensemble.plausibility >> ensemble.vocab_size;
}

inline Reader& operator>>(Reader& in, UniformsParams& params) {
  in >> params.seeds >> params.positions >> params.stream >> params.index;
  return in >> params.batch >> params.rows >> params.out;
}

inline Reader& operator>>(Reader& in, MixParams& params) {
  in >> params.ensemble >> params.batch >> params.rows;
  return in >> params.log_probs >> params.status;
}

inline Reader& operator>>(Reader& in, SampleParams& params) {
  in >> params.ensemble >> params.member >> params.batch >> params.rows >> params.uniforms;
  in >> params.tokens >> params.log_probs >> params.lse >> params.status;
  in >> params.count >> params.block_stride;
  return in >> params.ensemble.rows;
}

inline Reader& operator>>(Reader& in, EngineLayout& layout) {
  in >> layout.draft_rows >> layout.num_drafts;
  in >> layout.draft_filtered >> layout.draft_probabilities;
  in >> layout.parameters >> layout.num_parameters;
  return in >> layout.tokens >> layout.wide_tokens >> layout.tokens_stride;
}

inline Reader& operator>>(Reader& in, VerifyParams& params) {
  in >> params.ensemble;
  params.rule = read_id(in, kRules);
  for (double& parameter : params.parameters) in >> parameter;
  in >> params.memory >> params.bonus >> params.batch >> params.nodes;
  in >> params.draft_tokens >> params.proposers >> params.uniforms;
  in >> params.draft_logits >> params.draft_temperature;
  in >> params.ensemble.lse >> params.draft_lse;
  in >> params.tokens >> params.log_probs >> params.num_accepted >> params.path;
  in >> params.status;
  in >> params.parents >> params.independent >> params.without;
  if (!in.flag()) return in;
  return in >> params.ensemble.rows >> params.layout;
}

inline Reader& operator>>(Reader& in, RowsParams& params) {
  in >> params.rows >> params.num_drafts >> params.more;
  return in >> params.batch >> params.columns >> params.count;
}

inline Reader& operator>>(Reader& in, Heads& heads) {
  in >> heads.data >> heads.dtype;
  return in >> heads.batch_stride >> heads.head_stride >> heads.row_stride;
}

inline Reader& operator>>(Reader& in, Pages& pages) { return in >> pages.table >> pages.size; }

inline Reader& operator>>(Reader& in, AttentionParams& params) {
  in >> params.query >> params.keys >> params.values >> params.pages;
  in >> params.batch >> params.heads >> params.key_heads >> params.nodes;
  in >> params.size >> params.value_size;
  in >> params.lengths >> params.visible >> params.depths >> params.sinks;
  in >> params.scale >> params.softcap >> params.window;
  return in >> params.out >> params.lse;
}

inline Reader& operator>>(Reader& in, Slab& slab) {
  in >> slab.data >> slab.layers >> slab.heads >> slab.row_bytes;
  return in >> slab.layer_stride >> slab.batch_stride >> slab.head_stride >> slab.row_stride;
}

inline Reader& operator>>(Reader& in, CompactParams& params) {
  params.slabs.resize(static_cast<size_t>(in.integer()));
  for (Slab& slab : params.slabs) in >> slab;
  in >> params.pages >> params.batch >> params.depth;
  return in >> params.lengths >> params.path;
}

inline Reader& operator>>(Reader& in, FloorParams& params) {
  read_members(in, params.members, params.num_members);
  return in >> params.batch >> params.rows >> params.vocab_size;
}

// Reads parameters, and what else `run` takes, and runs it without the GIL. A mutex is taken after
// the GIL is released and given back before the GIL is asked for, so neither waits for the other.
template <typename Result, typename Params, typename... Rest>
Result call(const py::list& flat, Result (*run)(const Params&, Rest...),
            std::mutex* mutex = nullptr) {
  Reader in(flat);
  Params params;
  in >> params;
  std::tuple<Rest...> rest;
  std::apply([&](auto&... values) { ((void)(in >> values), ...); }, rest);
  in.finish();
  const py::gil_scoped_release release;
  std::unique_lock<std::mutex> lock;
  if (mutex != nullptr) lock = std::unique_lock<std::mutex>(*mutex);
  return std::apply([&](auto... values) { return run(params, values...); }, rest);
}

template <typename Table>
py::dict names(const Table& table) {
  py::dict ids;
  for (const auto& entry : table) ids[entry.name] = static_cast<int>(entry.id);
  return ids;
}

}  // namespace specens
