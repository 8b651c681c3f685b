// attend_tiles on compute capability 9.0; included by attend_tiles.cu, whose head has the contract and the floor.
//
// A block of three warpgroups takes 128 rows: (query, head) pairs of one tile and one KV head, 64 for each of the
// first two. A warp of the third, which gives its registers to the others, has the copy engine gather the listed blocks, 128 keys a stage (64 where a head has 256 dims), keys and
// values apart, so that each is there when it is needed and its place free as early as can be. A warpgroup starts
// the products of a stage's keys, then those of the values of the stage before, and makes the one's exponentials
// while the others run.
#pragma once

#include "kernels/ptx_hopper.cuh"
#include "kernels/query_strip.cuh"

namespace spot::kernels {
namespace {

template <int kHeadDim>
struct HopperTile {
  static constexpr int kRows = 128, kThreads = 384, kConsumers = 256;
  static constexpr int kKeys = kHeadDim == 256 ? 64 : 128, kBlocks = kKeys / kPageTokens;
  static constexpr int kStages = kHeadDim == 256 ? 2 : kHeadDim == 128 ? 3 : 4;
  static constexpr int kPanels = kHeadDim / kPanelDims;
  static constexpr int kOutDims = kHeadDim < 128 ? kHeadDim : 128, kOuts = kHeadDim / kOutDims;
  static constexpr uint32_t kQueryBytes = kRows * kHeadDim * 2, kStageBytes = kKeys * kHeadDim * 2,
                            kPanelBytes = kKeys * kPanelRowBytes,
                            kBlockPanelBytes = kPageTokens * kPanelRowBytes;
  static constexpr size_t kSharedBytes = 1024 + kQueryBytes + 2 * kStages * kStageBytes;
};

// Shared memory, by address: operands, and barriers of 8 bytes a stage.
struct TileMemory {
  uint32_t queries, keys, values, full_keys, full_values, empty_keys, empty_values;
};

struct HopperMaps {
  CUtensorMap keys, values;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int kDims, typename T>
__device__ __forceinline__ void multiply_keys(float (&s)[64], uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma_wide<T>(s, a, b, accumulate);
}
template <int kDims, typename T>
__device__ __forceinline__ void multiply_keys(float (&s)[32], uint64_t a, uint64_t b, bool accumulate) {
  ptx::wgmma_k16<T>(s, a, b, accumulate);
}

// One warp: brings the listed blocks' keys and values, stage by stage.
template <int kHeadDim>
__device__ __forceinline__ void gather_stages(const AttendTilesParams& p, const HopperMaps& maps,
                                              const QueryTile& tile, int kv_head, const int32_t* list,
                                              int count, const TileMemory& memory) {
  using S = HopperTile<kHeadDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int32_t* table = p.page_table + tile.sequence * p.page_table_stride;
  const auto page_of = [&](int i) { return i < count ? table[list[i]] : 0; };
  int32_t pages = page_of(lane), next_pages = page_of(32 + lane);
  const int stages = (count + S::kBlocks - 1) / S::kBlocks;
  for (int n = 0; n < stages; ++n) {
    const int first = n * S::kBlocks;
    if (n > 0 && first % 32 == 0) pages = next_pages, next_pages = page_of(first + 32 + lane);
    const int32_t page = __shfl_sync(0xffffffffu, pages, first % 32 + lane % S::kBlocks);
    const int blocks = min(S::kBlocks, count - first);
    const uint32_t place = static_cast<uint32_t>(n % S::kStages),
                   parity = static_cast<uint32_t>(n / S::kStages & 1);
    const auto bring = [&](const CUtensorMap& map, uint32_t to, uint32_t full, uint32_t empty) {
      if (n >= S::kStages) ptx::barrier_wait(empty + 8 * place, parity ^ 1);
      if (lane == 0)
        ptx::barrier_arrive_expecting(full + 8 * place,
                                      static_cast<uint32_t>(blocks) * kPageTokens * kHeadDim * 2);
      __syncwarp();
      if (lane < blocks)
#pragma unroll
        for (int panel = 0; panel < S::kPanels; ++panel)
          ptx::copy_box(to + place * S::kStageBytes + static_cast<uint32_t>(panel) * S::kPanelBytes +
                            static_cast<uint32_t>(lane) * S::kBlockPanelBytes,
                        map, full + 8 * place, panel * kPanelDims, 0, page, kv_head);
      __syncwarp();
    };
    bring(maps.keys, memory.keys, memory.full_keys, memory.empty_keys);
    bring(maps.values, memory.values, memory.full_values, memory.empty_values);
  }
}

// The first two warpgroups: attention of the block's rows.
template <typename T, int kHeadDim>
__device__ __forceinline__ void attend_rows(const AttendTilesParams& p, const QueryTile& tile, int kv_head,
                                            int first_row, const int32_t* list, int count,
                                            const TileMemory& memory, int warp) {
  using S = HopperTile<kHeadDim>;
  const auto [queries, keys, values, full_keys, full_values, empty_keys, empty_values] = memory;
  const int group = p.num_heads / p.num_kv_heads, rows = tile.count * group;
  const int stages = (count + S::kBlocks - 1) / S::kBlocks;
  const int warpgroup = warp / 4, lane = static_cast<int>(threadIdx.x) % 32;
  const T* const query = static_cast<const T*>(p.queries);
  copy_panels<S::kRows, S::kPanels, S::kConsumers>(queries, static_cast<int>(threadIdx.x), [&](int i) {
    const int row = min(first_row + i, rows - 1);
    return query + (tile.first_row + row / group) * p.query_row_stride +
           (kv_head * group + row % group) * p.query_head_stride;
  });
  ptx::cp_async_commit();
  // Stages from `masked` on have keys that some query of the tile does not see.
  int masked;
  {
    const int i = count - 1 - lane;
    const bool own = i >= 0 && list[i] * kPageTokens + kPageTokens - 1 > tile.start;
    masked = (count - __popc(__ballot_sync(0xffffffffu, own))) / S::kBlocks;
  }
  const int row = warpgroup * kGroupRows + warp % 4 * 16 + lane / 4;
  int32_t last[2];  // the last key that each of the two rows sees
#pragma unroll
  for (int i = 0; i < 2; ++i) last[i] = tile.start + min(first_row + row + 8 * i, rows - 1) / group;
  const int32_t tile_last = tile.start + tile.count - 1;
  ptx::cp_async_wait<0>();
  ptx::fence_for_wgmma();
  ptx::named_barrier(1, S::kConsumers);

  float out[S::kOuts][S::kOutDims / 2], largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
  for (int o = 0; o < S::kOuts; ++o)
#pragma unroll
    for (int i = 0; i < S::kOutDims / 2; ++i) out[o][i] = 0.0f;
  float s[S::kKeys / 2];
  uint32_t weights[S::kKeys / 16][4];
  const float scale2 = p.scale * 1.4426950408889634f;
  const uint32_t own_queries = queries + static_cast<uint32_t>(warpgroup * kGroupRows * kPanelRowBytes);

  const auto start_keys = [&](int n) {
    const uint32_t place = static_cast<uint32_t>(n % S::kStages);
    ptx::barrier_wait(full_keys + 8 * place, static_cast<uint32_t>(n / S::kStages & 1));
    ptx::wgmma_hold(s);
    ptx::wgmma_arrive();
#pragma unroll
    for (int panel = 0; panel < S::kPanels; ++panel) {
      const uint64_t a =
          ptx::wgmma_operand(own_queries + static_cast<uint32_t>(panel * S::kRows * kPanelRowBytes));
      const uint64_t b =
          ptx::wgmma_operand(keys + place * S::kStageBytes + static_cast<uint32_t>(panel) * S::kPanelBytes);
#pragma unroll
      for (int step = 0; step < 4; ++step)
        multiply_keys<kHeadDim, T>(s, ptx::wgmma_advance(a, step), ptx::wgmma_advance(b, step),
                                   panel > 0 || step > 0);
    }
    ptx::wgmma_commit();
  };
  const auto start_values = [&](int n) {
    const uint32_t place = static_cast<uint32_t>(n % S::kStages);
    const uint32_t stage = values + place * S::kStageBytes;
    ptx::barrier_wait(full_values + 8 * place, static_cast<uint32_t>(n / S::kStages & 1));
    // Keys that nobody sees have weight 0; their values, whatever memory holds, must be numbers.
    if (n == stages - 1 &&
        (count % S::kBlocks != 0 || list[count - 1] * kPageTokens + kPageTokens - 1 > tile_last)) {
      for (int i = static_cast<int>(threadIdx.x); i < S::kKeys * S::kPanels; i += S::kConsumers) {
        const int key = i % S::kKeys, block = n * S::kBlocks + key / kPageTokens;
        if (block < count && list[block] * kPageTokens + key % kPageTokens <= tile_last) continue;
        const uint32_t at = stage + static_cast<uint32_t>(i / S::kKeys) * S::kPanelBytes +
                            static_cast<uint32_t>(key * kPanelRowBytes);
#pragma unroll
        for (uint32_t piece = 0; piece < 8; ++piece)
          asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at + 16 * piece), "r"(0) : "memory");
      }
      ptx::fence_for_wgmma();
      ptx::named_barrier(1, S::kConsumers);
    }
#pragma unroll
    for (int o = 0; o < S::kOuts; ++o) ptx::wgmma_hold(out[o]);
    ptx::wgmma_arrive();
#pragma unroll
    for (int step = 0; step < S::kKeys / 16; ++step)
#pragma unroll
      for (int o = 0; o < S::kOuts; ++o)
        ptx::wgmma_registers<T>(
            out[o], weights[step],
            ptx::wgmma_rows_operand(
                stage + static_cast<uint32_t>(o) * (S::kOutDims / kPanelDims) * S::kPanelBytes +
                    static_cast<uint32_t>(step * 16 * kPanelRowBytes),
                S::kPanelBytes),
            true);
    ptx::wgmma_commit();
  };
  // s becomes its exponentials; returns what the sums so far are to be multiplied by.
  float correction[2];
  const auto soften = [&](int n) {
    if (n >= masked) {
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
        const int i = n * S::kBlocks + b;
        const int32_t first = i < count ? list[i] * kPageTokens : INT32_MAX - kPageTokens;
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (first + e / 4 * 8 + lane % 4 * 2 + e % 2 > last[e / 2 % 2]) s[8 * b + e] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float m = s[2 * i];
#pragma unroll
      for (int j = 0; j < S::kKeys / 8; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * i], s[4 * j + 2 * i + 1]));
      m = fmaxf(largest[i], quad_max(m));
      correction[i] = m == -INFINITY ? 1.0f : ptx::exp2_approx((largest[i] - m) * scale2);
      largest[i] = m;
      const float shift = m == -INFINITY ? 0.0f : m * scale2;
      float partial = 0.0f;
#pragma unroll
      for (int j = 0; j < S::kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * j + 2 * i + e];
          x = ptx::exp2_approx(x * scale2 - shift);
          partial += x;
        }
      sum[i] = sum[i] * correction[i] + partial;
    }
  };
  const auto pack = [&]() {
#pragma unroll
    for (int step = 0; step < S::kKeys / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[step][i] = ptx::pack2<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
  };
  const auto rescale = [&]() {
#pragma unroll
    for (int o = 0; o < S::kOuts; ++o)
#pragma unroll
      for (int j = 0; j < S::kOutDims / 2; ++j) out[o][j] *= correction[j / 2 % 2];
  };
  const auto release = [&](uint32_t empty, int n) {
    if (threadIdx.x % kGroupThreads == 0)
      ptx::barrier_arrive(empty + 8 * static_cast<uint32_t>(n % S::kStages));
  };

  if (stages > 0) {
    start_keys(0);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(s);
    release(empty_keys, 0);
    soften(0);
    pack();
    for (int n = 1; n < stages; ++n) {
      start_keys(n);
      start_values(n - 1);
      ptx::wgmma_wait<1>();
      ptx::wgmma_hold(s);
      release(empty_keys, n);
      soften(n);
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int o = 0; o < S::kOuts; ++o) ptx::wgmma_hold(out[o]);
      release(empty_values, n - 1);
      rescale();
      pack();
    }
    start_values(stages - 1);
    ptx::wgmma_wait<0>();
#pragma unroll
    for (int o = 0; o < S::kOuts; ++o) ptx::wgmma_hold(out[o]);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = quad_sum(sum[i]);
    const int r = first_row + row + 8 * i;
    if (r >= rows) continue;
    const int64_t to =
        static_cast<int64_t>(tile.first_row + r / group) * p.num_heads + kv_head * group + r % group;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    uint32_t* const words = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + to * kHeadDim);
#pragma unroll
    for (int o = 0; o < S::kOuts; ++o)
#pragma unroll
      for (int j = 0; j < S::kOutDims / 8; ++j)
        words[(o * S::kOutDims + 8 * j) / 2 + lane % 4] =
            ptx::pack2<T>(out[o][4 * j + 2 * i] * inverse, out[o][4 * j + 2 * i + 1] * inverse);
    if (p.log_sum_exp != nullptr && lane % 4 == 0)
      p.log_sum_exp[to] = total > 0.0f ? largest[i] * p.scale + logf(total) : -INFINITY;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(384, 1)
    attend_tiles_hopper(const AttendTilesParams p, const __grid_constant__ HopperMaps maps,
                        const int row_blocks) {
  using S = HopperTile<kHeadDim>;
  const int index = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // the longest first
  const int kv_head = static_cast<int>(blockIdx.y) / row_blocks,
            first_row = static_cast<int>(blockIdx.y) % row_blocks * S::kRows;
  const QueryTile tile = p.tiles[index];
  const int group = p.num_heads / p.num_kv_heads, rows = tile.count * group;
  if (first_row >= rows) return;
  const int64_t list_row =
      static_cast<int64_t>(index) * p.rows_per_tile + (p.rows_per_tile == 1 ? 0 : kv_head);
  const int32_t* list = p.selected + list_row * p.max_selected;
  const int count = p.counts[list_row];

  __shared__ alignas(8) uint64_t barriers[4 * S::kStages];
  TileMemory memory;
  memory.full_keys = ptx::shared_address(barriers), memory.full_values = memory.full_keys + 8 * S::kStages;
  memory.empty_keys = memory.full_values + 8 * S::kStages,
  memory.empty_values = memory.empty_keys + 8 * S::kStages;
  memory.queries = aligned_shared(), memory.keys = memory.queries + S::kQueryBytes;
  memory.values = memory.keys + S::kStages * S::kStageBytes;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(memory.full_keys + 8 * i, 1);
      ptx::barrier_init(memory.full_values + 8 * i, 1);
      ptx::barrier_init(memory.empty_keys + 8 * i, 2);
      ptx::barrier_init(memory.empty_values + 8 * i, 2);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  // By a shuffle, that the compiler may know it to be one for a warp.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 8) {
    ptx::give_registers<24>();
    if (warp == 8) gather_stages<kHeadDim>(p, maps, tile, kv_head, list, count, memory);
  } else {
    ptx::take_registers<240>();
    attend_rows<T, kHeadDim>(p, tile, kv_head, first_row, list, count, memory, warp);
  }
}

#else

template <typename T, int kHeadDim>
__global__ void attend_tiles_hopper(const AttendTilesParams, const __grid_constant__ HopperMaps, const int) {}

#endif

template <typename T, int kHeadDim>
cudaError_t start_hopper(const AttendTilesParams& p, cudaStream_t stream) {
  using S = HopperTile<kHeadDim>;
  const auto kernel = attend_tiles_hopper<T, kHeadDim>;
  HopperMaps maps;
  const uint64_t size[4] = {kHeadDim, kPageTokens, static_cast<uint64_t>(p.num_pages),
                            static_cast<uint64_t>(p.num_kv_heads)};
  const int64_t stride[3] = {p.token_stride, p.page_stride, p.head_stride};
  cudaError_t error = ptx::tensor_map(&maps.keys, p.keys, size, stride, kPageTokens);
  if (error == cudaSuccess) error = ptx::tensor_map(&maps.values, p.values, size, stride, kPageTokens);
  if (error == cudaSuccess) error = allow_shared_bytes(kernel, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int row_blocks = (p.tile_queries * (p.num_heads / p.num_kv_heads) + S::kRows - 1) / S::kRows;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.num_tiles), static_cast<unsigned>(p.num_kv_heads * row_blocks));
  shape.block = dim3(S::kThreads);
  shape.shared_bytes = S::kSharedBytes;
  return launch(kernel, shape, stream, p, maps, row_blocks);
}

}  // namespace
}  // namespace spot::kernels
