// score_tiles with a shared key on compute capability 9.0; included by score_tiles.cu, whose head has the contract
// and the floor.
//
// A block takes a strip of 64 queries and up to 8,192 keys, which a warp of its last warpgroup has the copy engine
// bring, 128 a stage. The other warpgroups have 32 queries each, whose four heads are 128 rows of two products: row g
// of warp w is query 8 w + g, head 2 m in product m, and row g + 8 the same query's head 2 m + 1. So a thread holds all
// four heads of one query for each of its keys, and mixes them in registers. The warpgroups take turns at multiplying,
// by named barriers, so that one's products run beside the others' mixing. With one mixing two warpgroups, of all
// keys, keep the tensor cores busy; several mixings are more work than the products, and four warpgroups, of half the
// keys each, fill the other units better.
#pragma once

#include <type_traits>

#include "kernels/ptx_hopper.cuh"
#include "kernels/query_strip.cuh"

namespace spot::kernels {
namespace {

constexpr int kScoreKeys = 128, kScoreStages = 4, kScoreBlocks = kScoreKeys / kPageTokens, kScoreSegment = 64;
constexpr uint32_t kScorePanelBytes = kScoreKeys * kPanelRowBytes, kScoreStageBytes = 2 * kScorePanelBytes;
constexpr uint32_t kScoreQueryBytes = 2 * 2 * 2 * kGroupRows * kPanelRowBytes;  // half, product, panel

template <bool kOneGroup>
struct ScoreShape {
  static constexpr int kParts = kOneGroup ? 1 : 2;  // of a stage's keys, a warpgroup each
  static constexpr int kGroups = 2 * kParts;        // warpgroups that multiply
  static constexpr int kConsumers = kGroups * kGroupThreads, kThreads = kConsumers + kGroupThreads;
  static constexpr int kKeys = kScoreKeys / kParts, kBlocks = kScoreBlocks / kParts;  // of a part
  static constexpr int kRegisters = kOneGroup ? 240 : 112;
};

// Stages whose maxima lie in shared memory before they are written out.
constexpr int kFlushOne = 16, kFlushMany = 4;  // with one group, with several
constexpr size_t score_shared_bytes(int groups) {
  return 1024 + kScoreQueryBytes + kScoreStages * kScoreStageBytes +
         static_cast<size_t>(groups) *
             ((groups == 1 ? kFlushOne : kFlushMany) * 8 * kScoreBlocks * 4 + kStripQueries * 16);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Eight numbers a lane to their maxima over the warp: lane l has that of number l % 8.
__device__ __forceinline__ float warp_maxima(float (&x)[8]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int width = 4; width >= 1; width /= 2) {
    const bool upper = (lane & width) != 0;
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float mine = upper ? x[i + width] : x[i], other = upper ? x[i] : x[i + width];
      x[i] = fmaxf(mine, __shfl_xor_sync(0xffffffffu, other, width));
    }
  }
  x[0] = fmaxf(x[0], __shfl_xor_sync(0xffffffffu, x[0], 8));
  return fmaxf(x[0], __shfl_xor_sync(0xffffffffu, x[0], 16));
}

__device__ __forceinline__ void multiply_queries(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma_wide<__nv_bfloat16>(d, a, b, accumulate);
}
__device__ __forceinline__ void multiply_queries(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma_k16<__nv_bfloat16>(d, a, b, accumulate);
}

template <bool kOneGroup>
__device__ __forceinline__ void score_strip(const ScoreTilesParams& p, const QueryTile* tiles,
                                            int first_stage, int end_stage, uint32_t queries, uint32_t keys,
                                            uint32_t full, uint32_t empty, float* maxima, float4* weights,
                                            int warp) {
  using S = ScoreShape<kOneGroup>;
  constexpr int kFlush = kOneGroup ? kFlushOne : kFlushMany;
  const int groups = kOneGroup ? 1 : p.groups;
  const int warpgroup = warp / 4, half = warpgroup % 2, part = warpgroup / 2;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int tiles_per_strip = kStripQueries / p.tile_queries;
  // The row of the strip's i-th query, or -1 where the batch does not bring it.
  const auto row_of = [&](int i) {
    const QueryTile tile = tiles[i / p.tile_queries];
    const int offset = i % p.tile_queries - tile.start % p.tile_queries;
    return tile.count > 0 && offset >= 0 && offset < tile.count ? tile.first_row + offset : -1;
  };
  // Queries as panels of 64 rows, [half][product][panel].
  for (int i = thread; i < 2 * 2 * kGroupRows * 16; i += S::kConsumers) {
    const int piece = i % 16, r = i / 16 % kGroupRows, m = i / 16 / kGroupRows % 2,
              h = i / 16 / kGroupRows / 2;
    const int query = max(row_of(32 * h + r / 16 * 8 + r % 8), 0), head = 2 * m + r / 8 % 2;
    ptx::cp_async_16(
        queries + static_cast<uint32_t>(((h * 2 + m) * 2 + piece / 8) * kGroupRows * kPanelRowBytes +
                                        r * kPanelRowBytes + ((piece % 8) ^ (r & 7)) * 16),
        static_cast<const __nv_bfloat16*>(p.queries) + query * p.query_row_stride + head * kKeyDim +
            8 * piece);
  }
  ptx::cp_async_commit();
  for (int i = thread; i < kStripQueries * groups; i += S::kConsumers) {
    const int row = max(row_of(i / groups), 0);
    weights[i] = reinterpret_cast<const float4*>(p.weights)[static_cast<int64_t>(row) * groups + i % groups];
  }
  const int local = 32 * half + 8 * (warp % 4) + lane / 4;
  int limit = -1;  // the last key that this thread's query sees
  if (row_of(local) >= 0) {
    const QueryTile tile = tiles[local / p.tile_queries];
    limit = tile.start / p.tile_queries * p.tile_queries + local % p.tile_queries;
  }
  const float base = limit >= 0 ? 0.0f : -INFINITY;
  int32_t first_position = INT32_MAX;
  for (int i = 0; i < tiles_per_strip; ++i)
    if (tiles[i].count > 0) first_position = min(first_position, tiles[i].start);
  ptx::cp_async_wait<0>();
  ptx::fence_for_wgmma();
  ptx::named_barrier(1, S::kConsumers);

  // Those whose maxima make up a tile meet before they are read: the warpgroups of a half, or all.
  const bool both = p.tile_queries == kStripQueries;
  const int barrier = both ? 6 : 6 + half, writers = both ? S::kConsumers : S::kConsumers / 2;
  const int writer = both ? thread : part * kGroupThreads + thread % kGroupThreads;
  const auto write_out = [&](int from, int to) {
    ptx::named_barrier(barrier, writers);
    constexpr int kBlocks = kFlush * kScoreBlocks;
    const int warps = p.tile_queries / 8, pair = p.tile_queries == 16 ? 1 : 0;  // two tiles, not one
    const int first_tile = both ? 0 : half << pair, first_block = from * kScoreBlocks;
    for (int i = writer; i < groups * kBlocks << pair; i += writers) {
      const int b = i % kBlocks, g = i / kBlocks >> pair, tile_in_strip = first_tile + (i / kBlocks & pair);
      const QueryTile tile = tiles[tile_in_strip];
      if (b >= (to - from) * kScoreBlocks || tile.count == 0 ||
          (first_block + b) * kPageTokens >= tile.start + tile.count)
        continue;
      float largest = -INFINITY;
      for (int w = 0; w < warps; ++w)
        largest = fmaxf(
            largest, maxima[((g * kFlush + b / kScoreBlocks) * 8 + tile_in_strip * warps + w) * kScoreBlocks +
                            b % kScoreBlocks]);
      p.scores[((tiles - p.tiles + tile_in_strip) * static_cast<int64_t>(groups) + g) * p.score_stride +
               first_block + b] = largest;
    }
    ptx::named_barrier(barrier, writers);
  };

  const uint32_t own_queries = queries + static_cast<uint32_t>(half) * (kScoreQueryBytes / 2);
  const uint32_t own_keys = keys + static_cast<uint32_t>(part * S::kKeys * kPanelRowBytes);
  float acc[2][S::kKeys / 2];
  if (warpgroup == S::kGroups - 1) ptx::named_barrier_arrive(2, 2 * kGroupThreads);
  int flushed = first_stage;
  for (int n = first_stage; n < end_stage; ++n) {
    const uint32_t k = static_cast<uint32_t>(n - first_stage), place = k % kScoreStages;
    ptx::barrier_wait(full + 8 * place, k / kScoreStages & 1);
    ptx::named_barrier(2 + warpgroup, 2 * kGroupThreads);
    ptx::wgmma_hold(acc[0]);
    ptx::wgmma_hold(acc[1]);
    ptx::wgmma_arrive();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int panel = 0; panel < 2; ++panel) {
        const uint64_t a = ptx::wgmma_operand(
            own_queries + static_cast<uint32_t>((m * 2 + panel) * kGroupRows * kPanelRowBytes));
        const uint64_t b = ptx::wgmma_operand(own_keys + place * kScoreStageBytes +
                                              static_cast<uint32_t>(panel) * kScorePanelBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step)
          multiply_queries(acc[m], ptx::wgmma_advance(a, step), ptx::wgmma_advance(b, step),
                           panel > 0 || step > 0);
      }
    ptx::wgmma_commit();
    ptx::named_barrier_arrive(2 + (warpgroup + 1) % S::kGroups, 2 * kGroupThreads);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(acc[0]);
    ptx::wgmma_hold(acc[1]);
    if (thread % kGroupThreads == 0) ptx::barrier_arrive(empty + 8 * place);

    if constexpr (!kOneGroup)
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < S::kKeys / 2; ++j) acc[m][j] = fmaxf(acc[m][j], 0.0f);
    const int key0 = n * kScoreKeys + part * S::kKeys;
    // Eight numbers at a time: the blocks of one group, or half as many of two.
    const auto mix = [&](auto masked, int g) {
      float largest[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int b = i % S::kBlocks;
        largest[i] = -INFINITY;
        const float4 w = weights[local * groups + min(g + i / S::kBlocks, groups - 1)];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = 4 * (2 * b + e / 2) + e % 2;
          const auto relu = [](float x) { return kOneGroup ? fmaxf(x, 0.0f) : x; };
          float x = fmaf(w.x, relu(acc[0][j]), base);
          x = fmaf(w.y, relu(acc[0][j + 2]), x);
          x = fmaf(w.z, relu(acc[1][j]), x);
          x = fmaf(w.w, relu(acc[1][j + 2]), x);
          if (masked.value && key0 + 16 * b + e / 2 * 8 + lane % 4 * 2 + e % 2 > limit) x = -INFINITY;
          largest[i] = fmaxf(largest[i], x);
        }
      }
      const float mine = warp_maxima(largest);
      const int of = g + lane / S::kBlocks;
      if (lane < 8 && of < groups)
        maxima[((of * kFlush + n - flushed) * 8 + half * 4 + warp % 4) * kScoreBlocks + part * S::kBlocks +
               lane % S::kBlocks] = mine;
    };
    if (key0 + S::kKeys - 1 > first_position)
      for (int g = 0; g < groups; g += S::kParts) mix(std::true_type(), g);
    else
      for (int g = 0; g < groups; g += S::kParts) mix(std::false_type(), g);
    if (n + 1 - flushed == kFlush || n + 1 == end_stage) {
      write_out(flushed, n + 1);
      flushed = n + 1;
    }
  }
}

template <bool kOneGroup>
__global__ void __launch_bounds__(ScoreShape<kOneGroup>::kThreads, 1)
    score_tiles_hopper(const ScoreTilesParams p, const __grid_constant__ CUtensorMap map) {
  const int tiles_per_strip = kStripQueries / p.tile_queries;
  const QueryTile* tiles = p.tiles + static_cast<int64_t>(gridDim.y - 1 - blockIdx.y) * tiles_per_strip;
  int end = 0, sequence = 0;
  for (int i = 0; i < tiles_per_strip; ++i)
    if (tiles[i].count > 0) end = tiles[i].start + tiles[i].count, sequence = tiles[i].sequence;
  const int first_stage = static_cast<int>(blockIdx.x) * kScoreSegment,
            end_stage = min(first_stage + kScoreSegment, (end + kScoreKeys - 1) / kScoreKeys);
  if (first_stage >= end_stage) return;

  __shared__ alignas(8) uint64_t barriers[2 * kScoreStages];
  const uint32_t full = ptx::shared_address(barriers), empty = full + 8 * kScoreStages;
  const uint32_t queries = aligned_shared(), keys = queries + kScoreQueryBytes;
  uint8_t* const rest = ptx::dynamic_shared() + (queries - ptx::shared_address(ptx::dynamic_shared())) +
                        kScoreQueryBytes + kScoreStages * kScoreStageBytes;
  const int groups = kOneGroup ? 1 : p.groups;
  float4* const weights = reinterpret_cast<float4*>(rest);
  float* const maxima = reinterpret_cast<float*>(rest + kStripQueries * 16 * groups);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < kScoreStages; ++i) {
      ptx::barrier_init(full + 8 * i, 1);
      ptx::barrier_init(empty + 8 * i, ScoreShape<kOneGroup>::kGroups);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= ScoreShape<kOneGroup>::kConsumers / 32) {
    ptx::give_registers<24>();
    if (threadIdx.x == ScoreShape<kOneGroup>::kConsumers) {
      const int begin = p.key_begins[sequence];
      for (int n = first_stage; n < end_stage; ++n) {
        const uint32_t k = static_cast<uint32_t>(n - first_stage), place = k % kScoreStages;
        if (k >= kScoreStages) ptx::barrier_wait(empty + 8 * place, (k / kScoreStages & 1) ^ 1);
        ptx::barrier_arrive_expecting(full + 8 * place, kScoreStageBytes);
        for (uint32_t panel = 0; panel < 2; ++panel)
          ptx::copy_box(keys + place * kScoreStageBytes + panel * kScorePanelBytes, map, full + 8 * place,
                        static_cast<int>(panel) * kPanelDims, begin + n * kScoreKeys, 0, 0);
      }
    }
  } else {
    ptx::take_registers<ScoreShape<kOneGroup>::kRegisters>();
    score_strip<kOneGroup>(p, tiles, first_stage, end_stage, queries, keys, full, empty, maxima, weights,
                           warp);
  }
}

#else

template <bool kOneGroup>
__global__ void score_tiles_hopper(const ScoreTilesParams, const __grid_constant__ CUtensorMap) {}

#endif

template <bool kOneGroup>
cudaError_t start_hopper(const ScoreTilesParams& p, cudaStream_t stream) {
  CUtensorMap map;
  const uint64_t size[4] = {kKeyDim, static_cast<uint64_t>(p.key_tokens), 1, 1};
  const int64_t stride[3] = {kKeyDim, p.key_tokens * kKeyDim, p.key_tokens * kKeyDim};
  cudaError_t error = ptx::tensor_map(&map, p.keys, size, stride, kScoreKeys);
  LaunchShape shape;
  shape.shared_bytes = score_shared_bytes(p.groups);
  if (error == cudaSuccess) error = allow_shared_bytes(score_tiles_hopper<kOneGroup>, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  constexpr int64_t kSegmentKeys = kScoreSegment * kScoreKeys;
  shape.grid = dim3(static_cast<unsigned>((p.longest + kSegmentKeys - 1) / kSegmentKeys),
                    static_cast<unsigned>(p.num_tiles / (kStripQueries / p.tile_queries)));
  shape.block = dim3(ScoreShape<kOneGroup>::kThreads);
  return launch(score_tiles_hopper<kOneGroup>, shape, stream, p, map);
}

}  // namespace
}  // namespace spot::kernels
