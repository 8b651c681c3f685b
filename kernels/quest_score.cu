// Contract: quest_score.h. max(q m, q M) is q M where q > 0 and q m where q < 0, so the bound is one product
// [min, max] . [q-, q+] of depth 2 head_dim: mma.m16n8k16 with 16 pages as rows and the query heads as the 8
// columns. A product may take its depth in any order, so a lane loads 16 neighbouring bytes of a row as the
// A operands of two steps, and queries are laid out to match: no shared memory for the bounds, no shuffle.
// Floor (bytes): 4 head_dim a page and KV head, 33.5 MB at 128K tokens of 8 heads of 128: 11 us at 3.03 TB/s.
// Grid: (runs of blocks, KV heads, rows) of 4 warps; a warp takes 16 blocks at a time.
#include <algorithm>

#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/quest_score.h"

namespace spot::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocks = 16;  // a warp's step

// The positive or the negative numbers of two packed 16-bit floats, zeros for the others.
__device__ __forceinline__ uint32_t keep_sign(uint32_t two, bool negative) {
  const uint32_t below = (two >> 15 & 0x00010001u) * 0xffffu;
  return two & (negative ? below : ~below);
}

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kWarps * 32) quest_kernel(const QuestScoreParams p, int group) {
  constexpr int kChunks = 2 * kHeadDim / 32;  // of 32 columns of [min, max]
  __shared__ uint4 query[kTiles][kChunks][32];
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, kv_head = blockIdx.y, row = blockIdx.z;
  const uint4* queries = static_cast<const uint4*>(p.queries) +
                         (static_cast<int64_t>(row) * p.num_heads + kv_head * group) * (kHeadDim / 8);
  for (int i = threadIdx.x; i < kTiles * kChunks * 32; i += kWarps * 32) {
    const int tile = i / (kChunks * 32), chunk = i / 32 % kChunks, head = tile * 8 + i % 32 / 4;
    uint4 q = make_uint4(0, 0, 0, 0);
    if (head < group) {
      const bool minimum = chunk < kChunks / 2;
      q = queries[head * (kHeadDim / 8) + chunk % (kChunks / 2) * 4 + i % 4];
      q = make_uint4(keep_sign(q.x, minimum), keep_sign(q.y, minimum), keep_sign(q.z, minimum),
                     keep_sign(q.w, minimum));
    }
    query[tile][chunk][i % 32] = q;
  }
  __syncthreads();

  const float minus_infinity = __uint_as_float(0xff800000u);
  const int blocks = (p.lengths[row] + kPageTokens - 1) / kPageTokens;
  const int32_t* table = p.page_table + row * p.page_table_stride;
  float* scores = p.scores + (static_cast<int64_t>(row) * p.num_kv_heads + kv_head) * p.max_blocks;
  const uint4* bounds = static_cast<const uint4*>(p.bounds) + kv_head * p.num_pages * (2 * kHeadDim / 8) + t;
  const float factor = p.mean ? p.scale / static_cast<float>(group) : p.scale;
  const int step = static_cast<int>(gridDim.x) * kWarps * kBlocks;
  int first = (static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32) * kBlocks;
  const auto page_of = [&](int block) {
    return block < blocks ? table[block] : 0;
  };  // page 0 is there to read
  int page0 = page_of(first + g), page1 = page_of(first + g + 8);
  for (; first < p.max_blocks; first += step) {
    float result[2] = {minus_infinity, minus_infinity};
    if (first < blocks) {
      const uint4* row0 = bounds + page0 * static_cast<int64_t>(2 * kHeadDim / 8);
      const uint4* row1 = bounds + page1 * static_cast<int64_t>(2 * kHeadDim / 8);
      page0 = page_of(first + step + g);
      page1 = page_of(first + step + g + 8);
      float even[kTiles][4] = {}, odd[kTiles][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 x = row0[chunk * 4], y = row1[chunk * 4];
        const uint32_t a[4] = {x.x, y.x, x.y, y.y}, b[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const uint4 q = query[tile][chunk][lane];
          ptx::mma_accumulate<T>(even[tile], a, q.x, q.y);
          ptx::mma_accumulate<T>(odd[tile], b, q.z, q.w);
        }
      }
      // Columns 2t and 2t + 1 of rows g and g + 8.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float merged = p.mean ? 0.0f : minus_infinity;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float bound = even[tile][2 * half + j] + odd[tile][2 * half + j];
            if (tile * 8 + 2 * t + j < group) merged = p.mean ? merged + bound : fmaxf(merged, bound);
          }
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, merged, offset);
          merged = p.mean ? merged + other : fmaxf(merged, other);
        }
        if (first + g + 8 * half < blocks) result[half] = merged * factor;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (t == 0 && first + g + 8 * half < p.max_blocks) scores[first + g + 8 * half] = result[half];
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_quest(const QuestScoreParams& p, cudaStream_t stream) {
  const int32_t group = p.num_heads / p.num_kv_heads;
  const int64_t rows = int64_t{p.batch} * p.num_kv_heads;
  const int64_t runs = (p.max_blocks + kWarps * kBlocks - 1) / (kWarps * kBlocks);
  LaunchShape shape;
  // A few thousand warps fill the machine; more would only load their queries again.
  shape.grid =
      dim3(static_cast<unsigned>(std::min(runs, std::max<int64_t>(1, 2048 / rows))), p.num_kv_heads, p.batch);
  shape.block = dim3(kWarps * 32);
  shape.overlap = p.overlap;
  return group <= 8 ? launch(quest_kernel<T, kHeadDim, 1>, shape, stream, p, group)
                    : launch(quest_kernel<T, kHeadDim, 2>, shape, stream, p, group);
}

}  // namespace

cudaError_t quest_score(const QuestScoreParams& p, cudaStream_t stream) {
  const bool bf16 = p.type == DataType::kBf16;
  if (p.batch < 0 || p.num_kv_heads < 1 || p.num_heads < p.num_kv_heads ||
      p.num_heads % p.num_kv_heads != 0 || p.num_heads / p.num_kv_heads > 16 ||
      (!bf16 && p.type != DataType::kF16) || p.max_blocks < 0)
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.max_blocks == 0) return cudaSuccess;
  if (p.queries == nullptr || p.bounds == nullptr || p.page_table == nullptr || p.lengths == nullptr ||
      p.scores == nullptr || reinterpret_cast<uintptr_t>(p.queries) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(p.bounds) % 16 != 0)
    return cudaErrorInvalidValue;
  switch (p.head_dim) {
    case 64:
      return bf16 ? launch_quest<__nv_bfloat16, 64>(p, stream) : launch_quest<__half, 64>(p, stream);
    case 128:
      return bf16 ? launch_quest<__nv_bfloat16, 128>(p, stream) : launch_quest<__half, 128>(p, stream);
    case 256:
      return bf16 ? launch_quest<__nv_bfloat16, 256>(p, stream) : launch_quest<__half, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
