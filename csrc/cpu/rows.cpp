// SPDX-License-Identifier: Apache-2.0
// Whether packed rows are where a call says, asked before any of them is read.
#include <algorithm>

#include "../specens.h"

namespace specens {

int64_t first_outside(const RowsParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    int64_t end = params.columns;
    if (params.num_drafts.data != nullptr) {
      end = std::min(end, std::max<int64_t>(params.num_drafts.at(b, 0), 0) + params.more);
    }
    for (int64_t i = 0; i < end; ++i) {
      const int64_t row = params.rows.at(b, i);
      if (row < 0 || row >= params.count) return b * params.columns + i;
    }
  }
  return -1;
}

}  // namespace specens
