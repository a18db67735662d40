// SPDX-License-Identifier: Apache-2.0
// The native entry points and their parameters: plain structs over addresses, shapes and strides.
// What an op means is specens_kernels/reference/; nothing here knows torch. Strides count
// elements. To add an op: its parameters and entry here, its file in csrc/cpu, the order of its
// fields in flat.h, its line in bindings.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "rules/table.h"

namespace specens {

constexpr int kTile = 8192;
constexpr int kSubTile = 1024;
constexpr int kSubTilesPerTile = kTile / kSubTile;
constexpr int kPadding = -1;
constexpr int kMaxMembers = 16;

// Status bits; see the reference.
constexpr int32_t kNanLogits = 1;
constexpr int32_t kInfiniteLogits = 2;
constexpr int32_t kEmptyLaw = 4;
constexpr int32_t kInvalidDraft = 8;
constexpr int32_t kEmptyResidual = 16;

enum class DType : int32_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// Logits (B, T, V) with contiguous rows.
struct Logits {
  const void* data;
  DType dtype;
  int64_t batch_stride;
  int64_t row_stride;
};

// A parameter of up to three dimensions; a stride is 0 where it is shared. Null data means "off".
template <typename T>
struct Values {
  const T* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t member_stride;

  SPECENS_HOST_DEVICE T at(int64_t batch, int64_t row = 0, int64_t member = 0) const {
    return data[batch * batch_stride + row * row_stride + member * member_stride];
  }
};

// Token ids and indices, int32 or int64.
struct Integers {
  const void* data;
  bool wide;
  int64_t batch_stride;
  int64_t row_stride;

  SPECENS_HOST_DEVICE int64_t at(int64_t batch, int64_t row) const {
    const int64_t offset = batch * batch_stride + row * row_stride;
    return wide ? static_cast<const int64_t*>(data)[offset]
                : static_cast<const int32_t*>(data)[offset];
  }
};

// What is summed over members: probabilities, or logits with one softmax afterwards.
enum class Space : int { kProbabilities, kLogits };

constexpr Named<Space> kSpaces[] = {
    {"probabilities", Space::kProbabilities},
    {"logits", Space::kLogits},
};

// M members' logits and how they become one law; reference.LawTensors.
struct Ensemble {
  Logits members[kMaxMembers];
  int num_members;
  Space space;
  bool warp_members;  // scope "member"; else scope "ensemble"
  double plausibility;
  int64_t vocab_size;
  Values<float> weights;
  Values<float> temperature;
  Values<int32_t> top_k;
  Values<float> top_p;
  Values<float> min_p;
  // Of each member's row over its temperature, (B, T, M); what is not finite is not known. Null
  // data: nothing is.
  Values<float> lse = {nullptr, 0, 0, 0};
  // Where a row of the batch lies among packed ones, (B, T), whose batch stride is 0. Null data:
  // rows lie as (B, T) says.
  Integers rows = {nullptr, false, 0, 0};
};

// A temperature as it counts: 0 if it is not above 0, and else within what single precision can
// divide by; ranges.py has the bounds, too.
SPECENS_HOST_DEVICE float bounded_temperature(float given) {
  constexpr float kLeast = 1e-30f, kMost = 1e30f;
  if (!(given > 0.0f)) return 0.0f;
  return given < kLeast ? kLeast : given > kMost ? kMost : given;
}

// A weight as it counts: 0 if it is not finite, or below 0 in a mixture.
SPECENS_HOST_DEVICE float counted_weight(float given, Space space) {
  const bool counts = given - given == 0.0f && (space == Space::kLogits || given > 0.0f);
  return counts ? given : 0.0f;
}

struct UniformsParams {
  Values<int64_t> seeds;
  Values<int64_t> positions;
  uint32_t stream;
  uint32_t index;
  int64_t batch;
  int64_t rows;
  float* out;  // (B, T, 4)
};

struct MixParams {
  Ensemble ensemble;
  int64_t batch;
  int64_t rows;
  float* log_probs;  // (B, T, V)
  int32_t* status;   // (B, T)
};

struct SampleParams {
  Ensemble ensemble;
  int member;  // -1 draws from the ensemble
  int64_t batch;
  int64_t rows;
  Values<float> uniforms;  // (B, T, 4), or the first block of each row
  int64_t* tokens;         // (B, T, k), and so are the log-probabilities; else (B, T)
  float* log_probs;
  float* lse;
  int32_t* status;
  // k draws of a row without replacement, and the elements between their blocks; 0 is one draw.
  int64_t count = 0;
  int64_t block_stride = 0;
};

// What an engine's own buffers are like, beyond (B, T, V).
struct EngineLayout {
  Integers draft_rows = {nullptr, false, 0, 0};  // (B, N or N + 1), as `Ensemble::rows`
  // (B,) drafts of each row, of which -1 is one to refuse; null data: -1 is where there is none.
  Integers num_drafts = {nullptr, false, 0, 0};
  bool draft_filtered = true;        // proposals are filtered as the target is
  bool draft_probabilities = false;  // the draft logits are probabilities, of no temperature
  // (B, P), in place of `VerifyParams::parameters`; of a rate for each position, P of them.
  Values<double> parameters = {nullptr, 0, 0, 0};
  int64_t num_parameters = 0;
  // (B, N + 1), in place of `VerifyParams::tokens`.
  void* tokens = nullptr;
  bool wide_tokens = false;
  int64_t tokens_stride = 0;
};

struct VerifyParams {
  Ensemble ensemble;
  RuleId rule;
  double parameters[kMaxParameters];  // of the rule, in the registry's order
  Values<double> memory;              // (B,); null data: 0
  bool bonus;
  int64_t batch;
  int64_t nodes;
  Integers draft_tokens;   // (B, N)
  Integers proposers;      // (B, N); null data: the draft logits everywhere, or point masses
  Values<float> uniforms;  // (B, N + 1, 4)
  Logits draft_logits;     // (B, N or N + 1, V); null data: none
  Values<float> draft_temperature;
  Values<float> draft_lse = {nullptr, 0, 0, 0};  // (B, N or N + 1), as `Ensemble::lse`
  int64_t* tokens;                               // (B, N + 1)
  float* log_probs;                              // (B, N + 1)
  int32_t* num_accepted;                         // (B,)
  int32_t* path;                                 // (B, N)
  int32_t* status;                               // (B,)
  Integers parents = {nullptr, false, 0, 0};     // (B, N + 1); null data: a chain
  bool independent = false;  // siblings are all judged by the target: the rule is "k_seq"
  bool without = false;      // siblings of one proposer were drawn without replacement
  EngineLayout layout = {};
};

// Packed rows that are looked at: of each row of the batch the first `columns`, or so many more
// than its drafts are, if those are known.
struct RowsParams {
  Integers rows;
  Integers num_drafts;  // (B,); null data: all columns
  int64_t more;
  int64_t batch;
  int64_t columns;
  int64_t count;  // rows that there are
};

// Vectors (B, H, S, E) of heads, each contiguous.
struct Heads {
  const void* data;
  DType dtype;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// Slots of a cache as pages of it: null data is one page, a row's own.
struct Pages {
  Values<int32_t> table;  // (B, pages), the second stride over pages
  int64_t size;           // slots of a page
};

struct AttentionParams {
  Heads query;
  Heads keys;    // (B or P, K, S or page, E)
  Heads values;  // (B or P, K, S or page, F)
  Pages pages;
  int64_t batch;
  int64_t heads;
  int64_t key_heads;
  int64_t nodes;  // N + 1
  int64_t size;
  int64_t value_size;
  Values<int64_t> lengths;  // (B,)
  Values<int64_t> visible;  // (B, N + 1, W)
  Values<int32_t> depths;   // (B, N + 1)
  Values<float> sinks;      // (H,), the third stride over heads; null data: none
  double scale;
  double softcap;  // 0: none
  int64_t window;  // 0: none
  void* out;       // (B, N + 1, H, F), of the query's dtype
  float* lse;      // (B, H, N + 1)
};

// Keys or values (L, B or P, K, S or page, E), of rows of so many bytes; strides in bytes.
struct Slab {
  char* data;
  int64_t layers;
  int64_t heads;
  int64_t row_bytes;
  int64_t layer_stride;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

struct CompactParams {
  std::vector<Slab> slabs;
  Pages pages;
  int64_t batch;
  int64_t depth;
  Values<int64_t> lengths;  // (B,)
  Values<int32_t> path;     // (B, D)
};

// What the benchmark's floor sweeps.
struct FloorParams {
  Logits members[kMaxMembers];
  int num_members;
  int64_t batch;
  int64_t rows;
  int64_t vocab_size;
};

// `threads` bounds the team; results do not depend on it.
void uniforms(const UniformsParams& params);
void mix(const MixParams& params, int threads);
void sample(const SampleParams& params, int threads);
void verify(const VerifyParams& params, int threads);

void attention(const AttentionParams& params, int threads);
void compact(const CompactParams& params, int threads);

// The first place of batch * columns that is looked at and holds no packed row; -1 if all do.
int64_t first_outside(const RowsParams& params);

// One sweep for maximum and sum of exponentials over every row, which no verification can do
// without; the benchmark's floor. Returns the sum of the rows' log-sum-exps.
double floor_sweep(const FloorParams& params, int threads);

// The instruction set in use, and the names that SPECENS_CPU_ISA may have.
const char* cpu_isa();

}  // namespace specens
