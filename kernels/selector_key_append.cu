// Contract: selector_key_append.h. One warp a (token, key head); a lane holds the 4 dims that it packs into
// bytes, so group maxima and norms are a few shuffles and nothing passes through shared memory. Floor: at
// decode a few hundred bytes a row, so the launch is the cost; at prefill T * key_heads * (256 B read +
// key_bytes written), 1.3 us for 16K tokens of shared INT4 keys at 3 TB/s of copy bandwidth... per 4 MB read.
// Grid: ceil(T * key_heads / 8) blocks of 8 warps.
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/selector_key_append.h"

namespace spot::kernels {
namespace {

__device__ __forceinline__ float warp_sum(float v) {
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

template <KeyFormat kFormat>
__global__ void __launch_bounds__(256) append_kernel(const SelectorKeyAppendParams p) {
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (item >= p.num_tokens * p.key_heads) return;
  const int64_t token = item / p.key_heads;
  const int head = static_cast<int>(item % p.key_heads);
  const int64_t slot = p.slots[token];
  if (slot < 0) return;

  const int64_t source = token * p.token_stride + head * kKeyDim;
  const float2 lower = load2(p.keys, p.key_type, source + lane_dim(lane, 0));
  const float2 upper = load2(p.keys, p.key_type, source + lane_dim(lane, 2));
  float x[4] = {lower.x, lower.y, upper.x, upper.y};

  if (p.norm != KeyNorm::kNone) {
    if (p.norm == KeyNorm::kLayerNorm) {
      const float mean = mean_of_sum(warp_sum(sum4(x)));
      for (float& v : x) v = sub_rn(v, mean);
    }
    const float reciprocal = reciprocal_deviation(warp_sum(square_sum4(x)), p.norm_epsilon);
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
  if constexpr (kFormat != KeyFormat::kBf16) {
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
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace

cudaError_t selector_key_append(const SelectorKeyAppendParams& p, cudaStream_t stream) {
  if (p.num_tokens < 0 || (p.key_heads != 1 && p.key_heads != kSelectorHeads) || p.token_stride % 2 != 0)
    return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  if (p.keys == nullptr || p.slots == nullptr || p.pages == nullptr) return cudaErrorInvalidValue;
  if (p.rope_cos != nullptr && (p.rope_sin == nullptr || p.positions == nullptr))
    return cudaErrorInvalidValue;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.num_tokens * p.key_heads + 7) / 8));
  shape.block = dim3(256);
  shape.overlap = p.overlap;
  switch (p.format) {
    case KeyFormat::kBf16:
      return launch(append_kernel<KeyFormat::kBf16>, shape, stream, p);
    case KeyFormat::kInt8:
      return launch(append_kernel<KeyFormat::kInt8>, shape, stream, p);
    case KeyFormat::kInt4:
      return launch(append_kernel<KeyFormat::kInt4>, shape, stream, p);
    case KeyFormat::kMxfp4:
      return launch(append_kernel<KeyFormat::kMxfp4>, shape, stream, p);
    case KeyFormat::kNvfp4:
      return launch(append_kernel<KeyFormat::kNvfp4>, shape, stream, p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
