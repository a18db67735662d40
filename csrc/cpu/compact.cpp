// SPDX-License-Identifier: Apache-2.0
// `compact`: rows of an accepted path, moved down in place. A path ascends, so that a node lies at
// or above the slot that it is moved to, and no row is written before it has been read.
#include <cstring>

#include "parallel.h"
#include "slots.h"

namespace specens {
namespace {

struct Move {
  int64_t from;
  int64_t to;
};

// Asks for the lines of a row of each head.
inline void ask(const char* row, const Slab& slab) {
  for (int64_t head = 0; head < slab.heads; ++head, row += slab.head_stride) {
    for (int64_t i = 0; i < slab.row_bytes; i += 64) __builtin_prefetch(row + i);
  }
}

}  // namespace

void compact(const CompactParams& params, int threads) {
  // The bytes from a slab's beginning depend on its strides, the slots on the path alone.
  std::vector<Move> moves;
  std::vector<int64_t> ends(static_cast<size_t>(params.batch));
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t root = params.lengths.at(b);
    for (int64_t i = 0; i < params.depth; ++i) {
      const int64_t node = params.path.at(b, i);
      if (node < 0) break;
      if (node != i + 1) moves.push_back({root + node, root + i + 1});
    }
    ends[static_cast<size_t>(b)] = static_cast<int64_t>(moves.size());
  }
  int64_t bytes = 0;
  for (const Slab& slab : params.slabs) bytes += slab.layers * slab.heads * slab.row_bytes;
  bytes *= static_cast<int64_t>(moves.size());
  Team::run(threads, bytes / kBytesPerElement, [&](const Team& team) {
    for (const Slab& slab : params.slabs) {
      const auto row_at = [&](int64_t layer, int64_t batch, int64_t slot) {
        const Place place = place_of(params.pages, batch, slot);
        return slab.data + layer * slab.layer_stride + place.page * slab.batch_stride +
               place.row * slab.row_stride;
      };
      team.for_each(slab.layers, 1, [&](int, int64_t layer) {
        size_t move = 0;
        for (int64_t b = 0; b < params.batch; ++b) {
          for (; move < static_cast<size_t>(ends[static_cast<size_t>(b)]); ++move) {
            char* source = row_at(layer, b, moves[move].from);
            char* target = row_at(layer, b, moves[move].to);
            // Layers lie far apart: nothing else would know which rows come next.
            if (layer + 1 < slab.layers) {
              ask(source + slab.layer_stride, slab);
              ask(target + slab.layer_stride, slab);
            }
            for (int64_t head = 0; head < slab.heads; ++head) {
              std::memcpy(target + head * slab.head_stride, source + head * slab.head_stride,
                          static_cast<size_t>(slab.row_bytes));
            }
          }
        }
      });
    }
  });
}

}  // namespace specens
