// SPDX-License-Identifier: Apache-2.0
// Cutoffs, where there are filters or plausibility: a block for each row and field finds the least
// value that survives. Numbers are compared through integers of the same order, and a search fixes
// four bits of the answer in each sweep. To add a filter: its step in `cutoff`, its tensor in
// Ensemble and in `filters_at`.
#include "stats.cuh"

namespace specens {
namespace {

constexpr int kDigitBits = 4;
constexpr int kDigits = 1 << kDigitBits;

struct ThresholdShared {
  Position position;
  double sums[kDigits][kThreads];
  double totals[kDigits];
};

// Unsigned integers in the order of the numbers; those of single precision fill the upper half.
__device__ __forceinline__ uint64_t to_ordered(double value, bool single) {
  if (single) {
    const uint32_t bits = __float_as_uint(static_cast<float>(value));
    return uint64_t{bits ^ ((bits >> 31) != 0 ? ~0u : 1u << 31)} << 32;
  }
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

__device__ __forceinline__ double from_ordered(uint64_t ordered, bool single) {
  if (single) {
    const auto high = static_cast<uint32_t>(ordered >> 32);
    return static_cast<double>(__uint_as_float(high ^ ((high >> 31) != 0 ? 1u << 31 : ~0u)));
  }
  const uint64_t bits = ordered ^ ((ordered >> 63) != 0 ? uint64_t{1} << 63 : ~uint64_t{0});
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The least float >= x: a float is below x iff it is below this.
__device__ __forceinline__ float round_up(double x) {
  const auto nearest = static_cast<float>(x);
  return static_cast<double>(nearest) < x ? nextafterf(nearest, -kNoMass) : nearest;
}

// The values of one field of a row, as every thread sees them.
class FieldValues {
 public:
  __device__ FieldValues(const Problem& problem, ThresholdShared& shared, const Field& field,
                         bool is_target)
      : vocab_size_(problem.ensemble.vocab_size),
        shared_(shared),
        field_(field),
        is_target_(is_target) {}

  // Adds `weight(value)` over all tokens, a sum for each of `digit(value)`; -1 is left out.
  template <typename Digit, typename Weight>
  __device__ void sum(int digits, const Digit& digit, const Weight& weight) {
    double sums[kDigits] = {};
    for (int64_t token = threadIdx.x; token < vocab_size_; token += kThreads) {
      const double value = at(token);
      const int here = digit(value);
      if (here < 0) continue;
      const double mass = weight(value);
#pragma unroll
      for (int d = 0; d < kDigits; ++d) sums[d] += d == here ? mass : 0.0;
    }
#pragma unroll
    for (int d = 0; d < kDigits; ++d) {
      if (d < digits) shared_.sums[d][threadIdx.x] = sums[d];
    }
    __syncthreads();
    for (int d = warp_id(); d < digits; d += kWarps) {
      double total = 0.0;
      for (int i = lane_id(); i < kThreads; i += kLanes) total += shared_.sums[d][i];
      total = warp_sum(total);
      if (lane_id() == 0) shared_.totals[d] = total;
    }
    __syncthreads();
  }

  __device__ double top() {
    double top = kNoMass;
    for (int64_t token = threadIdx.x; token < vocab_size_; token += kThreads) {
      const double value = at(token);
      top = value > top ? value : top;
    }
    top = warp_max(top);
    if (lane_id() == 0) shared_.totals[warp_id()] = top;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = shared_.totals[w] > top ? shared_.totals[w] : top;
    __syncthreads();
    return top;
  }

  // The least number above which there is less than `limit`.
  template <typename Weight>
  __device__ double least_above(double limit, const Weight& weight) {
    const bool single = is_single();
    uint64_t low = 0;
    double beyond = 0.0;  // weight of what is above the bracket
    for (int shift = 64 - kDigitBits; shift >= (single ? 32 : 0); shift -= kDigitBits) {
      sum(
          kDigits,
          [=](double value) {
            const uint64_t ordered = to_ordered(value, single);
            const uint64_t digit = ordered < low ? kDigits : (ordered - low) >> shift;
            return digit < kDigits ? static_cast<int>(digit) : -1;
          },
          weight);
      int digit = kDigits - 1;
      while (digit > 0 && beyond + shared_.totals[digit] < limit) {
        beyond += shared_.totals[digit--];
      }
      low += static_cast<uint64_t>(digit) << shift;
      __syncthreads();
    }
    const double least = from_ordered(low, single);
    if (!isnan(least)) return least;
    return (low >> 63) != 0 ? -kNoMass : kNoMass;
  }

  // Whether the values are logits as they were given.
  __device__ bool is_single() const { return !is_target_; }
  __device__ const Field& field() const { return field_; }
  __device__ double total() const { return shared_.totals[0]; }

 private:
  __device__ double at(int64_t token) const {
    if (!is_target_) return static_cast<double>(clean(load_raw(field_, token)));
    const double value = token_value(shared_.position, token);
    return shared_.position.is_mixture ? log(value) : value;
  }

  int64_t vocab_size_;
  ThresholdShared& shared_;
  const Field& field_;
  bool is_target_;
};

// The least value that survives temperature 0, top-k, then top-p, then min-p.
__device__ double cutoff(const Ensemble& ensemble, int64_t b, bool filters, FieldValues& values) {
  const Field& field = values.field();
  const double top = values.top(), nothing = kNoMass;
  if (top == -nothing || field.temperature == 0.0f) return top;
  double least = nothing;
  if (!filters || top == nothing) return least;
  const int32_t top_k = ensemble.top_k.data == nullptr ? 0 : ensemble.top_k.at(b);
  if (top_k > 0) {
    least = values.least_above(static_cast<double>(top_k), [](double) { return 1.0; });
  }
  const float top_p = ensemble.top_p.data == nullptr ? 1.0f : ensemble.top_p.at(b);
  if (top_p < 1.0f) {
    const auto inverse_temperature = static_cast<float>(field.inverse_temperature);
    const double kept = least;
    const auto mass = [=](double value) {
      if (value < kept || value == nothing) return 0.0;
      return static_cast<double>(expf(static_cast<float>(value - top) * inverse_temperature));
    };
    values.sum(1, [](double) { return 0; }, mass);
    const double limit = static_cast<double>(top_p) * values.total();
    __syncthreads();
    const double nucleus = values.least_above(limit, mass);
    least = nucleus > least ? nucleus : least;
  }
  const float min_p = ensemble.min_p.data == nullptr ? 0.0f : ensemble.min_p.at(b);
  if (min_p > 0.0f) {
    const double ratio = log(min_p < 1.0f ? static_cast<double>(min_p) : 1.0);
    const double exact = top + static_cast<double>(field.temperature) * ratio;
    const double floor = values.is_single() ? static_cast<double>(round_up(exact)) : exact;
    least = floor > least ? floor : least;
  }
  least = least < top ? least : top;
  // What is computed may differ in its last bit where it is computed again.
  return values.is_single() || isinf(least) ? least : least - 1e-14 * (1.0 + fabs(least));
}

// Where member 0 finds a token implausible.
__device__ float plausible(const Problem& problem, ThresholdShared& shared) {
  if (!(problem.ensemble.plausibility > 0.0)) return kNoMass;
  const Field& expert = shared.position.members[0];
  const double top = FieldValues(problem, shared, expert, false).top();
  const double scale = expert.temperature > 0.0f ? static_cast<double>(expert.temperature) : 1.0;
  return round_up(top + scale * log(problem.ensemble.plausibility));
}

// Whether a field has a cutoff that its law does not see by itself.
__device__ bool wanted(const Problem& problem, const Position& position, int which, bool filters) {
  const bool by_member = problem.ensemble.warp_members;
  if (which == kProposalCutoff) {
    return filters && position.proposer != kNobody && !proposal_is_member(problem, position);
  }
  if (which == kTargetCutoff)
    return filters && !by_member && (!position.is_mixture || position.warped);
  if (which >= position.count || !by_member) return false;
  const bool used = position.members[which].weight != 0.0f || position.proposer == which;
  return used && (filters || !position.is_mixture);
}

__global__ void __launch_bounds__(kThreads, 1) thresholds(Problem problem, bool of_mixture) {
  SPECENS_SHARED(ThresholdShared, shared);
  Position& position = shared.position;
  const int64_t place = blockIdx.y, b = place / problem.rows;
  const int which = of_mixture ? kTargetCutoff : static_cast<int>(blockIdx.x);
  if (warp_id() == 0) {
    read_position(problem, place, position, of_mixture);
    if (of_mixture) read_laws(problem, place, position, true);
  }
  __syncthreads();
  const bool filters = !position.greedy && filters_at(problem.ensemble, b);
  double found = kNoMass;
  if (which == kPlausibleCutoff) {
    found = plausible(problem, shared);
  } else if (wanted(problem, position, which, filters) &&
             !(position.is_mixture && which == kTargetCutoff && !of_mixture)) {
    const bool is_target = which == kTargetCutoff;
    if (is_target && !position.is_mixture) {
      const float least = plausible(problem, shared);
      if (threadIdx.x == 0) position.plausible = least;
      __syncthreads();
    }
    const Field& field = is_target                  ? position.target
                         : which == kProposalCutoff ? position.proposal
                                                    : position.members[which];
    FieldValues values(problem, shared, field, is_target);
    found = cutoff(problem.ensemble, b, filters, values);
  }
  if (threadIdx.x == 0) store(problem.cutoffs + place * kCutoffs + which, found);
}

}  // namespace

void launch_thresholds(const Problem& problem, Thresholds which, cudaStream_t stream) {
  const bool of_mixture = which == Thresholds::kOfMixture;
  const dim3 grid(of_mixture ? 1 : kCutoffs, static_cast<unsigned>(problem.batch * problem.rows));
  SPECENS_LAUNCH(thresholds, grid, dim3(kThreads), sizeof(ThresholdShared), stream, problem,
                 of_mixture);
}

}  // namespace specens
