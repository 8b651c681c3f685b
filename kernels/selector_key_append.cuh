// One selector key by one warp: norm, RoPE, quantise, write. Shared by selector_key_append.cu and
// attention_prologue.cu. A lane holds the 4 dims that it packs into bytes, so group maxima and norms are a
// few shuffles and nothing passes through shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/selector_key_append.h"

namespace spot::kernels {
namespace {

__device__ __forceinline__ float key_warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v = add_rn(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

__device__ __forceinline__ float2 load2(const void* base, DataType type, int64_t index) {
  if (type == DataType::kF32)
    return *reinterpret_cast<const float2*>(static_cast<const float*>(base) + index);
  if (type == DataType::kF16)
    return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(base) + index));
  return __bfloat1622float2(
      *reinterpret_cast<const __nv_bfloat162*>(static_cast<const __nv_bfloat16*>(base) + index));
}

// All 32 lanes call it with the same token and head.
template <KeyFormat kFormat>
__device__ __forceinline__ void append_key(const SelectorKeyAppendParams& p, int64_t token, int head,
                                           int lane) {
  const int64_t slot = p.slots[token];
  if (slot < 0) return;

  const int64_t source = token * p.token_stride + head * kKeyDim;
  const float2 lower = load2(p.keys, p.key_type, source + lane_dim(lane, 0));
  const float2 upper = load2(p.keys, p.key_type, source + lane_dim(lane, 2));
  float x[4] = {lower.x, lower.y, upper.x, upper.y};

  if (p.norm != KeyNorm::none) {
    if (p.norm == KeyNorm::layernorm) {
      const float mean = mean_of_sum(key_warp_sum(sum4(x)));
      for (float& v : x) v = sub_rn(v, mean);
    }
    const float reciprocal = reciprocal_deviation(key_warp_sum(square_sum4(x)), p.norm_epsilon);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = head * p.norm_head_stride + lane_dim(lane, i);
      x[i] = normalized(x[i], reciprocal, p.norm_weight != nullptr ? p.norm_weight[at] : 1.0f,
                        p.norm_bias != nullptr ? p.norm_bias[at] : 0.0f);
    }
  }
  if (p.rope_cos != nullptr) {  // dims i and i + 32 lie 8 lanes apart, in the same place of the lane
    const int64_t table = p.positions[token] * kRotaryPairs;
    for (int i = 0; i < 4; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], 8);
      const int dim = lane_dim(lane, i);
      if (dim < kRotaryDims) {
        const float c = p.rope_cos[table + dim % kRotaryPairs], s = p.rope_sin[table + dim % kRotaryPairs];
        x[i] = dim < kRotaryPairs ? rotated_lower(x[i], other, c, s) : rotated_upper(other, x[i], c, s);
      }
    }
  }

  float scale = 1.0f;
  uint8_t* page = p.pages + ((slot / kPageTokens) * p.key_heads + head) * page_head_bytes(kFormat);
  const int in_page = static_cast<int>(slot % kPageTokens);
  if constexpr (kFormat != KeyFormat::bf16) {
    constexpr int kLanes = group_size(kFormat) / 4;  // lanes of a group are neighbours
    float largest = 0.0f;
    for (float v : x) largest = fmaxf(largest, fabsf(finite(v)));
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const uint32_t bits = encode_scale(kFormat, largest, p.global_scale);
    scale = decode_scale(kFormat, bits, p.global_scale);
    if (lane % kLanes == 0) {
      uint8_t* at = page + scale_offset(kFormat, in_page, lane / kLanes);
      for (int i = 0; i < scale_bytes(kFormat); ++i) at[i] = static_cast<uint8_t>(bits >> (8 * i));
    }
  }
  uint32_t codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = encode_value(kFormat, x[i], scale);
  if constexpr (code_bits(kFormat) == 4) {
    for (int i = 0; i < 2; ++i)
      page[code_offset(kFormat, in_page, lane_dim(lane, i))] =
          static_cast<uint8_t>(pack_pair(kFormat, codes[i], codes[i + 2]));
  } else {
    for (int i = 0; i < 4; ++i) {
      uint8_t* at = page + code_offset(kFormat, in_page, lane_dim(lane, i));
      if constexpr (code_bits(kFormat) == 8)
        *at = static_cast<uint8_t>(codes[i]);
      else
        *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(codes[i]);
    }
  }
}

}  // namespace
}  // namespace spot::kernels
