// The number formats of the selector key cache and the layout of its pages, for host and device alike.
//
// A key is kKeyDim = 128 numbers of one key head; a token has key_heads of them (4: one per selector head, or
// 1, shared). A page holds 16 tokens, which is also the selection block. The pool is
//
//     uint8 [num_pages, key_heads, page_head_bytes(format)]
//
// and a page of one head is its codes followed by its group scales:
//
//   format   code                 group  scale of a group           bytes a key   bytes a page and head
//   bf16     bfloat16             -      -                          256           4096
//   int8     integer -127..127    32     bfloat16                   136           2176
//   int4     integer -7..7        32     bfloat16                    72           1152
//   mxfp4    E2M1                 32     E8M0 (a power of two)       68           1088
//   nvfp4    E2M1                 16     E4M3, times one float32     72           1152
//   f32      float32              -      -                          512           8192 (CPU only)
//
// value = decode_value(code) * decode_scale(scale). The products of int8, int4 and mxfp4 are exact in
// float32; so are nvfp4's before the float32 `global_scale` of the whole cache is applied.
//
// Codes lie in the order in which mma.m16n8k16 wants its A operand (tokens are rows), so that a lane of a
// warp reads 16 contiguous bytes and the 32 lanes 512 contiguous bytes, with no shuffle. See code_offset().
//
// Exactness: host and device give EQUAL BITS. Every step is one IEEE float32 operation rounded to nearest
// even (division included) or integer arithmetic; nothing may be contracted or reassociated, hence div_rn and
// friends. Non-finite inputs: NaN encodes as 0, infinities as the largest finite float32 (bf16 and f32 keep both as
// they are).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SPOT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SPOT_HOST_DEVICE inline
#endif

namespace spot::kernels {

enum class KeyFormat : int32_t { bf16 = 0, int8 = 1, int4 = 2, mxfp4 = 3, nvfp4 = 4, f32 = 5 };

inline constexpr int kKeyDim = 128;       // numbers a key
inline constexpr int kPageTokens = 16;    // tokens a page, and a selection block
inline constexpr int kSelectorHeads = 4;  // query heads of the selector

// ---- IEEE float32 steps that no compiler may fuse

SPOT_HOST_DEVICE uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
#endif
}
SPOT_HOST_DEVICE float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, 4);
  return x;
#endif
}
#if defined(__CUDA_ARCH__)
SPOT_HOST_DEVICE float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
SPOT_HOST_DEVICE float sub_rn(float a, float b) {
  return __fsub_rn(a, b);
}
SPOT_HOST_DEVICE float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
SPOT_HOST_DEVICE float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
SPOT_HOST_DEVICE float sqrt_rn(float a) {
  return __fsqrt_rn(a);
}
SPOT_HOST_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
#else
// The result passes through memory, so that no compiler contracts it with a neighbour into a fused operation.
inline float rounded(float x) {
  volatile float y = x;
  return y;
}
inline float add_rn(float a, float b) {
  return rounded(a + b);
}
inline float sub_rn(float a, float b) {
  return rounded(a - b);
}
inline float mul_rn(float a, float b) {
  return rounded(a * b);
}
inline float div_rn(float a, float b) {
  return rounded(a / b);
}
inline float sqrt_rn(float a) {
  return rounded(std::sqrt(a));
}
inline float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
#endif
// Round to nearest integer, ties to even (the default rounding mode on the host).
SPOT_HOST_DEVICE float round_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#else
  return std::nearbyintf(x);
#endif
}

// ---- sizes

// Dims that share a scale; 128 for bf16 and f32, which have none.
SPOT_HOST_DEVICE constexpr int group_size(KeyFormat format) {
  return format == KeyFormat::nvfp4                              ? 16
         : format == KeyFormat::bf16 || format == KeyFormat::f32 ? kKeyDim
                                                                 : 32;
}
SPOT_HOST_DEVICE constexpr int num_groups(KeyFormat format) {
  return kKeyDim / group_size(format);
}
SPOT_HOST_DEVICE constexpr int code_bits(KeyFormat format) {
  return format == KeyFormat::f32 ? 32 : format == KeyFormat::bf16 ? 16 : format == KeyFormat::int8 ? 8 : 4;
}
SPOT_HOST_DEVICE constexpr int scale_bytes(KeyFormat format) {
  return format == KeyFormat::bf16 || format == KeyFormat::f32    ? 0
         : format == KeyFormat::int8 || format == KeyFormat::int4 ? 2
                                                                  : 1;
}
// Bytes of one key of one head, scales included.
SPOT_HOST_DEVICE constexpr int key_bytes(KeyFormat format) {
  return kKeyDim * code_bits(format) / 8 + num_groups(format) * scale_bytes(format);
}
SPOT_HOST_DEVICE constexpr int page_code_bytes(KeyFormat format) {
  return kPageTokens * kKeyDim * code_bits(format) / 8;
}
SPOT_HOST_DEVICE constexpr int page_head_bytes(KeyFormat format) {
  return kPageTokens * key_bytes(format);
}
SPOT_HOST_DEVICE constexpr int64_t page_bytes(KeyFormat format, int key_heads) {
  return static_cast<int64_t>(page_head_bytes(format)) * key_heads;
}

// ---- layout

// Byte offset, inside a page of one head, of the code of (token 0..15, dim 0..127). A 4-bit byte holds the
// codes of dims d and d + 8 (d % 16 < 8), see pack_pair; both give the same offset.
//   step = dim / 16 is the mma's k step; lane = 4 (token % 8) + (dim % 8) / 2 is the lane that holds the
//   number.
SPOT_HOST_DEVICE constexpr int code_offset(KeyFormat format, int token, int dim) {
  const int step = dim / 16, upper = (dim % 16) / 8, odd = dim % 2, lane = (token % 8) * 4 + (dim % 8) / 2;
  const int row = token / 8;
  return format == KeyFormat::f32    ? (token * kKeyDim + dim) * 4
         : format == KeyFormat::bf16 ? step * 512 + lane * 16 + (row + 2 * upper) * 4 + odd * 2
         : format == KeyFormat::int8
             ? (step / 2) * 512 + lane * 16 + (2 * (step % 2) + row) * 4 + upper * 2 + odd
             : (step / 4) * 512 + lane * 16 + (step % 4) * 4 + odd * 2 + row;
}
// Byte offset, inside a page of one head, of the scale of (token, group): [token % 8][token / 8][group].
SPOT_HOST_DEVICE constexpr int scale_offset(KeyFormat format, int token, int group) {
  return page_code_bytes(format) +
         (((token % 8) * 2 + token / 8) * num_groups(format) + group) * scale_bytes(format);
}
// The byte of two 4-bit codes: `lower` of dim d, `upper` of dim d + 8 (d % 16 < 8).
//   int4: offset binary (code + 8), lower in bits 0-3, upper in bits 4-7.
//   E2M1 (sign s, magnitude mmm): bit 7 s_lower, bits 6-4 mmm_upper, bits 3-1 mmm_lower, bit 0 s_upper: two
//   shifts and masks away from a float16.
SPOT_HOST_DEVICE constexpr uint32_t pack_pair(KeyFormat format, uint32_t lower, uint32_t upper) {
  return format == KeyFormat::int4
             ? lower | upper << 4
             : (lower & 8) << 4 | (upper & 7) << 4 | (lower & 7) << 1 | (upper & 8) >> 3;
}
SPOT_HOST_DEVICE constexpr uint32_t unpack_lower(KeyFormat format, uint32_t byte) {
  return format == KeyFormat::int4 ? byte & 15 : (byte >> 4 & 8) | (byte >> 1 & 7);
}
SPOT_HOST_DEVICE constexpr uint32_t unpack_upper(KeyFormat format, uint32_t byte) {
  return format == KeyFormat::int4 ? byte >> 4 & 15 : (byte << 3 & 8) | (byte >> 4 & 7);
}

// ---- small floats

SPOT_HOST_DEVICE uint32_t float_to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (u >> 16 | 0x40u) & 0xffffu;  // NaN stays NaN
  return ((u + 0x7fffu + (u >> 16 & 1u)) >> 16) & 0xffffu;
}
SPOT_HOST_DEVICE float bf16_to_float(uint32_t bits) {
  return bits_float(bits << 16);
}

// x >= 0 to E4M3 (bias 7, largest 448), to nearest even, saturating.
SPOT_HOST_DEVICE uint32_t float_to_e4m3(float x) {
  if (!(x < 448.0f)) return 0x7e;
  if (x < 0.015625f)
    return static_cast<uint32_t>(round_even(x * 512.0f));  // subnormal; 8 is the first normal
  const uint32_t u = float_bits(x);
  return ((u + 0x7ffffu + (u >> 20 & 1u)) >> 20) - ((127u - 7u) << 3);
}
SPOT_HOST_DEVICE float e4m3_to_float(uint32_t bits) {
  return (bits >> 3) == 0 ? static_cast<float>(bits) * 0.001953125f
                          : bits_float((bits + ((127u - 7u) << 3)) << 20);
}
SPOT_HOST_DEVICE float e8m0_to_float(uint32_t bits) {
  return bits == 0 ? 5.877471754111438e-39f : bits_float(bits << 23);  // 2^(bits - 127)
}
// |x| to the 3 magnitude bits of E2M1 {0, .5, 1, 1.5, 2, 3, 4, 6}, to nearest, ties to the even code,
// saturating.
SPOT_HOST_DEVICE uint32_t e2m1_magnitude(float a) {
  return static_cast<uint32_t>(a > 0.25f) + static_cast<uint32_t>(a >= 0.75f) +
         static_cast<uint32_t>(a > 1.25f) + static_cast<uint32_t>(a >= 1.75f) +
         static_cast<uint32_t>(a > 2.5f) + static_cast<uint32_t>(a >= 3.5f) + static_cast<uint32_t>(a > 5.0f);
}

// ---- a group

// What an encoder sees of a number (not for bf16 and f32): NaN is 0, infinities are finite.
SPOT_HOST_DEVICE float finite(float x) {
  return !(x == x) ? 0.0f : x > 3.4028234e38f ? 3.4028234e38f : x < -3.4028234e38f ? -3.4028234e38f : x;
}

// The stored scale of a group whose largest |finite(x)| is `largest`.
//   int8, int4: bf16(largest / 127), bf16(largest / 7).
//   mxfp4: the smallest power of two s with largest <= 6 s, so that nothing clips; codes 1..254, 127 for
//   zeros. nvfp4: E4M3(largest / 6 / global_scale), saturating at 448.
SPOT_HOST_DEVICE uint32_t encode_scale(KeyFormat format, float largest, float global_scale = 1.0f) {
  switch (format) {
    case KeyFormat::int8:
      return float_to_bf16(div_rn(largest, 127.0f));
    case KeyFormat::int4:
      return float_to_bf16(div_rn(largest, 7.0f));
    case KeyFormat::mxfp4: {
      if (largest == 0.0f) return 127;
      const uint32_t u = float_bits(div_rn(largest, 6.0f));
      const uint32_t exponent = (u >> 23) + ((u & 0x7fffffu) != 0 ? 1u : 0u);
      return exponent < 1u ? 1u : exponent > 254u ? 254u : exponent;
    }
    case KeyFormat::nvfp4:
      return float_to_e4m3(div_rn(div_rn(largest, 6.0f), global_scale));
    default:
      return 0;
  }
}
SPOT_HOST_DEVICE float decode_scale(KeyFormat format, uint32_t scale, float global_scale = 1.0f) {
  switch (format) {
    case KeyFormat::int8:
    case KeyFormat::int4:
      return bf16_to_float(scale);
    case KeyFormat::mxfp4:
      return e8m0_to_float(scale);
    case KeyFormat::nvfp4:
      return mul_rn(e4m3_to_float(scale), global_scale);
    default:
      return 1.0f;
  }
}
// The stored code of x under decode_scale's value: bf16 bits; int8 as code + 128; int4 as code + 8; E2M1 as
// smmm (zero is never negative); f32 its bits.
SPOT_HOST_DEVICE uint32_t encode_value(KeyFormat format, float x, float scale) {
  if (format == KeyFormat::f32) return float_bits(x);
  if (format == KeyFormat::bf16) return float_to_bf16(x);
  const float ratio = scale == 0.0f ? 0.0f : div_rn(finite(x), scale);
  if (format == KeyFormat::int8 || format == KeyFormat::int4) {
    const float top = format == KeyFormat::int8 ? 127.0f : 7.0f;
    const float code = round_even(ratio);
    const float clamped = code > top ? top : code < -top ? -top : code;
    return static_cast<uint32_t>(static_cast<int32_t>(clamped) + (format == KeyFormat::int8 ? 128 : 8));
  }
  const uint32_t magnitude = e2m1_magnitude(ratio < 0.0f ? -ratio : ratio);
  return magnitude | (ratio < 0.0f && magnitude != 0 ? 8u : 0u);
}
SPOT_HOST_DEVICE float decode_value(KeyFormat format, uint32_t code) {
  switch (format) {
    case KeyFormat::f32:
      return bits_float(code);
    case KeyFormat::bf16:
      return bf16_to_float(code);
    case KeyFormat::int8:
      return static_cast<float>(static_cast<int32_t>(code) - 128);
    case KeyFormat::int4:
      return static_cast<float>(static_cast<int32_t>(code) - 8);
    default: {
      const uint32_t magnitude = code & 7;
      const float a = magnitude < 2 ? 0.5f * static_cast<float>(magnitude)
                                    : bits_float((magnitude + ((127u - 1u) << 1)) << 22);
      return code & 8 ? -a : a;
    }
  }
}

// One group on one thread: the stored scale, and group_size(format) codes of x.
SPOT_HOST_DEVICE uint32_t encode_group(KeyFormat format, const float* x, uint32_t* codes,
                                       float global_scale = 1.0f) {
  float largest = 0.0f;
  for (int i = 0; i < group_size(format); ++i) {
    const float a = std::fabs(finite(x[i]));
    largest = a > largest ? a : largest;
  }
  const uint32_t scale = encode_scale(format, largest, global_scale);
  const float decoded = decode_scale(format, scale, global_scale);
  for (int i = 0; i < group_size(format); ++i) codes[i] = encode_value(format, x[i], decoded);
  return scale;
}

// ---- a key in its page

// Writes the key x[128] of `token` (0..15) into the page of one head; touches no other token's bytes.
SPOT_HOST_DEVICE void encode_key(KeyFormat format, const float* x, int token, uint8_t* page_head,
                                 float global_scale = 1.0f) {
  uint32_t codes[kKeyDim];
  for (int g = 0; g < num_groups(format); ++g) {
    const int first = g * group_size(format);
    const uint32_t scale = encode_group(format, x + first, codes + first, global_scale);
    for (int i = 0; i < scale_bytes(format); ++i)
      page_head[scale_offset(format, token, g) + i] = static_cast<uint8_t>(scale >> (8 * i));
  }
  for (int dim = 0; dim < kKeyDim; ++dim) {
    uint8_t* at = page_head + code_offset(format, token, dim);
    if (code_bits(format) == 4) {
      if (dim % 16 < 8) *at = static_cast<uint8_t>(pack_pair(format, codes[dim], codes[dim + 8]));
    } else {
      for (int i = 0; i < code_bits(format) / 8; ++i) at[i] = static_cast<uint8_t>(codes[dim] >> (8 * i));
    }
  }
}
// The stored code of (token, dim), as encode_value gave it.
SPOT_HOST_DEVICE uint32_t load_code(KeyFormat format, const uint8_t* page_head, int token, int dim) {
  const uint8_t* at = page_head + code_offset(format, token, dim);
  if (code_bits(format) != 4) {
    uint32_t code = 0;
    for (int i = 0; i < code_bits(format) / 8; ++i) code |= static_cast<uint32_t>(at[i]) << (8 * i);
    return code;
  }
  return dim % 16 < 8 ? unpack_lower(format, at[0]) : unpack_upper(format, at[0]);
}
SPOT_HOST_DEVICE uint32_t load_scale(KeyFormat format, const uint8_t* page_head, int token, int group) {
  uint32_t scale = 0;
  for (int i = 0; i < scale_bytes(format); ++i)
    scale |= static_cast<uint32_t>(page_head[scale_offset(format, token, group) + i]) << (8 * i);
  return scale;
}
// Reads the key of `token` back into x[128].
SPOT_HOST_DEVICE void decode_key(KeyFormat format, const uint8_t* page_head, int token, float* x,
                                 float global_scale = 1.0f) {
  for (int dim = 0; dim < kKeyDim; ++dim) {
    const uint32_t scale = load_scale(format, page_head, token, dim / group_size(format));
    x[dim] = mul_rn(decode_value(format, load_code(format, page_head, token, dim)),
                    decode_scale(format, scale, global_scale));
  }
}

}  // namespace spot::kernels
