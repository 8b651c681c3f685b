// Matrix products in float32 accuracy on the tensor cores: each operand split into two TF32 numbers, three
// products. The product of the two small parts, about 2^-22 of the whole, is left out. Operands come from
// shared memory, any layout.
#pragma once

#include "kernels/ptx.cuh"

namespace spot::kernels {

// D [16x8] += A [16x8] B [8x8], TF32 operands, float32 accumulators. Lane = 4 g + t holds A(g, t), A(g+8, t),
// A(g, t+4), A(g+8, t+4); B(t, g), B(t+4, g); D(g, 2t), D(g, 2t+1), D(g+8, 2t), D(g+8, 2t+1).
#if defined(SPOT_EMULATED)
inline uint32_t to_tf32(float x) {
  return (__float_as_uint(x) + 0x1000u) & 0xffffe000u;  // to nearest, halves away from zero, as cvt.rna
}
inline void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                     uint32_t b1) {
  const emulator::Slot* slots = emulator::exchange(emulator::Slot{{a0, a1, a2, a3, b0, b1, 0, 0}});
  const int lane = static_cast<int>(emulator::lane());
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 8; ++k)
      sum += static_cast<double>(__uint_as_float(slots[row % 8 * 4 + k % 4].words[row / 8 + k / 4 * 2])) *
             static_cast<double>(__uint_as_float(slots[column * 4 + k % 4].words[4 + k / 4]));
    d[i] = static_cast<float>(sum);
  }
}
#else
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// x = big + small, both TF32.
struct Split {
  uint32_t big, small;
};
__device__ __forceinline__ Split split(float x) {
  const uint32_t big = to_tf32(x);
  return {big, to_tf32(x - __uint_as_float(big))};
}

// One lane's part of A and of B, split.
struct FragmentA {
  Split e[4];
};
struct FragmentB {
  Split e[2];
};
// From element (row, k) at base[row * row_stride + k * k_stride].
__device__ __forceinline__ FragmentA load_a(const float* base, int row_stride, int k_stride, int lane) {
  const float* at = base + (lane / 4) * row_stride + (lane % 4) * k_stride;
  return {split(at[0]), split(at[8 * row_stride]), split(at[4 * k_stride]),
          split(at[8 * row_stride + 4 * k_stride])};
}
// From element (k, col) at base[k * k_stride + col * col_stride].
__device__ __forceinline__ FragmentB load_b(const float* base, int k_stride, int col_stride, int lane) {
  const float* at = base + (lane % 4) * k_stride + (lane / 4) * col_stride;
  return {split(at[0]), split(at[4 * k_stride])};
}
__device__ __forceinline__ void multiply_add(float (&d)[4], const FragmentA& a, const FragmentB& b) {
  mma_tf32(d, a.e[0].small, a.e[1].small, a.e[2].small, a.e[3].small, b.e[0].big, b.e[1].big);
  mma_tf32(d, a.e[0].big, a.e[1].big, a.e[2].big, a.e[3].big, b.e[0].small, b.e[1].small);
  mma_tf32(d, a.e[0].big, a.e[1].big, a.e[2].big, a.e[3].big, b.e[0].big, b.e[1].big);
}

}  // namespace spot::kernels
