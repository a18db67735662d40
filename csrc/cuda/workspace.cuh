// SPDX-License-Identifier: Apache-2.0
// How the ops divide a stream's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specens {

// The grids cannot have more rows than this, and the workspace has a ticket for each.
constexpr int64_t kMaxPlaces = 65535;

// Hands out a workspace from its beginning; without one, counts its bytes. It begins with as many
// tickets for every op, so that they never lie where another left data.
class Layout {
 public:
  explicit Layout(void* workspace)
      : base_(static_cast<char*>(workspace)), tickets_(take<unsigned>(kMaxPlaces)) {}

  unsigned* tickets() const { return tickets_; }

  template <typename T>
  T* take(int64_t count) {
    T* here = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return here;
  }

  size_t used() const { return used_; }

 private:
  static constexpr size_t kAlignment = 256;

  char* base_;
  size_t used_ = 0;
  unsigned* tickets_;
};

}  // namespace specens
