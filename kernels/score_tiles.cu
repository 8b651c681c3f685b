// Contract: score_tiles.h. Here: the checks, and the portable kernel (compute capability 8.0 and later, keys of each
// head their own, and the tests' emulation); score_tiles_hopper.cuh has the one for 9.0.
//
// Floor: 1,024 FLOP a pair of query and key: at 131,072 tokens, causal, 8.8 TFLOP, 11 ms at the 796 TFLOP/s that a
// large product reaches on an H200; mixing (4 ReLUs, 4 multiply-adds, a maximum) 77 G operations, 2.6 ms, in other
// units. Bytes: the strip's keys come from L2, 256 for 65 kFLOP; scores are written once, 67 MB at that length for
// tiles of 32 queries. No exponentials: a block's score is its largest token's.
//
// Portable kernel. A block of 4 warps takes a strip of 64 queries, 16 a warp, and up to 4,096 keys, 64 a stage (16
// with a key per head), two buffers by cp.async. A warp multiplies its 16 queries by 16 keys for all four heads at
// once, so that a thread mixes them in registers. Grid: [key segments, strips].
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/score_tiles.h"
#if !defined(SPOT_EMULATED)
#include "kernels/score_tiles_hopper.cuh"
#endif

namespace spot::kernels {
namespace {

using Bf16 = __nv_bfloat16;
constexpr int kWarps = 4, kScoreThreadsPortable = 32 * kWarps, kSegmentKeys = 4096;
constexpr int kPieces = kKeyDim / 8;
constexpr uint32_t kRowBytes = kKeyDim * 2, kHeadQueryBytes = kStripQueries * kRowBytes;

template <int kKeyHeads>
struct PortableScore {
  static constexpr int kKeys = kKeyHeads == 1 ? 64 : 16;
  static constexpr uint32_t kHeadBytes = kKeys * kRowBytes, kStageBytes = kKeyHeads * kHeadBytes;
  static constexpr size_t kSharedBytes = kSelectorHeads * kHeadQueryBytes + 2 * kStageBytes;
};

// Piece i of row r lies at place i ^ (r & 7) of the row.
__device__ __forceinline__ uint32_t place(int row, int piece) {
  return static_cast<uint32_t>(row) * kRowBytes + static_cast<uint32_t>((piece ^ (row & 7)) * 16);
}

template <int kKeyHeads>
__global__ void __launch_bounds__(kScoreThreadsPortable) score_tiles_portable(const ScoreTilesParams p) {
  using S = PortableScore<kKeyHeads>;
  const int tiles_per_strip = kStripQueries / p.tile_queries;
  const QueryTile* tiles = p.tiles + static_cast<int64_t>(gridDim.y - 1 - blockIdx.y) * tiles_per_strip;
  int end = 0, sequence = 0;
  for (int i = 0; i < tiles_per_strip; ++i)
    if (tiles[i].count > 0) end = tiles[i].start + tiles[i].count, sequence = tiles[i].sequence;
  const int first_key = static_cast<int>(blockIdx.x) * kSegmentKeys,
            end_key = min(first_key + kSegmentKeys, end);
  if (first_key >= end_key) return;
  const int stages = (end_key - first_key + S::kKeys - 1) / S::kKeys;

  __shared__ float maxima[2][kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const uint32_t queries = ptx::shared_address(ptx::dynamic_shared()),
                 keys = queries + kSelectorHeads * kHeadQueryBytes;
  // The row of the strip's i-th query, or -1 where the batch does not bring it.
  const auto row_of = [&](int i) {
    const QueryTile tile = tiles[i / p.tile_queries];
    const int offset = i % p.tile_queries - tile.start % p.tile_queries;
    return tile.count > 0 && offset >= 0 && offset < tile.count ? tile.first_row + offset : -1;
  };
  constexpr int kStep = kScoreThreadsPortable / kPieces;
  const int piece = thread % kPieces, first_copied = thread / kPieces;
  for (int i = first_copied; i < kStripQueries; i += kStep) {
    const Bf16* from =
        static_cast<const Bf16*>(p.queries) + max(row_of(i), 0) * p.query_row_stride + 8 * piece;
#pragma unroll
    for (int h = 0; h < kSelectorHeads; ++h)
      ptx::cp_async_16(queries + static_cast<uint32_t>(h) * kHeadQueryBytes + place(i, piece),
                       from + h * kKeyDim);
  }
  const int64_t begin = p.key_begins[sequence];
  const auto load_stage = [&](int n) {
    for (int i = first_copied; i < S::kKeys; i += kStep) {
      const int64_t token = min(begin + first_key + n * S::kKeys + i, p.key_tokens - 1);
#pragma unroll
      for (int h = 0; h < kKeyHeads; ++h)
        ptx::cp_async_16(keys + static_cast<uint32_t>(n % 2) * S::kStageBytes +
                             static_cast<uint32_t>(h) * S::kHeadBytes + place(i, piece),
                         static_cast<const Bf16*>(p.keys) + (h * p.key_tokens + token) * kKeyDim + 8 * piece);
    }
  };
  load_stage(0);
  ptx::cp_async_commit();

  int row[2], limit[2];  // of this thread's two queries: their rows, and the last key that each sees
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int local = 16 * warp + lane / 4 + 8 * i;
    const QueryTile tile = tiles[local / p.tile_queries];
    row[i] = row_of(local);
    limit[i] = row[i] < 0 ? -1 : tile.start / p.tile_queries * p.tile_queries + local % p.tile_queries;
  }
  for (int n = 0; n < stages; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (n + 1 < stages) load_stage(n + 1);
    ptx::cp_async_commit();
    const uint32_t stage = keys + static_cast<uint32_t>(n % 2) * S::kStageBytes;
    for (int b = 0; b < S::kKeys / kPageTokens; ++b) {
      float dots[kSelectorHeads][2][4] = {};
#pragma unroll
      for (int step = 0; step < kKeyDim / 16; ++step) {
        uint32_t k[4];
#pragma unroll
        for (int h = 0; h < kSelectorHeads; ++h) {
          if (h < kKeyHeads)
            ptx::ldmatrix_x4(k, stage + static_cast<uint32_t>(h) * S::kHeadBytes +
                                    place(16 * b + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
          uint32_t a[4];
          ptx::ldmatrix_x4(a, queries + static_cast<uint32_t>(h) * kHeadQueryBytes +
                                  place(16 * warp + lane % 16, 2 * step + lane / 16));
          ptx::mma_accumulate<Bf16>(dots[h][0], a, k[0], k[1]);
          ptx::mma_accumulate<Bf16>(dots[h][1], a, k[2], k[3]);
        }
      }
      const int key = first_key + n * S::kKeys + b * kPageTokens;
      for (int g = 0; g < p.groups; ++g) {
        float largest = -INFINITY;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 w =
              reinterpret_cast<const float4*>(p.weights)[static_cast<int64_t>(max(row[i], 0)) * p.groups + g];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int j = 2 * i + e % 2;
            float x = w.x * fmaxf(dots[0][e / 2][j], 0.0f);
            x = fmaf(w.y, fmaxf(dots[1][e / 2][j], 0.0f), x);
            x = fmaf(w.z, fmaxf(dots[2][e / 2][j], 0.0f), x);
            x = fmaf(w.w, fmaxf(dots[3][e / 2][j], 0.0f), x);
            if (key + e / 2 * 8 + lane % 4 * 2 + e % 2 <= limit[i]) largest = fmaxf(largest, x);
          }
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2)
          largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        float* const shared = maxima[g % 2];
        if (lane == 0) shared[warp] = largest;
        __syncthreads();
        if (thread < tiles_per_strip) {
          const QueryTile tile = tiles[thread];
          const int warps = kWarps / tiles_per_strip;
          float of_tile = -INFINITY;
          for (int i = 0; i < warps; ++i) of_tile = fmaxf(of_tile, shared[thread * warps + i]);
          if (tile.count > 0 && key < tile.start + tile.count)
            p.scores[((tiles - p.tiles + thread) * static_cast<int64_t>(p.groups) + g) * p.score_stride +
                     key / kPageTokens] = of_tile;
        }
      }
      if (p.groups % 2 != 0)
        __syncthreads();  // the next block's first maxima would take the last ones' place
    }
  }
}

template <int kKeyHeads>
cudaError_t start_portable(const ScoreTilesParams& p, cudaStream_t stream) {
  using S = PortableScore<kKeyHeads>;
  const auto kernel = score_tiles_portable<kKeyHeads>;
  const cudaError_t error = allow_shared_bytes(kernel, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.longest + kSegmentKeys - 1) / kSegmentKeys),
                    static_cast<unsigned>(p.num_tiles / (kStripQueries / p.tile_queries)));
  shape.block = dim3(kScoreThreadsPortable);
  shape.shared_bytes = S::kSharedBytes;
  return launch(kernel, shape, stream, p);
}

}  // namespace

cudaError_t score_tiles(const ScoreTilesParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* x) { return x != nullptr && reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (p.num_tiles < 0 || (p.tile_queries != 16 && p.tile_queries != 32 && p.tile_queries != 64) ||
      p.num_tiles % (kStripQueries / p.tile_queries) != 0 ||
      (p.key_heads != 1 && p.key_heads != kSelectorHeads) || p.groups < 1 || p.groups > kMaxScoreGroups ||
      p.query_row_stride % 8 != 0 || p.score_stride < (p.longest + kPageTokens - 1) / kPageTokens)
    return cudaErrorInvalidValue;
  if (p.num_tiles == 0 || p.longest <= 0) return cudaSuccess;
  if (!aligned(p.queries) || !aligned(p.weights) || !aligned(p.keys) || p.key_tokens < 1 ||
      p.tiles == nullptr || p.key_begins == nullptr || p.scores == nullptr)
    return cudaErrorInvalidValue;
#if !defined(SPOT_EMULATED)
  bool hopper = false;
  const cudaError_t error = has_warpgroup_products(&hopper);
  if (error != cudaSuccess) return error;
  if (hopper && !p.portable && p.key_heads == 1)
    return p.groups == 1 ? start_hopper<true>(p, stream) : start_hopper<false>(p, stream);
#endif
  return p.key_heads == 1 ? start_portable<1>(p, stream) : start_portable<kSelectorHeads>(p, stream);
}

}  // namespace spot::kernels
