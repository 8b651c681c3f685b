// Selector keys of new tokens into the paged cache: norm, RoPE, quantise, write.
#pragma once

#include "kernels/selector_key_math.h"
#include "kernels/types.h"

namespace spot::kernels {

struct SelectorKeyAppendParams {
  KeyFormat format = KeyFormat::int4;
  int32_t key_heads = 1;       // 1 (shared by the selector's heads) or kSelectorHeads
  int64_t num_tokens = 0;      // T
  const void* keys = nullptr;  // [T, key_heads, 128] of key_type, heads and dims contiguous
  DataType key_type = DataType::kBf16;
  int64_t token_stride = 0;  // elements from one token to the next; a multiple of 2
  KeyNorm norm = KeyNorm::layernorm;
  const float* norm_weight =
      nullptr;                       // [128] (or [key_heads, 128], see norm_head_stride) float32; null: ones
  const float* norm_bias = nullptr;  // the same; null: zeros
  int64_t norm_head_stride = 0;      // 0: one weight for all heads; 128: one each
  float norm_epsilon = 1e-6f;
  const float* rope_cos = nullptr;  // [positions, 32] float32; null: no rotation
  const float* rope_sin = nullptr;
  const int64_t* positions = nullptr;  // [T], row of the tables; unused without rotation
  const int64_t* slots = nullptr;      // [T], page * 16 + offset in the page; a negative slot skips its token
  uint8_t* pages = nullptr;   // pool [num_pages, key_heads, page_head_bytes(format)], see key_format.h
  float global_scale = 1.0f;  // nvfp4 only
  Overlap overlap = Overlap::kNone;
};

// Writes only the bytes of the given tokens. Equal bits to prepare_selector_key followed by encode_key.
cudaError_t selector_key_append(const SelectorKeyAppendParams& params, cudaStream_t stream);

}  // namespace spot::kernels
