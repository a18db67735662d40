// SPDX-License-Identifier: Apache-2.0
// The test-only module specens_simt: the CUDA backend on the emulator, and what its kernels read
// and wrote.
#include <pybind11/pybind11.h>

#include "cuda/bindings.h"
#include "flat.h"
#include "simt.h"

namespace py = pybind11;

PYBIND11_MODULE(specens_simt, module) {
  specens::bind_cuda(module);
  module.def("rules", [] { return specens::names(specens::kRules); });
  // {kernel: (launches, bytes loaded, bytes stored)} since the last reset.
  module.def("traffic", [] {
    py::dict table;
    for (const auto& [name, seen] : simt::traffic()) {
      table[py::str(name)] =
          py::make_tuple(seen.launches.load(), seen.loaded.load(), seen.stored.load());
    }
    return table;
  });
  // {kernel: (threads, bytes of shared memory)} of a block.
  module.def("blocks", [] {
    py::dict table;
    for (const auto& [name, seen] : simt::traffic()) {
      table[py::str(name)] = py::make_tuple(seen.threads, seen.shared);
    }
    return table;
  });
  // {kernel: (bytes copied asynchronously, turns that loads of matrices lost to bank conflicts)}.
  module.def("tiles", [] {
    py::dict table;
    for (const auto& [name, seen] : simt::traffic()) {
      table[py::str(name)] = py::make_tuple(seen.copied.load(), seen.conflicts.load());
    }
    return table;
  });
  module.def("reset_traffic", [] {
    simt::current_traffic = nullptr;
    simt::traffic().clear();
  });
}
