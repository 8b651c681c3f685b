// Gated DeltaNet between a layer's projections (the equations are in src/model/gated_delta.h): decode and
// prefill.
#pragma once

#include <cstddef>

#include "kernels/types.h"

namespace spot::kernels {

inline constexpr int kDeltaDim = 128;   // dims of a key head and of a value head
inline constexpr int kDeltaTaps = 4;    // of the convolution
inline constexpr int kDeltaChunk = 64;  // tokens a chunk of the prefill

// channels = 128 (2 num_key_heads + num_value_heads), in the order q | k | v. States are updated in place.
struct GatedDeltaParams {
  DataType data_type = DataType::kBf16;  // of mixed_qkv, z, b, a and output
  int32_t num_key_heads = 0;
  int32_t num_value_heads = 0;  // a multiple of num_key_heads
  int64_t num_tokens = 0;       // T
  int32_t num_sequences = 0;
  // The projections' outputs, columns contiguous; strides in elements from token to token. mixed_qkv and z
  // are read four elements at a time: strides are multiples of 4 and the pointers aligned to 4 elements.
  const void* mixed_qkv = nullptr;  // [T, channels]
  const void* z = nullptr;          // [T, num_value_heads, 128]
  const void* b = nullptr;          // [T, num_value_heads]
  const void* a = nullptr;          // [T, num_value_heads]
  int64_t mixed_qkv_stride = 0, z_stride = 0, b_stride = 0, a_stride = 0;
  const float* conv = nullptr;        // [4, channels], oldest tap first
  const float* decay_rate = nullptr;  // [num_value_heads], exp(A_log)
  const float* dt_bias = nullptr;     // [num_value_heads]
  const float* norm = nullptr;        // [128]
  float norm_epsilon = 1e-6f;
  float* conv_states = nullptr;          // [slots, 3, channels]
  float* recurrent_states = nullptr;     // [slots, num_value_heads, 128, 128], key by value
  const int64_t* state_slots = nullptr;  // [num_sequences], distinct
  void* output = nullptr;                // [T, num_value_heads * 128], contiguous
  void* workspace = nullptr;             // see below; aligned to 16 bytes

  // Prefill only. Chunks are numbered sequence after sequence, ceil(length / 64) each.
  const int32_t* query_starts = nullptr;  // [num_sequences + 1]: first token of each sequence, then T
  const int32_t* chunk_starts =
      nullptr;  // [num_sequences + 1]: first chunk of each sequence, then num_chunks
  const int32_t* chunk_sequences = nullptr;  // [num_chunks]: the sequence of each chunk
  int32_t num_chunks = 0;
  int32_t scan_columns = 0;  // value columns a block of the scan: 16 or 32; 0: by the size of the device
};

// Bytes of workspace that a call needs. Its contents need not outlive the call's kernels.
size_t gated_delta_decode_workspace(const GatedDeltaParams& params);
size_t gated_delta_prefill_workspace(const GatedDeltaParams& params);
// Whether the current device has the shared memory that prefill needs (138 KB a block; cards of 8.6, 8.9 and 12.0 have
// 99). Where it has not, gated_delta_prefill returns cudaErrorLaunchOutOfResources.
bool gated_delta_prefill_fits();

// One token a sequence: T = num_sequences.
cudaError_t gated_delta_decode(const GatedDeltaParams& params, cudaStream_t stream);

// Any number of tokens a sequence.
cudaError_t gated_delta_prefill(const GatedDeltaParams& params, cudaStream_t stream);

}  // namespace spot::kernels
