// SPDX-License-Identifier: Apache-2.0
// Adds the CUDA backend's functions to a module.
#pragma once

#include <pybind11/pybind11.h>

namespace specens {

void bind_cuda(pybind11::module_& module);

}  // namespace specens
