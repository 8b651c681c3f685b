// Contract: attend_tiles.h. Here: the checks, and the portable kernel (compute capability 8.0 and later, and the
// tests' emulation); attend_tiles_hopper.cuh has the one for 9.0.
//
// Floor: 4 head_dim FLOP for every pair of a query head and a listed token: with 4,096 tokens a tile, 32 heads of 128
// dims and L queries 67 MFLOP L, at 131,072 queries 8.8 TFLOP: 11 ms at the 796 TFLOP/s that a large product reaches
// on an H200. Bytes: a listed token is 512 B of keys and values for head_dim 128, read once a tile and KV head: 69 GB
// for tiles of 32 queries at that length, which must come from L2 (neighbouring tiles of a KV head run at the same
// time and list mostly the same blocks); from memory alone they would take 16 ms at 4.3 TB/s.
//
// Portable kernel. A block of 4 warps takes 64 rows, (query, head) pairs of one tile and one KV head, 16 a warp.
// Stages of 64 keys (32 where a head has 256 dims) in two buffers by cp.async; FlashAttention's order of steps.
// Grid: [tiles, Hkv * row blocks].
#include "kernels/attend_tiles.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#if !defined(SPOT_EMULATED)
#include "kernels/attend_tiles_hopper.cuh"
#endif

namespace spot::kernels {
namespace {

constexpr int kWarps = 4, kTileThreadsPortable = 32 * kWarps, kRowsPortable = 16 * kWarps;

template <int kHeadDim>
struct PortableTile {
  static constexpr int kKeys = kHeadDim == 256 ? 32 : 64, kBlocks = kKeys / kPageTokens;
  static constexpr int kPieces = kHeadDim / 8;  // of 16 bytes a row
  static constexpr uint32_t kRowBytes = kHeadDim * 2, kStageBytes = kKeys * kRowBytes;
  static constexpr size_t kSharedBytes = kRowsPortable * kRowBytes + 4 * kStageBytes;
  // Piece i of row r lies at place i ^ (r & 7) of the row.
  static __device__ __forceinline__ uint32_t place(int row, int piece) {
    return static_cast<uint32_t>(row) * kRowBytes + static_cast<uint32_t>((piece ^ (row & 7)) * 16);
  }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kTileThreadsPortable)
    attend_tiles_portable(const AttendTilesParams p, const int row_blocks) {
  using S = PortableTile<kHeadDim>;
  const int index = static_cast<int>(gridDim.x - 1 - blockIdx.x);  // the longest first
  const int kv_head = static_cast<int>(blockIdx.y) / row_blocks,
            first_row = static_cast<int>(blockIdx.y) % row_blocks * kRowsPortable;
  const QueryTile tile = p.tiles[index];
  const int group = p.num_heads / p.num_kv_heads, rows = tile.count * group;
  if (first_row >= rows) return;
  const int64_t list_row =
      static_cast<int64_t>(index) * p.rows_per_tile + (p.rows_per_tile == 1 ? 0 : kv_head);
  const int32_t* list = p.selected + list_row * p.max_selected;
  const int count = p.counts[list_row];
  const int stages = (count + S::kBlocks - 1) / S::kBlocks;
  const int32_t* table = p.page_table + tile.sequence * p.page_table_stride;

  uint8_t* const shared = ptx::dynamic_shared();
  const uint32_t queries = ptx::shared_address(shared), keys = queries + kRowsPortable * S::kRowBytes,
                 values = keys + 2 * S::kStageBytes;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  constexpr int kStep = kTileThreadsPortable / S::kPieces;
  const int piece = thread % S::kPieces, first_copied = thread / S::kPieces;
  const auto load_stage = [&](int n) {
    const uint32_t to = static_cast<uint32_t>(n % 2) * S::kStageBytes;
    for (int key = first_copied; key < S::kKeys; key += kStep) {
      const int block = n * S::kBlocks + key / kPageTokens;
      if (block >= count) break;
      const int64_t from = table[list[block]] * p.page_stride + kv_head * p.head_stride +
                           key % kPageTokens * p.token_stride + 8 * piece;
      ptx::cp_async_16(keys + to + S::place(key, piece), static_cast<const T*>(p.keys) + from);
      ptx::cp_async_16(values + to + S::place(key, piece), static_cast<const T*>(p.values) + from);
    }
  };
  for (int i = first_copied; i < kRowsPortable; i += kStep) {
    const int row = min(first_row + i, rows - 1);
    ptx::cp_async_16(queries + S::place(i, piece),
                     static_cast<const T*>(p.queries) + (tile.first_row + row / group) * p.query_row_stride +
                         (kv_head * group + row % group) * p.query_head_stride + 8 * piece);
  }
  if (stages > 0) load_stage(0);
  ptx::cp_async_commit();

  const int row = 16 * warp + lane / 4;
  int32_t last[2];  // the last key that each of the two rows sees
#pragma unroll
  for (int i = 0; i < 2; ++i) last[i] = tile.start + min(first_row + row + 8 * i, rows - 1) / group;
  const int32_t tile_last = tile.start + tile.count - 1;
  float out[kHeadDim / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const float scale2 = p.scale * 1.4426950408889634f;
  for (int n = 0; n < stages; ++n) {
    const uint32_t stage = static_cast<uint32_t>(n % 2) * S::kStageBytes;
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (n + 1 < stages) load_stage(n + 1);
    ptx::cp_async_commit();
    if (n == stages - 1) {
      // Keys that nobody sees have weight 0; their values, whatever memory holds, must be numbers.
      for (int key = first_copied; key < S::kKeys; key += kStep) {
        const int block = n * S::kBlocks + key / kPageTokens;
        if (block < count && list[block] * kPageTokens + key % kPageTokens <= tile_last) continue;
        *reinterpret_cast<uint4*>(shared + (values - queries) + stage + S::place(key, piece)) =
            make_uint4(0, 0, 0, 0);
      }
      __syncthreads();
    }
    float s[S::kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, queries + S::place(16 * warp + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k,
                         keys + stage + S::place(16 * b + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        ptx::mma_accumulate<T>(s[2 * b], a, k[0], k[1]);
        ptx::mma_accumulate<T>(s[2 * b + 1], a, k[2], k[3]);
      }
    }
    float m[2] = {largest[0], largest[1]};
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
      const int block = n * S::kBlocks + j / 2;
      const int32_t key =
          (block < count ? list[block] * kPageTokens : INT32_MAX - kPageTokens) + j % 2 * 8 + lane % 4 * 2;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (key + e % 2 > last[e / 2]) s[j][e] = -INFINITY;
        m[e / 2] = fmaxf(m[e / 2], s[j][e]);
      }
    }
    float correction[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 1));
      m[i] = fmaxf(m[i], __shfl_xor_sync(0xffffffffu, m[i], 2));
      correction[i] = m[i] == -INFINITY ? 1.0f : ptx::exp2_approx((largest[i] - m[i]) * scale2);
      largest[i] = m[i];
      sum[i] *= correction[i];
    }
    uint32_t weights[S::kBlocks][4];
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = s[j][e] == -INFINITY ? 0.0f : ptx::exp2_approx((s[j][e] - largest[e / 2]) * scale2);
        sum[e / 2] += s[j][e];
      }
      weights[j / 2][j % 2 * 2] = ptx::pack2<T>(s[j][0], s[j][1]);
      weights[j / 2][j % 2 * 2 + 1] = ptx::pack2<T>(s[j][2], s[j][3]);
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[j][e] *= correction[e / 2];
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int j = 0; j < kHeadDim / 16; ++j) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, values + stage + S::place(16 * b + lane % 16, 2 * j + lane / 16));
        ptx::mma_accumulate<T>(out[2 * j], weights[b], v[0], v[1]);
        ptx::mma_accumulate<T>(out[2 * j + 1], weights[b], v[2], v[3]);
      }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int r = first_row + row + 8 * i;
    if (r >= rows) continue;
    const int64_t to =
        static_cast<int64_t>(tile.first_row + r / group) * p.num_heads + kv_head * group + r % group;
    const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    uint32_t* const words = reinterpret_cast<uint32_t*>(static_cast<T*>(p.out) + to * kHeadDim);
#pragma unroll
    for (int j = 0; j < kHeadDim / 8; ++j)
      words[4 * j + lane % 4] = ptx::pack2<T>(out[j][2 * i] * inverse, out[j][2 * i + 1] * inverse);
    if (p.log_sum_exp != nullptr && lane % 4 == 0)
      p.log_sum_exp[to] = total > 0.0f ? largest[i] * p.scale + logf(total) : -INFINITY;
  }
}

template <typename T, int kHeadDim>
cudaError_t start_portable(const AttendTilesParams& p, cudaStream_t stream) {
  using S = PortableTile<kHeadDim>;
  const auto kernel = attend_tiles_portable<T, kHeadDim>;
  const cudaError_t error = allow_shared_bytes(kernel, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int row_blocks =
      (p.tile_queries * (p.num_heads / p.num_kv_heads) + kRowsPortable - 1) / kRowsPortable;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.num_tiles), static_cast<unsigned>(p.num_kv_heads * row_blocks));
  shape.block = dim3(kTileThreadsPortable);
  shape.shared_bytes = S::kSharedBytes;
  return launch(kernel, shape, stream, p, row_blocks);
}

template <typename T, int kHeadDim>
cudaError_t start(const AttendTilesParams& p, cudaStream_t stream) {
#if !defined(SPOT_EMULATED)
  bool hopper = false;
  const cudaError_t error = has_warpgroup_products(&hopper);
  if (error != cudaSuccess) return error;
  if (hopper && !p.portable) return start_hopper<T, kHeadDim>(p, stream);
#endif
  return start_portable<T, kHeadDim>(p, stream);
}

template <typename T>
cudaError_t start(const AttendTilesParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return start<T, 64>(p, stream);
    case 128:
      return start<T, 128>(p, stream);
    case 256:
      return start<T, 256>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t attend_tiles(const AttendTilesParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* x) { return x != nullptr && reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (p.num_tiles < 0 || (p.tile_queries != 16 && p.tile_queries != 32 && p.tile_queries != 64) ||
      p.num_kv_heads < 1 || p.num_heads < 1 || p.num_heads % p.num_kv_heads != 0 || p.max_selected < 0 ||
      p.num_pages < 1 || (p.rows_per_tile != 1 && p.rows_per_tile != p.num_kv_heads))
    return cudaErrorInvalidValue;
  if (p.num_tiles == 0) return cudaSuccess;
  for (const int64_t stride :
       {p.query_row_stride, p.query_head_stride, p.page_stride, p.head_stride, p.token_stride})
    if (stride % 8 != 0) return cudaErrorInvalidValue;
  if (!aligned(p.queries) || !aligned(p.keys) || !aligned(p.values) || !aligned(p.out) ||
      p.tiles == nullptr || p.page_table == nullptr || p.selected == nullptr || p.counts == nullptr)
    return cudaErrorInvalidValue;
  switch (p.type) {
    case DataType::kBf16:
      return start<__nv_bfloat16>(p, stream);
    case DataType::kF16:
      return start<__half>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace spot::kernels
