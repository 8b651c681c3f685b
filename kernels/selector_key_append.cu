// Contract: selector_key_append.h. One warp a (token, key head). Floor: at
// decode a few hundred bytes a row, so the launch is the cost; at prefill T * key_heads * (256 B read +
// key_bytes written), 1.3 us for 16K tokens of shared INT4 keys at 3 TB/s of copy bandwidth... per 4 MB read.
// Grid: ceil(T * key_heads / 8) blocks of 8 warps.
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/selector_key_append.cuh"

namespace spot::kernels {
namespace {

template <KeyFormat kFormat>
__global__ void __launch_bounds__(256) append_kernel(const SelectorKeyAppendParams p) {
  ptx::griddepcontrol_wait();
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (item >= p.num_tokens * p.key_heads) return;
  const int64_t token = item / p.key_heads;
  append_key<kFormat>(p, token, static_cast<int>(item % p.key_heads), lane);
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
    case KeyFormat::bf16:
      return launch(append_kernel<KeyFormat::bf16>, shape, stream, p);
    case KeyFormat::int8:
      return launch(append_kernel<KeyFormat::int8>, shape, stream, p);
    case KeyFormat::int4:
      return launch(append_kernel<KeyFormat::int4>, shape, stream, p);
    case KeyFormat::mxfp4:
      return launch(append_kernel<KeyFormat::mxfp4>, shape, stream, p);
    case KeyFormat::nvfp4:
      return launch(append_kernel<KeyFormat::nvfp4>, shape, stream, p);
    case KeyFormat::f32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
