// Contract: key_summary_append.h. Floor (bytes): at most a page of keys read and one row written a token and
// head, 38 KB a decode step of 8 heads of 128: latency alone. Grid: one warp a token and KV head; a lane has
// head_dim / 32 neighbouring dims.
#include "kernels/key_summary_append.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kWarps = 4;

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kWarps * 32) summary_kernel(const KeySummaryAppendParams p) {
  constexpr int kDims = kHeadDim / 32;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, head = blockIdx.y;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slots[token];
  if (slot < 0) return;
  const int64_t page = slot / kPageTokens;
  const int offset = static_cast<int>(slot % kPageTokens);
  const T* keys = static_cast<const T*>(p.keys) + head * p.head_stride + page * p.page_stride + lane * kDims;

  // The last new token of a page has its bounds.
  if (offset == kPageTokens - 1 || token + 1 == p.num_tokens || p.slots[token + 1] != slot + 1) {
    float low[kDims], high[kDims];
    load<kDims>(keys, low);
#pragma unroll
    for (int i = 0; i < kDims; ++i) high[i] = low[i];
#pragma unroll
    for (int row = 1; row < kPageTokens; ++row) {
      if (row > offset) break;
      float x[kDims];
      load<kDims>(keys + row * p.token_stride, x);
#pragma unroll
      for (int i = 0; i < kDims; ++i) low[i] = fminf(low[i], x[i]), high[i] = fmaxf(high[i], x[i]);
    }
    T* bounds = static_cast<T*>(p.bounds) + (head * p.num_pages + page) * 2 * kHeadDim + lane * kDims;
    store<kDims>(bounds, low);
    store<kDims>(bounds + kHeadDim, high);
  }

  if (p.codes == nullptr) return;
  float x[kDims];
  load<kDims>(keys + offset * p.token_stride, x);
  float low = x[0], high = x[0];
#pragma unroll
  for (int i = 1; i < kDims; ++i) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
  for (int step = 16; step > 0; step /= 2) {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
  }
  const __half range[2] = {ptx::from_float<__half>(div_rn(sub_rn(high, low), 15.0f)),
                           ptx::from_float<__half>(low)};
  const float scale = __half2float(range[0]), minimum = __half2float(range[1]);
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < kDims; ++i) {
    const float code =
        scale > 0.0f ? fminf(fmaxf(rintf(div_rn(sub_rn(x[i], minimum), scale)), 0.0f), 15.0f) : 0.0f;
    word |= static_cast<uint32_t>(code) << (4 * i);
  }
  const int64_t row = head * p.num_pages * kPageTokens + slot;
  uint8_t* codes = p.codes + row * (kHeadDim / 2) + lane * (kDims / 2);
#pragma unroll
  for (int i = 0; i < kDims / 2; ++i) codes[i] = static_cast<uint8_t>(word >> (8 * i));
  if (lane < 2) static_cast<__half*>(p.ranges)[row * 2 + lane] = range[lane];
}

template <typename T, int kHeadDim>
cudaError_t launch_summary(const KeySummaryAppendParams& p, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.num_tokens + kWarps - 1) / kWarps), p.num_kv_heads);
  shape.block = dim3(kWarps * 32);
  shape.overlap = p.overlap;
  return launch(summary_kernel<T, kHeadDim>, shape, stream, p);
}

}  // namespace

cudaError_t key_summary_append(const KeySummaryAppendParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const bool bf16 = p.type == DataType::kBf16;
  if (p.num_tokens < 0 || p.num_kv_heads < 1 || (!bf16 && p.type != DataType::kF16) || p.keys == nullptr ||
      p.slots == nullptr || p.bounds == nullptr || (p.codes == nullptr) != (p.ranges == nullptr) ||
      reinterpret_cast<uintptr_t>(p.keys) % 16 != 0 || reinterpret_cast<uintptr_t>(p.bounds) % 16 != 0 ||
      p.page_stride % 8 != 0 || p.head_stride % 8 != 0 || p.token_stride % 8 != 0)
    return cudaErrorInvalidValue;
  switch (p.head_dim) {
    case 64:
      return bf16 ? launch_summary<__nv_bfloat16, 64>(p, stream) : launch_summary<__half, 64>(p, stream);
    case 128:
      return bf16 ? launch_summary<__nv_bfloat16, 128>(p, stream) : launch_summary<__half, 128>(p, stream);
    case 256:
      return bf16 ? launch_summary<__nv_bfloat16, 256>(p, stream) : launch_summary<__half, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
