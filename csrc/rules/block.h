// SPDX-License-Identifier: Apache-2.0
// `block` judges a chain at once; where the temperature is 0 it is `rejection`.
#pragma once

#include "judgement.h"

namespace specens {

// How much of the path so far is kept, capped: c_i = min(1, c_{i-1} p(x_i) / q(x_i)).
SPECENS_HOST_DEVICE double block_step(double reach, double p, double q) {
  return q > 0.0 ? minimum(1.0, reach * (p / q)) : 0.0;
}

// Chance that a block ends no earlier than here; `mass_left` = sum max(reach p - q, 0) over the
// row after x_i.
SPECENS_HOST_DEVICE double block_threshold(double reach, double mass_left) {
  return mass_left > 0.0 ? mass_left / (mass_left + (1.0 - reach)) : (reach >= 1.0 ? 1.0 : 0.0);
}

}  // namespace specens
