// SPDX-License-Identifier: Apache-2.0
// Philox-4x32-10, a block of four numbers for each (seed, position). Source: Salmon et al. 2011.
#include "../specens.h"

namespace specens {
namespace {

struct Words {
  uint32_t word[4];
};

Words philox(Words counter, uint64_t seed) {
  auto key0 = static_cast<uint32_t>(seed);
  auto key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

}  // namespace

void uniforms(const UniformsParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    const auto seed = static_cast<uint64_t>(params.seeds.at(b));
    for (int64_t t = 0; t < params.rows; ++t) {
      const auto position = static_cast<uint64_t>(params.positions.at(b, t));
      const Words block =
          philox({{static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                   params.stream, params.index}},
                 seed);
      float* out = params.out + (b * params.rows + t) * 4;
      for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(block.word[i] >> 8) * 0x1p-24f;
    }
  }
}

}  // namespace specens
