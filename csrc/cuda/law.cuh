// SPDX-License-Identifier: Apache-2.0
// The laws at one position, as a warp or a block sees them. A `Position` in shared memory says
// where the members' logits lie, how they are weighted and warped, and, once the totals are known,
// what the normalisers are; everything else is computed again from the logits. A *value* of a token
// is its probability in a mixture and its folded logit in a product; `value_mass` and
// `value_log_mass` make the law's mass of it.
#pragma once

#include "problem.cuh"

namespace specens {

// Logits, or values made of them, with their temperature and cutoff, and the law they have.
struct Field {
  const void* data;
  DType dtype;
  float weight;       // 0: not part of the ensemble
  float temperature;  // 0: the largest values share the mass
  bool known;         // its log-sum-exp was given: `top` and `log_sum` are some that make it
  bool late;          // it is not swept yet
  double cutoff;      // a single-precision number, where the values are logits
  double inverse_temperature;
  double coefficient;  // of a product
  // Known with the totals:
  double share;  // of a mixture; 0 where the member is empty
  double top;
  double log_sum;
  bool empty;
  int32_t flags;
};

struct Position {
  Field members[kFields];
  Field proposal;
  Field target;  // of the product, or of the mixture's logarithm if `warped`
  int count;
  int proposer;  // a member, kSeparateDraft or kNobody; not kNobody means a dense draft
  float plausible;
  bool is_mixture;
  bool greedy;  // all temperatures are 0
  bool warped;  // a mixture that is warped as a whole
  bool empty;
  bool has_child;
  bool valid;                  // so is the child
  int64_t token;               // the child's
  float drafted[kFields + 1];  // every field's value of it
};

__device__ __forceinline__ double shifted(double value, double top, double inverse_temperature) {
  return value == top ? 0.0 : (value - top) * inverse_temperature;
}

__device__ __forceinline__ double field_log_mass(const Field& field, double value) {
  if (field.empty || value == kNoMass || value < field.cutoff) return kNoMass;
  return shifted(value, field.top, field.inverse_temperature) - field.log_sum;
}

__device__ __forceinline__ double field_mass(const Field& field, double value) {
  return exp(field_log_mass(field, value));
}

__device__ __forceinline__ float clean(float value) { return isnan(value) ? kNoMass : value; }

// One step of a product: NaN where the token has no mass.
__device__ __forceinline__ double fold_in(const Position& position, int member, double folded,
                                          float value) {
  const Field& field = position.members[member];
  const bool used = field.weight != 0.0f, cut = value < static_cast<float>(field.cutoff);
  const bool vetoed =
      (member == 0 && value < position.plausible) || (used && (value == kNoMass || cut));
  if (vetoed) return static_cast<double>(NAN);
  if (field.weight == 0.0f) return folded;
  return folded + field.coefficient * static_cast<double>(value);
}

__device__ __forceinline__ double folded(double value) { return isnan(value) ? kNoMass : value; }

// One step of a mixture.
__device__ __forceinline__ double mix_in(const Position& position, int member, double mixed,
                                         float value) {
  const Field& field = position.members[member];
  if (field.share == 0.0) return mixed;
  return mixed + field.share * field_mass(field, value);
}

// The value of a token with these logits.
__device__ inline double value_of(const Position& position, const float* logits) {
  double value = 0.0;
  for (int k = 0; k < position.count; ++k) {
    value = position.is_mixture ? mix_in(position, k, value, logits[k])
                                : fold_in(position, k, value, logits[k]);
  }
  return position.is_mixture ? value : folded(value);
}

__device__ __forceinline__ double value_log_mass(const Position& position, double value) {
  if (position.empty) return kNoMass;
  if (!position.is_mixture) return field_log_mass(position.target, value);
  return position.warped ? field_log_mass(position.target, log(value)) : log(value);
}

__device__ __forceinline__ double value_mass(const Position& position, double value) {
  if (position.is_mixture && !position.warped) return position.empty ? 0.0 : value;
  return exp(value_log_mass(position, value));
}

__device__ __forceinline__ int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

__device__ __forceinline__ const void* row_data(const Logits& logits, int64_t b, int64_t t) {
  const int64_t offset = b * logits.batch_stride + t * logits.row_stride;
  return static_cast<const char*>(logits.data) + offset * bytes_of(logits.dtype);
}

__device__ __forceinline__ float load_raw(const Field& field, int64_t token) {
  if (field.dtype == DType::kFloat32) return load(static_cast<const float*>(field.data) + token);
  const uint32_t bits = load(static_cast<const uint16_t*>(field.data) + token);
  return field.dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

__device__ __forceinline__ bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Bits) == 0;
}

// Eight neighbours from `first` on, which is a multiple of 8.
__device__ __forceinline__ void load_eight(const Field& field, int64_t first, float* out) {
  const char* from = static_cast<const char*>(field.data) + first * bytes_of(field.dtype);
  if (field.dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Bits bits = load_bits(from + i * sizeof(Bits));
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i * 4 + j] = __uint_as_float(bits.word[j]);
    }
    return;
  }
  const bool bfloat16 = field.dtype == DType::kBFloat16;
  const Bits bits = load_bits(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t low = bits.word[j] & 0xFFFF, high = bits.word[j] >> 16;
    out[2 * j] = bfloat16 ? from_bfloat16(low) : from_float16(low);
    out[2 * j + 1] = bfloat16 ? from_bfloat16(high) : from_float16(high);
  }
}

// A lane's share of a round: kPerLane values in groups of eight, a warp's width apart.
__device__ __forceinline__ int lane_token(int i) {
  return i / 8 * (8 * kLanes) + lane_id() * 8 + i % 8;
}

// The share of a lane in the round from `begin` on, NaN as -inf and -inf beyond the vocabulary;
// returns the status bits.
__device__ inline int32_t load_lane(const Field& field, int64_t begin, int64_t vocab_size,
                                    float (&out)[kPerLane]) {
  const bool aligned = is_aligned(field.data);
#pragma unroll
  for (int group = 0; group < kPerLane; group += 8) {
    const int64_t first = begin + lane_token(group);
    if (aligned && first + 8 <= vocab_size) {
      load_eight(field, first, &out[group]);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        out[group + i] = first + i < vocab_size ? load_raw(field, first + i) : kNoMass;
      }
    }
  }
  int32_t flags = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    flags |= (isnan(out[i]) ? kNanLogits : 0) | (out[i] == -kNoMass ? kInfiniteLogits : 0);
    out[i] = clean(out[i]);
  }
  return flags;
}

// The values of a lane's share of a round, in double precision.
__device__ inline void lane_values(const Position& position, int64_t begin, int64_t vocab_size,
                                   double (&values)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) values[i] = 0.0;
  for (int k = 0; k < position.count; ++k) {
    const Field& field = position.members[k];
    const bool masks = k == 0 && position.plausible > kNoMass;
    if (position.is_mixture ? field.share == 0.0 : field.weight == 0.0f && !masks) continue;
    float logits[kPerLane];
    load_lane(field, begin, vocab_size, logits);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = position.is_mixture ? mix_in(position, k, values[i], logits[i])
                                      : fold_in(position, k, values[i], logits[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool inside = begin + lane_token(i) < vocab_size;
    if (position.is_mixture) {
      values[i] = inside ? values[i] : 0.0;
    } else {
      values[i] = inside ? folded(values[i]) : kNoMass;
    }
  }
}

// The same for one token.
__device__ inline double token_value(const Position& position, int64_t token) {
  double value = 0.0;
  for (int k = 0; k < position.count; ++k) {
    const Field& field = position.members[k];
    const bool masks = k == 0 && position.plausible > kNoMass;
    if (position.is_mixture ? field.share == 0.0 : field.weight == 0.0f && !masks) continue;
    const float logit = clean(load_raw(field, token));
    value = position.is_mixture ? mix_in(position, k, value, logit)
                                : fold_in(position, k, value, logit);
  }
  return position.is_mixture ? value : folded(value);
}

template <typename T, typename Function>
__device__ __forceinline__ T warp_reduce(T value, const Function& function) {
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    value = function(value, __shfl_xor_sync(kAllLanes, value, bits));
  }
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <typename T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce(value, [](T a, T b) { return a > b ? a : b; });
}

__device__ __forceinline__ int32_t warp_or(int32_t value) {
  return warp_reduce(value, [](int32_t a, int32_t b) { return a | b; });
}

}  // namespace specens
