// Contract: decode_blocks.h. Floor: 3 bytes a number at the memory's bandwidth. Grid: 256 threads a block, 16 numbers a
// thread.
#include "kernels/decode_blocks.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

template <typename T>
__global__ void __launch_bounds__(256) decode_blocks_kernel(const DecodeBlocksParams p) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t runs = p.width / 16, index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (index >= p.rows * runs) return;
  const int64_t row = index / runs, column = index % runs * 16;
  const float scale = p.scales[row / 128 * ((p.width + 127) / 128) + column / 128];
  const uint4 codes = ptx::load_streaming(static_cast<const uint8_t*>(p.codes) + row * p.width + column);
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  float y[16];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 two = ptx::e4m3x2_to_float2(words[i / 2] >> (i % 2 * 16) & 0xffff);
    y[2 * i] = two.x * scale, y[2 * i + 1] = two.y * scale;
  }
  store(static_cast<T*>(p.y) + row * p.width + column, y);
}

}  // namespace

cudaError_t decode_blocks(const DecodeBlocksParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const int64_t blocks = (p.rows * (p.width / 16) + 255) / 256;
  if (p.rows < 0 || p.width < 16 || p.width % 16 != 0 || blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  if (p.codes == nullptr || p.scales == nullptr || p.y == nullptr || !aligned(p.codes) || !aligned(p.y))
    return cudaErrorInvalidValue;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = dim3(256);
  shape.overlap = p.overlap;
  if (p.type == DataType::kBf16) return launch(decode_blocks_kernel<__nv_bfloat16>, shape, stream, p);
  if (p.type == DataType::kF16) return launch(decode_blocks_kernel<__half>, shape, stream, p);
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
