// Instructions of compute capability 9.0 beside those of ptx.cuh that the kernels for tiles of queries use: the
// tensor copy engine, its barriers, and warpgroup products with 128 columns or with A in registers. They have no
// emulation: those kernels have a portable sibling that tests without a GPU run.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "kernels/ptx.cuh"

namespace spot::kernels::ptx {

// ---- barriers in shared memory that count threads and bytes

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before the copy engine sees the barriers; a __syncthreads() follows.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{\n .reg .b64 t;\n mbarrier.arrive.shared::cta.b64 t, [%0];\n}" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("{\n .reg .b64 t;\n mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;\n}" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nAGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @done bra END;\n "
      "bra AGAIN;\nEND:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
// Counts this thread in at a named barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between the warpgroups of a block; all threads of a warpgroup call it. kCount: what each of its
// threads has from now on, a multiple of 8.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- tensor copies

// A box of a tensor of four dims from global memory to `to`; its bytes count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap& map, uint32_t barrier, int x, int y,
                                         int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- warpgroup products

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// B[16xN] whose rows lie in memory one after the other: k rows of 64 numbers a panel (128 bytes, swizzled as in
// wgmma_operand), panels of 64 columns `panel_bytes` apart.
__device__ __forceinline__ uint64_t wgmma_rows_operand(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | static_cast<uint64_t>(panel_bytes / 16) << 16 | (address & 0x3ffff) >> 4;
}

#define SPOT_REGISTERS_32                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPOT_REGISTERS_64                                                                                  \
  SPOT_REGISTERS_32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPOT_IN_OUT_8(d, i)                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SPOT_IN_OUT_32(d, i) \
  SPOT_IN_OUT_8(d, i), SPOT_IN_OUT_8(d, i + 8), SPOT_IN_OUT_8(d, i + 16), SPOT_IN_OUT_8(d, i + 24)

// D[64x128] (+)= A B, both operands in shared memory as in ptx.cuh's wgmma_k16.
#define SPOT_WGMMA_SHARED_128(T, name)                                                                    \
  template <>                                                                                             \
  __device__ __forceinline__ void wgmma_wide<T>(float(&d)[64], uint64_t a, uint64_t b, bool accumulate) { \
    asm volatile(                                                                                         \
        "{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n wgmma.mma_async.sync.aligned.m64n128k16.f32." name  \
        "." name " {" SPOT_REGISTERS_64 "}, %64, %65, p, 1, 1, 0, 0;\n}"                                  \
        : SPOT_IN_OUT_32(d, 0), SPOT_IN_OUT_32(d, 32)                                                     \
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))                                               \
        : "memory");                                                                                      \
  }
// D[64xN] (+)= A B, A in registers as the accumulators of D lie, two numbers a register: a[0] row g, columns 2t
// and the next; a[1] row g + 8; a[2] and a[3] the same 8 columns on. B a wgmma_rows_operand.
#define SPOT_WGMMA_REGISTERS(T, name, columns, count, registers, a0, a1, a2, a3, operand, scale, ...)       \
  template <>                                                                                               \
  __device__ __forceinline__ void wgmma_registers<T>(float(&d)[count], const uint32_t(&a)[4], uint64_t b,   \
                                                     bool accumulate) {                                     \
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, " scale                                                \
                 ", 0;\n wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." name "." name " {" registers \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " operand ", p, 1, 1, 1;\n}"                         \
                 : __VA_ARGS__                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate))    \
                 : "memory");                                                                               \
  }

template <typename T>
__device__ __forceinline__ void wgmma_wide(float (&d)[64], uint64_t a, uint64_t b, bool accumulate);
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                bool accumulate);
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                bool accumulate);
SPOT_WGMMA_SHARED_128(__nv_bfloat16, "bf16")
SPOT_WGMMA_SHARED_128(__half, "f16")
SPOT_WGMMA_REGISTERS(__nv_bfloat16, "bf16", "128", 64, SPOT_REGISTERS_64, "%64", "%65", "%66", "%67", "%68",
                     "%69", SPOT_IN_OUT_32(d, 0), SPOT_IN_OUT_32(d, 32))
SPOT_WGMMA_REGISTERS(__half, "f16", "128", 64, SPOT_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", "%69",
                     SPOT_IN_OUT_32(d, 0), SPOT_IN_OUT_32(d, 32))
SPOT_WGMMA_REGISTERS(__nv_bfloat16, "bf16", "64", 32, SPOT_REGISTERS_32, "%32", "%33", "%34", "%35", "%36",
                     "%37", SPOT_IN_OUT_32(d, 0))
SPOT_WGMMA_REGISTERS(__half, "f16", "64", 32, SPOT_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", "%37",
                     SPOT_IN_OUT_32(d, 0))
#undef SPOT_WGMMA_SHARED_128
#undef SPOT_WGMMA_REGISTERS
#undef SPOT_REGISTERS_32
#undef SPOT_REGISTERS_64
#undef SPOT_IN_OUT_8
#undef SPOT_IN_OUT_32

// ---- host

// The map of a tensor of 16-bit numbers [w][z][y][x], x contiguous, strides in elements (multiples of 8), for
// boxes of box_y rows of 64 x, swizzled as wgmma wants its panels. The driver's function is asked for at run time:
// nothing links to it.
inline cudaError_t tensor_map(CUtensorMap* map, const void* base, const uint64_t (&size)[4],
                              const int64_t (&stride)[3], uint32_t box_y) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                         : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {size[0], size[1], size[2], size[3]};
  cuuint64_t bytes[3];
  for (int i = 0; i < 3; ++i) bytes[i] = static_cast<cuuint64_t>(stride[i]) * 2;
  const cuuint32_t box[4] = {64, box_y, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(base), sizes,
                                 bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace spot::kernels::ptx
