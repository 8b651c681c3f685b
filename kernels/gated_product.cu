// Contract: gated_product.h. Floor: 3 * num_rows * num_heads * width * sizeof(type) bytes, at decode the
// launch. Grid: 256 threads a block, 8 numbers a thread.
#include "kernels/gated_product.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

template <typename T, int kCount>
__global__ void __launch_bounds__(256) gated_product_kernel(const GatedProductParams p) {
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int32_t runs = p.width / kCount;
  if (index >= p.num_rows * p.num_heads * runs) return;
  const int64_t run = index / runs, row = run / p.num_heads, head = run % p.num_heads;
  const int64_t at = index % runs * kCount;
  float gate[kCount], x[kCount];
  load(static_cast<const T*>(p.gate) + row * p.gate_row_stride + head * p.gate_head_stride + at, gate);
  load(static_cast<const T*>(p.x) + row * p.x_row_stride + head * p.x_head_stride + at, x);
  for (int i = 0; i < kCount; ++i) {
    const float numerator = p.activation == Activation::kSilu ? gate[i] : 1.0f;
    x[i] *= to_float(rounded<T>(numerator / (1.0f + expf(-gate[i]))));
  }
  store(static_cast<T*>(p.y) + run * p.width + at, x);
}

template <typename T>
cudaError_t start(const GatedProductParams& p, cudaStream_t stream) {
  const auto together = [&](const void* base, int64_t row_stride, int64_t head_stride) {
    return moves_together(base, row_stride, p.type, 8) && moves_together(base, head_stride, p.type, 8);
  };
  const bool wide = p.width % 8 == 0 && together(p.gate, p.gate_row_stride, p.gate_head_stride) &&
                    together(p.x, p.x_row_stride, p.x_head_stride) && together(p.y, 0, 0);
  const int64_t threads = p.num_rows * p.num_heads * (wide ? p.width / 8 : p.width);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((threads + 255) / 256));
  shape.block = dim3(256);
  shape.overlap = p.overlap;
  return wide ? launch(gated_product_kernel<T, 8>, shape, stream, p)
              : launch(gated_product_kernel<T, 1>, shape, stream, p);
}

}  // namespace

cudaError_t gated_product(const GatedProductParams& p, cudaStream_t stream) {
  if (p.num_rows < 0 || p.num_heads < 1 || p.width < 1) return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  if (p.num_rows * p.num_heads > (int64_t{INT32_MAX} * 256) / p.width) return cudaErrorInvalidValue;
  if (p.gate == nullptr || p.x == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  switch (p.type) {
    case DataType::kBf16:
      return start<__nv_bfloat16>(p, stream);
    case DataType::kF16:
      return start<__half>(p, stream);
    case DataType::kF32:
      return start<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
