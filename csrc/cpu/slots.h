// SPDX-License-Identifier: Apache-2.0
// Where a slot of a cache lies: in a row of the batch, or in a page that its table names.
#pragma once

#include <cstdint>

#include "../specens.h"

namespace specens {

// Rows of memory that are copied in the time that a kernel takes for one element.
constexpr int64_t kBytesPerElement = 2;

struct Place {
  int64_t page;  // of the batch, or of the pool
  int64_t row;
};

inline Place place_of(const Pages& pages, int64_t batch, int64_t slot) {
  if (pages.table.data == nullptr) return {batch, slot};
  return {pages.table.at(batch, slot / pages.size), slot % pages.size};
}

}  // namespace specens
