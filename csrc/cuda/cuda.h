// SPDX-License-Identifier: Apache-2.0
// The launchers of the CUDA backend: no torch, no allocation, no wait for the device, and nothing
// that a CUDA graph could not hold. Each returns 0 or a code that `cuda_error` explains. The caller
// lends each stream a workspace of at least as many bytes as the op's `_workspace` says, zeroed
// once when it is allocated; the kernels leave its tickets at zero.
// To add an op: its launcher here, its file beside this one, its binding in bindings.cpp.
#pragma once

#include <cstddef>

#include "../specens.h"

#if defined(SPECENS_SIMT)
using cudaStream_t = struct SimtStream*;
#else
#include <cuda_runtime_api.h>
#endif

namespace specens {

constexpr int kCudaMaxMembers = 8;

// Codes of our own; others are CUDA's.
constexpr int kWorkspaceTooSmall = -1;
constexpr int kTooManyMembers = -2;
constexpr int kTooManyRows = -3;
constexpr int kVocabularyTooLarge = -4;
constexpr int kHeadTooLarge = -5;
constexpr int kTooManySlots = -6;

size_t cuda_mix_workspace(const MixParams& params);
size_t cuda_sample_workspace(const SampleParams& params);
size_t cuda_verify_workspace(const VerifyParams& params);
size_t cuda_attention_workspace(const AttentionParams& params, int64_t capacity);

int cuda_uniforms(const UniformsParams& params, cudaStream_t stream);
int cuda_mix(const MixParams& params, void* workspace, size_t workspace_bytes, cudaStream_t stream);
int cuda_sample(const SampleParams& params, void* workspace, size_t workspace_bytes,
                cudaStream_t stream);
int cuda_verify(const VerifyParams& params, void* workspace, size_t workspace_bytes,
                cudaStream_t stream);

// `capacity` is how many slots a row of the batch has: what lies beyond is not touched.
int cuda_attention(const AttentionParams& params, int64_t capacity, void* workspace,
                   size_t workspace_bytes, cudaStream_t stream);
int cuda_compact(const CompactParams& params, int64_t capacity, cudaStream_t stream);

const char* cuda_error(int code);

// Whether it says that the device, or its driver, can run none of the kernels.
bool cuda_unsupported(int code);

}  // namespace specens
