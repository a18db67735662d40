// SPDX-License-Identifier: Apache-2.0
// `attention`: two launches. In the first, blocks attend to splits (attend_halves.cuh,
// attend_float32.cu); in the second, a warp joins the splits of a packed row, in their order. Both
// have grids for as many splits as the cache, or the window, has room for; what lies beyond the
// lengths is neither written nor read.
#include "attention.cuh"
#include "workspace.cuh"

namespace specens {
namespace {

constexpr int kJoinWarps = 4;  // of a block
constexpr int kJoinThreads = kJoinWarps * kLanes;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int64_t kMostSlots = 0x7FFFFFFF - 4096;

// An element of the query's dtype.
__device__ __forceinline__ void store_as(void* to, DType dtype, int64_t place, float value) {
  if (dtype == DType::kFloat32) return store(static_cast<float*>(to) + place, value);
  const uint32_t bits =
      dtype == DType::kBFloat16 ? BFloat16::pack(value, 0.0f) : Float16::pack(value, 0.0f);
  store(static_cast<uint16_t*>(to) + place, static_cast<uint16_t>(bits & 0xFFFF));
}

// Grid: packed rows, four to a block; key heads of each row of the batch.
__global__ void __launch_bounds__(kJoinThreads) join_splits(AttentionProblem problem) {
  const AttentionParams& params = problem.params;
  const int row = static_cast<int>(blockIdx.x) * kJoinWarps + warp_id();
  const auto key_heads = static_cast<unsigned>(params.key_heads);
  const int64_t b = blockIdx.y / key_heads;
  const Reach reach = reach_of(problem, b);
  await_previous();
  if (row >= problem.rows) return;
  const auto nodes = static_cast<int>(params.nodes);
  const int head = static_cast<int>(blockIdx.y % key_heads) * problem.group + row / nodes;
  const int node = row % nodes;
  const int64_t count =
      at_most((reach.end + problem.split - 1) / problem.split - reach.first_split, problem.splits);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * problem.splits * problem.rows + row;

  const bool has_sink = params.sinks.data != nullptr;
  const float sink =
      has_sink ? load(params.sinks.data + head * params.sinks.member_stride) * kLog2E : kNoMass;
  float top = sink;
  for (int64_t i = lane_id(); i < count; i += kLanes) {
    top = fmaxf(top, load_fresh(problem.tops + first + i * problem.rows));
  }
#pragma unroll
  for (int bits = kLanes / 2; bits > 0; bits /= 2) {
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, bits));
  }
  const float shift = top == kNoMass ? 0.0f : top;
  const float sink_mass = exp2_flushed(sink - shift);
  const int64_t target = ((b * params.nodes + node) * params.heads + head) * params.value_size;
  for (int quad = lane_id(); quad < problem.columns / 4; quad += kLanes) {
    float mass = sink_mass;
    Quad sum = {};
#pragma unroll 4
    for (int64_t i = 0; i < count; ++i) {
      const int64_t place = first + i * problem.rows;
      const float weight = exp2_flushed(load_fresh(problem.tops + place) - shift);
      mass += weight * load_fresh(problem.totals + place);
      const Quad part =
          load_fresh(reinterpret_cast<const Quad*>(problem.outs + place * problem.columns) + quad);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum.value[c] += weight * part.value[c];
    }
    // A node that sees nothing gets 0.
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (quad * 4 + c >= params.value_size) continue;
      store_as(params.out, params.query.dtype, target + quad * 4 + c,
               mass == 0.0f ? 0.0f : sum.value[c] / mass);
    }
    if (quad == 0) {
      store(params.lse + (b * params.heads + head) * params.nodes + node,
            mass == 0.0f ? kNoMass : (shift + log2f(mass)) * kLn2);
    }
  }
}

bool is_aligned(const Heads& heads, int64_t size) {
  const int64_t element = heads.dtype == DType::kFloat32 ? 4 : 2;
  const auto bits = static_cast<uint64_t>(
      (heads.batch_stride | heads.head_stride | heads.row_stride | size) * element);
  return (bits | reinterpret_cast<uintptr_t>(heads.data)) % 16 == 0;
}

AttentionProblem problem_of(const AttentionParams& params, int64_t capacity) {
  AttentionProblem problem = {};
  problem.params = params;
  problem.capacity = static_cast<int>(capacity);
  problem.group = static_cast<int>(params.heads / params.key_heads);
  problem.rows = problem.group * static_cast<int>(params.nodes);
  problem.split = problem.rows <= 32 ? 256 : problem.rows <= 128 ? 512 : 1024;
  int64_t splits = (capacity + problem.split - 1) / problem.split;
  if (params.window > 0 && params.window < capacity) {
    // A window may begin anywhere in a split.
    const int64_t least = (params.window + params.nodes + problem.split - 1) / problem.split + 1;
    splits = least < splits ? least : splits;
  }
  problem.splits = static_cast<int>(splits);
  problem.page_shift = -1;
  for (int shift = 0; shift < 31; ++shift) {
    if (params.pages.size == int64_t{1} << shift) problem.page_shift = shift;
  }
  problem.aligned = is_aligned(params.query, params.size) && is_aligned(params.keys, params.size) &&
                    is_aligned(params.values, params.value_size);
  const double scale = params.scale;
  problem.scale =
      static_cast<float>(params.softcap > 0 ? scale / params.softcap : scale * double{kLog2E});
  problem.cap = static_cast<float>(params.softcap * double{kLog2E});
  problem.columns = static_cast<int>((params.value_size + 3) / 4 * 4);
  return problem;
}

size_t attach(AttentionProblem& problem, void* workspace) {
  const int64_t rows =
      problem.params.batch * problem.params.key_heads * problem.splits * int64_t{problem.rows};
  Layout layout(workspace);
  problem.tops = layout.take<float>(rows);
  problem.totals = layout.take<float>(rows);
  problem.outs = layout.take<float>(rows * problem.columns);
  return layout.used();
}

int check(const AttentionProblem& problem, int64_t capacity) {
  const AttentionParams& params = problem.params;
  if (params.batch * params.key_heads > kMaxPlaces) return kTooManyRows;
  if (params.size > kLargestHead || params.value_size > kLargestHead) return kHeadTooLarge;
  if (capacity > kMostSlots || problem.splits > kMaxPlaces) return kTooManySlots;
  return 0;
}

}  // namespace

size_t cuda_attention_workspace(const AttentionParams& params, int64_t capacity) {
  AttentionProblem problem = problem_of(params, capacity);
  return attach(problem, nullptr);
}

int cuda_attention(const AttentionParams& params, int64_t capacity, void* workspace,
                   size_t workspace_bytes, cudaStream_t stream) {
  AttentionProblem problem = problem_of(params, capacity);
  if (const int error = check(problem, capacity)) return error;
  if (attach(problem, workspace) > workspace_bytes) return kWorkspaceTooSmall;
  if (params.batch == 0) return 0;
  switch (params.query.dtype) {
    case DType::kBFloat16:
      launch_bfloat16(problem, stream);
      break;
    case DType::kFloat16:
      launch_float16(problem, stream);
      break;
    case DType::kFloat32:
      launch_float32(problem, stream);
      break;
  }
  const dim3 grid(static_cast<unsigned>((problem.rows + kJoinWarps - 1) / kJoinWarps),
                  static_cast<unsigned>(params.batch * params.key_heads));
  SPECENS_LAUNCH_EARLY(join_splits, grid, dim3(kJoinThreads), 0, stream, problem);
  return launch_error();
}

}  // namespace specens
