// Contract: rms_norm.h. One block a row, 8 numbers a thread and step; the second reading of a row hits L1.
// Floor: at decode the launch and two memory latencies, about 2 us; at prefill 2 * width * sizeof(type) bytes
// a row. Grid: one block a row, ceil(width / 8) threads, at most 1024.
#include <algorithm>

#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/rms_norm.h"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

template <typename T, typename F, int kCount>
__global__ void __launch_bounds__(1024) rms_norm_kernel(const RmsNormParams p) {
  __shared__ float partial[32];
  const int first = threadIdx.x * kCount, step = blockDim.x * kCount;
  const F* factors = static_cast<const F*>(p.factor);
  float factor[kCount] = {};
  if (first < p.width) load(factors + first, factor);

  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(blockIdx.x) * p.x_stride;
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(blockIdx.x) * p.width;
  float sum = 0.0f, values[kCount];
  for (int i = first; i < p.width; i += step) {
    load(x + i, values);
    for (float v : values) sum += v * v;
  }
  sum = sum_of_block(sum, partial);
  const float reciprocal = 1.0f / sqrtf(sum / static_cast<float>(p.width) + p.epsilon);
  for (int i = first; i < p.width; i += step) {
    load(x + i, values);
    if (i != first) load(factors + i, factor);
    for (int j = 0; j < kCount; ++j) values[j] = values[j] * reciprocal * factor[j];
    store(y + i, values);
  }
}

template <typename T, typename F>
cudaError_t start(const RmsNormParams& p, cudaStream_t stream) {
  const bool wide = p.width % 8 == 0 && moves_together(p.x, p.x_stride, p.type, 8) &&
                    moves_together(p.factor, 0, p.factor_type, 8) && moves_together(p.y, 0, p.type, 8);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.num_rows));
  const int threads = wide ? p.width / 8 : p.width;
  shape.block = dim3(static_cast<unsigned>(std::min(1024, (threads + 31) / 32 * 32)));
  shape.overlap = p.overlap;
  return wide ? launch(rms_norm_kernel<T, F, 8>, shape, stream, p)
              : launch(rms_norm_kernel<T, F, 1>, shape, stream, p);
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.num_rows < 0 || p.num_rows > INT32_MAX || p.width < 1 ||
      (p.factor_type != p.type && p.factor_type != DataType::kF32))
    return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  if (p.x == nullptr || p.factor == nullptr || p.y == nullptr) return cudaErrorInvalidValue;
  const bool float_factor = p.factor_type == DataType::kF32;
  switch (p.type) {
    case DataType::kBf16:
      return float_factor ? start<__nv_bfloat16, float>(p, stream)
                          : start<__nv_bfloat16, __nv_bfloat16>(p, stream);
    case DataType::kF16:
      return float_factor ? start<__half, float>(p, stream) : start<__half, __half>(p, stream);
    case DataType::kF32:
      return start<float, float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
