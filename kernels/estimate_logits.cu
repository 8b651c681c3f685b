// Contract: estimate_logits.h. With key = scale_k code + min_k, q . key = scale_k (q . code) + min_k sum(q),
// and q . code is mma.m16n8k16 with a block's 16 tokens as rows and the query heads as the 8 columns. A code
// becomes a 16-bit float by one OR: 128 + code in bf16, 1024 + code in f16, exact; the offset leaves with
// sum(q). The depth may be taken in any order: a lane reads a quarter of its rows, and queries are laid out
// to match. Floor (bytes): head_dim / 2 + 4 a candidate and KV head: 17.8 MB for 32K candidates of 8 heads of
// 128, 5.9 us at 3.03 TB/s. Grid: (runs of candidate blocks, KV heads, rows) of 4 warps; a warp takes one
// block at a time.
#include <algorithm>

#include "kernels/estimate_logits.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kWarps = 4;

template <typename T>
struct Offset;  // bits of the float whose last place is 1, twice, and its value
template <>
struct Offset<__nv_bfloat16> {
  static constexpr uint32_t kBits = 0x43004300u;
  static constexpr float kValue = 128.0f;
};
template <>
struct Offset<__half> {
  static constexpr uint32_t kBits = 0x64006400u;
  static constexpr float kValue = 1024.0f;
};

// A lane's codes of one row.
template <int kWords>
__device__ __forceinline__ void load_codes(const uint8_t* from, uint32_t (&words)[kWords]) {
  if constexpr (kWords == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  }
}

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kWarps * 32) estimate_kernel(const EstimateLogitsParams p, int group) {
  constexpr int kWords = kHeadDim / 32;
  __shared__ uint4 query[kTiles][kWords][32];
  __shared__ float query_sum[kTiles * 8];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int kv_head = blockIdx.y, row = blockIdx.z;
  const T* queries = static_cast<const T*>(p.queries) +
                     (static_cast<int64_t>(row) * p.num_heads + kv_head * group) * kHeadDim;
  // Word w of lane t holds dims 8 (t kWords + w) + 0..7; masking yields them in the pairs (0, 4), (1, 5), (2,
  // 6), (3, 7).
  for (int i = threadIdx.x; i < kTiles * kWords * 32; i += kWarps * 32) {
    const int tile = i / (kWords * 32), w = i / 32 % kWords, head = tile * 8 + i % 32 / 4;
    uint4 pairs = make_uint4(0, 0, 0, 0);
    if (head < group) {
      const uint16_t* q =
          reinterpret_cast<const uint16_t*>(queries) + head * kHeadDim + 8 * (i % 4 * kWords + w);
      const auto pair = [&](int j) {
        return static_cast<uint32_t>(q[j]) | static_cast<uint32_t>(q[j + 4]) << 16;
      };
      pairs = make_uint4(pair(0), pair(1), pair(2), pair(3));
    }
    query[tile][w][i % 32] = pairs;
  }
  for (int head = warp; head < kTiles * 8; head += kWarps) {
    float sum = 0.0f;
    if (head < group)
      for (int i = lane; i < kHeadDim; i += 32) sum += to_float(queries[head * kHeadDim + i]);
    sum = sum_of_warp(sum);
    if (lane == 0) query_sum[head] = sum;
  }
  __syncthreads();

  const int list = row * p.num_kv_heads + kv_head;
  const int32_t* selected = p.selected + static_cast<int64_t>(list) * p.max_selected;
  const int32_t* table = p.page_table + row * p.page_table_stride;
  const int count = p.counts[list], length = p.lengths[row], step = static_cast<int>(gridDim.x) * kWarps;
  const int64_t head_slots = kv_head * p.num_pages * kPageTokens;
  const int64_t width = int64_t{p.max_selected} * kPageTokens;
  float* logits = p.logits + (static_cast<int64_t>(row) * p.num_heads + kv_head * group) * width;
  int entry = static_cast<int>(blockIdx.x) * kWarps + warp;
  int block = entry < count ? selected[entry] : 0, page = entry < count ? table[block] : 0;
  for (; entry < count; entry += step) {
    const int64_t slot = head_slots + static_cast<int64_t>(page) * kPageTokens + g;
    const int first_token = block * kPageTokens;
    uint32_t x[kWords], y[kWords];
    load_codes(p.codes + slot * (kHeadDim / 2) + t * 4 * kWords, x);
    load_codes(p.codes + (slot + 8) * (kHeadDim / 2) + t * 4 * kWords, y);
    const __half2 range0 = static_cast<const __half2*>(p.ranges)[slot],
                  range1 = static_cast<const __half2*>(p.ranges)[slot + 8];
    const int next = entry + step;
    block = next < count ? selected[next] : 0;
    page = next < count ? table[block] : 0;

    float even[kTiles][4] = {}, odd[kTiles][4] = {};
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const auto floats = [](uint32_t word, int j) {
        return (word >> (4 * j) & 0x000f000fu) | Offset<T>::kBits;
      };
      const uint32_t a[4] = {floats(x[w], 0), floats(y[w], 0), floats(x[w], 1), floats(y[w], 1)};
      const uint32_t b[4] = {floats(x[w], 2), floats(y[w], 2), floats(x[w], 3), floats(y[w], 3)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 q = query[tile][w][lane];
        ptx::mma_accumulate<T>(even[tile], a, q.x, q.y);
        ptx::mma_accumulate<T>(odd[tile], b, q.z, q.w);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 range = __half22float2(half == 0 ? range0 : range1);
      const int token = g + 8 * half;
      const bool visible = first_token + token < length;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int head = tile * 8 + 2 * t + j;
          if (head >= group) continue;
          const float sum = query_sum[head];
          const float dot = even[tile][2 * half + j] + odd[tile][2 * half + j] - Offset<T>::kValue * sum;
          logits[head * width + int64_t{entry} * kPageTokens + token] =
              visible ? p.scale * (range.x * dot + range.y * sum) : __uint_as_float(0xff800000u);
        }
    }
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_estimate(const EstimateLogitsParams& p, cudaStream_t stream) {
  const int32_t group = p.num_heads / p.num_kv_heads;
  const int64_t rows = int64_t{p.batch} * p.num_kv_heads;
  const int64_t runs = (p.max_selected + kWarps - 1) / kWarps;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(std::min(runs, std::max<int64_t>(1, 2048 / rows))), p.num_kv_heads, p.batch);
  shape.block = dim3(kWarps * 32);
  shape.overlap = p.overlap;
  return group <= 8 ? launch(estimate_kernel<T, kHeadDim, 1>, shape, stream, p, group)
                    : launch(estimate_kernel<T, kHeadDim, 2>, shape, stream, p, group);
}

}  // namespace

cudaError_t estimate_logits(const EstimateLogitsParams& p, cudaStream_t stream) {
  const bool bf16 = p.type == DataType::kBf16;
  if (p.batch < 0 || p.num_kv_heads < 1 || p.num_heads < p.num_kv_heads ||
      p.num_heads % p.num_kv_heads != 0 || p.num_heads / p.num_kv_heads > 16 ||
      (!bf16 && p.type != DataType::kF16) || p.max_selected < 0)
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.max_selected == 0) return cudaSuccess;
  if (p.queries == nullptr || p.codes == nullptr || p.ranges == nullptr || p.page_table == nullptr ||
      p.lengths == nullptr || p.selected == nullptr || p.counts == nullptr || p.logits == nullptr ||
      reinterpret_cast<uintptr_t>(p.codes) % 16 != 0 || reinterpret_cast<uintptr_t>(p.ranges) % 4 != 0)
    return cudaErrorInvalidValue;
  switch (p.head_dim) {
    case 64:
      return bf16 ? launch_estimate<__nv_bfloat16, 64>(p, stream) : launch_estimate<__half, 64>(p, stream);
    case 128:
      return bf16 ? launch_estimate<__nv_bfloat16, 128>(p, stream) : launch_estimate<__half, 128>(p, stream);
    case 256:
      return bf16 ? launch_estimate<__nv_bfloat16, 256>(p, stream) : launch_estimate<__half, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
