// What Hopper's instructions do, in words that compute capability 8.0 has; included by ptx.cuh, whose functions are these
// there, and by the tests' emulation.
#pragma once

#include "kernels/key_format.h"

namespace spot::kernels::ptx {

// wgmma_k16 (ptx.cuh) by each warp for its own 16 rows, on operands that are plain addresses; done when it returns.
template <typename T, int kCount>
__device__ __forceinline__ void warp_products_k16(float (&d)[kCount], uint64_t a, uint64_t b,
                                                  bool accumulate) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const auto piece = [](uint64_t operand, int row, int half) {
    const uint32_t address = static_cast<uint32_t>(operand) + static_cast<uint32_t>(row * 128 + half * 16);
    return address ^ (address >> 3 & 0x70);
  };
  uint32_t rows[4];
  ldmatrix_x4(rows, piece(a, 16 * warp + lane % 16, lane / 16));
#pragma unroll
  for (int j = 0; j < kCount / 8; ++j) {
    uint32_t columns[4];
    ldmatrix_x4(columns, piece(b, 16 * j + lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float* const to = d + 8 * j + 4 * half;
      float sum[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = accumulate ? to[e] : 0.0f;
      mma_accumulate<T>(sum, rows, columns[2 * half], columns[2 * half + 1]);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[e] = sum[e];
    }
  }
}

// e4m3x2_to_float2 by bits: in a float16 the same exponent counts 2^8 less; all ones are NaN.
__device__ __forceinline__ float2 e4m3x2_by_bits(uint32_t two) {
  const uint32_t halves =
      (two & 0x8000u) << 16 | (two & 0x7f00u) << 15 | (two & 0x80u) << 8 | (two & 0x7fu) << 7;
  float2 x = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  x.x *= 256.0f, x.y *= 256.0f;
  if ((two & 0x7fu) == 0x7fu) x.x = __uint_as_float(0x7fffffffu);
  if ((two & 0x7f00u) == 0x7f00u) x.y = __uint_as_float(0x7fffffffu);
  return x;
}

// floats_to_e4m3x2 by bits.
__device__ __forceinline__ uint32_t e4m3x2_of_floats(float low, float high) {
  const auto code = [](float x) {
    return x == x ? float_to_e4m3(x < 0.0f ? -x : x) | (float_bits(x) >> 24 & 0x80u) : 0x7fu;
  };
  return code(low) | code(high) << 8;
}

// e4m3x4_to_halves by bits.
__device__ __forceinline__ void e4m3x4_by_bits(uint32_t four, uint32_t& low, uint32_t& high) {
  const auto halves = [](uint32_t two) {
    const float2 x = e4m3x2_by_bits(two);
    const __half2 pair = __floats2half2_rn(x.x, x.y);
    return *reinterpret_cast<const uint32_t*>(&pair);
  };
  low = halves(four & 0xffff);
  high = halves(four >> 16);
}

}  // namespace spot::kernels::ptx
