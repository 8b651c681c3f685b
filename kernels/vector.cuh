// Numbers of bf16, float16 or float32 in memory, several at a time, as float32 in registers. Addresses are
// aligned to what is moved. Sums over a warp or a block in one fixed order, so that they depend on nothing
// else.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/types.h"

namespace spot::kernels {
namespace {

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <typename T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T(x);
}

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// kCount numbers, in moves of at most 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ void load(const T* from, float (&x)[kCount]) {
  constexpr int kStep = kCount * sizeof(T) > 16 ? 16 / sizeof(T) : kCount;
  using Move = typename Word<kStep * sizeof(T)>::Type;
#pragma unroll
  for (int first = 0; first < kCount; first += kStep) {
    const Move bits = *reinterpret_cast<const Move*>(from + first);
    T values[kStep];
    memcpy(static_cast<void*>(values), &bits, sizeof(bits));
#pragma unroll
    for (int i = 0; i < kStep; ++i) x[first + i] = to_float(values[i]);
  }
}
template <int kCount, typename T>
__device__ __forceinline__ void store(T* to, const float (&x)[kCount]) {
  constexpr int kStep = kCount * sizeof(T) > 16 ? 16 / sizeof(T) : kCount;
  using Move = typename Word<kStep * sizeof(T)>::Type;
#pragma unroll
  for (int first = 0; first < kCount; first += kStep) {
    T values[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) values[i] = rounded<T>(x[first + i]);
    Move bits;
    memcpy(&bits, static_cast<const void*>(values), sizeof(bits));
    *reinterpret_cast<Move*>(to + first) = bits;
  }
}

__device__ __forceinline__ float sum_of_warp(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
// Every thread gets the sum. `partial` is shared, one number a warp.
__device__ __forceinline__ float sum_of_block(float v, float* partial) {
  const int warps = static_cast<int>((blockDim.x + 31) / 32);
  v = sum_of_warp(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  return sum_of_warp(lane < warps ? partial[lane] : 0.0f);
}

}  // namespace

// Whether rows of `type` may be read `count` numbers at a time.
inline bool moves_together(const void* base, int64_t row_stride, DataType type, int count) {
  const int64_t bytes = (type == DataType::kF32 ? 4 : 2) * count;
  return row_stride % count == 0 && reinterpret_cast<uintptr_t>(base) % (bytes > 16 ? 16 : bytes) == 0;
}

}  // namespace spot::kernels
