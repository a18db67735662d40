// SPDX-License-Identifier: Apache-2.0
// The leaf kernels, each over one sub-tile of one row, and the choice among their builds. What
// stands above this line is scalar C++; what stands below it, kernels.inc, is built once per
// instruction set, with the same lanes and the same roundings in each, so that every set gives the
// same bits.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "../specens.h"

namespace specens {

// Elements that a kernel handles as one block; buffers are padded to a multiple of it.
constexpr int kLanes = 64;

constexpr int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Where one member's sub-tile lies.
struct Span {
  const void* data;
  DType dtype;
  int count;  // 1 to kSubTile
};

// Largest value of a sub-tile, and the sum of exp((value - max) / temperature). The sum is NaN if
// the sub-tile holds a NaN or +inf; an empty sub-tile is {-inf, 0}.
struct Peak {
  double max;
  double sum;
};

// value -> log-probability.
struct Affine {
  double top;
  double inverse_temperature;
  double log_sum;

  double operator()(double value) const { return (value - top) * inverse_temperature - log_sum; }
};

// Part of a weighted sum of logits on one sub-tile. A mask is one, too.
struct Logit {
  Span span;
  float cutoff;
  double weight;
};
constexpr int kMaxTerms = kMaxMembers + 1;
// Parts of a signed mixture: a product, every member alone and a separate draft.
constexpr int kMaxSigned = kMaxMembers + 2;

// Part of a mixture on one sub-tile: share * law(value), where weight = share * exp(-log_sum).
struct Term {
  Span span;
  float cutoff;
  Affine law;
  double share;
  double weight;
};

// Thresholds that a sweep weighs at once, and what it adds up: ones, or exp((value - top) /
// temperature) in single or double precision.
constexpr int kEdges = 8;
enum class Weighing { kCount, kRoughMass, kMass };

// How a member's values are rewritten before they are read; NaN becomes -inf but in kNone.
enum class Cleaning {
  kNone,
  kNan,
  kInfinite,   // +inf becomes 0, the rest -inf
  kMask,       // values below the threshold become -inf, the rest 0
  kLogarithm,  // probabilities become their logarithms, what is none -inf
};

// What rules sum over a row. A sum that is not listed has no kernel.
using RuleSums =
    std::tuple<Whole<JsFsdTerm>, Whole<JsTerm>, Whole<KlTerm>, Whole<ReverseKlTerm>, Whole<TvTerm>,
               Inside<JsFsdTerm>, Inside<JsTerm>, Inside<KlTerm>, Inside<ReverseKlTerm>,
               Inside<TvTerm>, Deferred<Side::kTarget>, Deferred<Side::kDraft>, TargetEntropy,
               Entropies, Above, Common, Clipped, Refused>;
using SumKernel = Sums (*)(const void* sum, const double* target, const double* draft, int count);

template <typename Sum, size_t kIndex = 0>
constexpr size_t index_of_sum() {
  if constexpr (std::is_same_v<Sum, std::tuple_element_t<kIndex, RuleSums>>) {
    return kIndex;
  } else {
    return index_of_sum<Sum, kIndex + 1>();
  }
}

// Partial sums of a row's masses, and the rows that are computed side by side at most.
constexpr int kSumLanes = 16;
constexpr int kMaxTileRows = 8;
// What rows of keys and values are padded to, and how many rows what is kept of them is padded to.
constexpr int kRowElements = 32;
constexpr int kRowsTogether = 16;

// Rows of the next block, which are asked for line by line while this one is computed: a processor
// that waits for a block's keys computes nothing, and one that computes asks for none.
struct Ahead {
  const char* row = nullptr;
  int64_t step = 0;  // bytes from row to row
  int rows = 0;      // left to be asked for
  int lines = 0;     // of 64 bytes in a row
  int line = 0;
};

// Packed query rows, up to kLanes slots that they attend to, and what is known of the rows so far.
struct AttentionBlock {
  float* query;                // (rows, size)
  uint32_t* packed;            // (rows, key_stride / 2); the query as `begin_rows` has packed it
  const void* keys[kLanes];    // of each slot, `size` elements; beyond `count`, zeros
  const void* values[kLanes];  // of each slot, `value_size` elements; beyond `count`, zeros
  const uint64_t* seen;  // (rows,) bits of the slots that a row sees; null: all kLanes of them
  DType dtype;
  int count;
  int rows;
  int size;
  int value_size;
  int key_stride;  // `size` and `value_size`, as multiples of kRowElements
  int value_stride;
  Ahead* ahead;    // keys and values
  int each;        // lines to ask for at each step of a product
  float scale;     // what scores are multiplied by
  float softcap;   // 0 is none
  float* tops;     // (rows,) largest score so far; -inf where none was seen
  float* sums;     // (rows, kSumLanes) of exp(score - top)
  float* out;      // (rows, value_stride) of exp(score - top) * value
  float* scratch;  // (key_stride + kMaxTileRows + value_stride) * kLanes
};

// Values below `cutoff` have no mass. Buffers hold kSubTile elements or more; what lies between
// `count` and the next multiple of kLanes is written, and has no mass. Sums over a sub-tile
// (statistics and positive_mass) are made of single-precision exponentials and good to about 1e-8;
// masses are good to a few units of the last place of a double.
struct Kernels {
  const char* name;
  Peak (*statistics)(const Span& span, float cutoff, double inverse_temperature);
  // `statistics` without the sum, which is 1 or 0, or NaN.
  Peak (*maximum)(const Span& span);
  void (*clean)(const Span& span, Cleaning cleaning, float threshold, float* out);
  // out = the weighted sum of terms of one dtype: -inf where one is below its cutoff or -inf, NaN
  // where one is NaN. True if a NaN or +inf was seen.
  bool (*fold)(const Logit* terms, int count, double* out);
  // The values in [low, high), in some fixed order; returns their number. `out` has kSubTile +
  // kLanes elements.
  int (*collect)(const Span& span, float low, float high, float* out);
  // For each of kEdges edges, the number of values >= edge, or if `by_mass` their sum of
  // exp((value - top) * inverse_temperature), in single precision.
  void (*weigh)(float* values, int count, const float* edges, bool by_mass, const Affine& law,
                double* out);
  // out += weight * exp(law(value)).
  void (*add_masses)(const Span& span, float cutoff, const Affine& law, double weight, double* out);
  // NaN becomes -inf; if `infinite`, +inf becomes 0 and the rest -inf.
  void (*settle)(double* values, int count, bool infinite);
  Peak (*score_statistics)(const double* values, int count, double cutoff,
                           double inverse_temperature);
  // values = exp(law(value)).
  void (*score_masses)(double* values, int count, double cutoff, const Affine& law);
  // out = value - top, -inf below the cutoff.
  void (*below)(const double* values, int count, double cutoff, double top, float* out);
  // values = log(value), -inf for 0.
  void (*logarithms)(double* values, int count);
  // Sum of what the sum of the terms, of one dtype and weights of any sign, is above 0.
  double (*positive_mass)(const Term* terms, int count);
  // Places where the sum of the parts, in single precision, lies in [low, high]; returns their
  // number.
  int (*select)(const Term* parts, int count, float low, float high, uint16_t* out);
  // Before and after the blocks of some rows; `attend` adds one to what is known of them. Whatever
  // is kept of the rows is as the structure says after `end_rows` alone.
  void (*begin_rows)(const AttentionBlock& block);
  void (*attend)(const AttentionBlock& block);
  void (*end_rows)(const AttentionBlock& block);
  void (*widen_row)(const Span& row, float* out);
  // out = the weighted sum of `count` rows of `size`, `stride` apart, in order; a weight of 0
  // leaves its row out. Rows and `out` are as long as the next multiple of kRowElements.
  void (*join_rows)(const float* rows, int64_t stride, const float* weights, int count, int size,
                    float* out);
  // A row in another type, rounded to the nearest.
  void (*store_row)(const float* row, int count, DType dtype, void* out);
  // Each of `RuleSums` over a sub-tile, in double precision.
  std::array<SumKernel, std::tuple_size_v<RuleSums>> sums;
};

// The kernels in use: SPECENS_CPU_ISA's, or the best that this machine can run. Throws
// std::runtime_error where that variable names none.
const Kernels& kernels();

// Scalar builds of the same functions.
double exponential(double x);
double logarithm(double x);
float load_value(const void* row, DType dtype, int64_t index);

constexpr int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace specens
