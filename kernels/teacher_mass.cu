// mass[r, g, c] = mean over the query heads h of group g of e^(scale q_rh . k_c - logsumexp_rh); contract:
// teacher_mass.h.
//
// A block takes 128 queries by 256 keys (128 keys where a head has 256 dims), adds up all heads'
// probabilities in registers, and writes each number once. Its two warpgroups share the keys of a KV head
// (two buffers: the next head's load meanwhile) and have 64 queries each, of which two buffers again; they
// meet once a KV head, so that between one's products and the other's exponentials the units are all in use.
// One head at a time, a warpgroup multiplies 64 x 128, then adds 64 x 128 exponentials.
//
// Floor at L tokens, one layer: L^2 / 2 * 2 * num_heads * head_dim FLOP, the same as a causal QK^T, and
// L^2 / 2 * num_heads exponentials, 16 a clock and SM: at 16384 tokens and 32 heads of 128 dims 1.1 TFLOP
// (1.1 ms at the 989 TFLOP/s of the data sheet) and 4.3 G (1.2 ms at 1.7 GHz), in different units. Tiles come
// from L2: 192 KB for 33.5 MFLOP. kernels/NOTES.md has the whole step.
//
// Grid: [width / 256, rows / 128], one block of 256 threads an SM (193 KB of shared memory).
#include "kernels/query_strip.cuh"
#include "kernels/teacher_mass.h"

namespace spot::kernels {
namespace {

constexpr int kChunkKeys = 128;  // of one product

template <int kHeadDim>
struct Tile {
  static constexpr int kKeys = mass_chunk(kHeadDim);
  static constexpr int kQueryDims = kHeadDim < 128 ? kHeadDim : 128;  // loaded at once
  static constexpr int kParts = kHeadDim / kQueryDims;
  static constexpr int kChunks = kKeys / kChunkKeys;
  static constexpr uint32_t kKeyBytes = kKeys * kHeadDim * 2, kQueryBytes = kGroupRows * kQueryDims * 2;
  static constexpr size_t kSharedBytes = 1024 + 2 * kKeyBytes + 2 * 2 * kQueryBytes;
  // Dims are multiplied part after part, so with several parts there must be one set of accumulators.
  static_assert(kParts == 1 || kChunks == 1);
};

// A thread's share of the tile: 8 columns of each of its two rows in every 32. All threads call it together.
template <int kKeys>
__device__ __forceinline__ void store_mass(const TeacherMassParams& p, int group, int column0,
                                           const float (&mass)[kKeys / 2]) {
  const ThreadRows rows = thread_rows(p.strip);  // read here: the products leave no registers for it
  const float share = static_cast<float>(p.groups) / static_cast<float>(p.num_heads);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = static_cast<int64_t>(rows.row[i]) * p.groups + group;
    float* to = p.mass + row * p.strip.width;
    float sum = 0.0f;
#pragma unroll
    for (int block = 0; block < kKeys / 32; ++block) {
      const int column = column0 + 32 * block + threadIdx.x % 4 * 8;
      if (!rows.valid[i] || column >= p.strip.width) continue;
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int32_t token = p.strip.first_key + column + j;
        // Keys that a row does not see were added up as well, to anything.
        values[j] = token >= rows.low[i] && token <= rows.last[i]
                        ? share * mass[16 * block + j / 2 * 4 + 2 * i + j % 2]
                        : 0.0f;
        sum += values[j];
      }
      *reinterpret_cast<float4*>(to + column) = make_float4(values[0], values[1], values[2], values[3]);
      *reinterpret_cast<float4*>(to + column + 4) = make_float4(values[4], values[5], values[6], values[7]);
    }
    sum = quad_sum(sum);
    if (rows.valid[i] && threadIdx.x % 4 == 0) p.chunk_sums[row * gridDim.x + blockIdx.x] = sum;
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kTileThreads, 1) teacher_mass_kernel(const TeacherMassParams p) {
  using S = Tile<kHeadDim>;
  const QueryStrip& strip = p.strip;
  const int column0 = static_cast<int>(blockIdx.x) * S::kKeys;
  const int32_t first_token = strip.first_key + column0;
  float mass[S::kKeys / 2];
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) mass[i] = 0.0f;
  const SeenKeys seen = seen_keys(strip);
  if (first_token >= seen.end || first_token + S::kKeys <= seen.begin) {
    for (int g = 0; g < p.groups; ++g) store_mass<S::kKeys>(p, g, column0, mass);
    return;
  }

  const int warpgroup = static_cast<int>(threadIdx.x) / kGroupThreads,
            thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const uint32_t keys = aligned_shared();
  const uint32_t queries = keys + 2 * S::kKeyBytes + static_cast<uint32_t>(warpgroup) * 2 * S::kQueryBytes;
  const auto load_keys = [&](int kv_head) {
    const T* head = static_cast<const T*>(p.key) + kv_head * p.key_head_stride;
    copy_panels<S::kKeys, kHeadDim / kPanelDims, kTileThreads>(
        keys + static_cast<uint32_t>(kv_head % 2) * S::kKeyBytes, static_cast<int>(threadIdx.x),
        [&](int row) {
          return head + min(first_token + key_of_row(row), strip.num_tokens - 1) * p.key_token_stride;
        });
  };
  // Stage s: part s % kParts of the dims of query head s / kParts.
  const int stages = p.num_heads * S::kParts;
  const int first_row = static_cast<int>(blockIdx.y) * kTileRows + warpgroup * kGroupRows;
  const auto load_query = [&](int stage) {
    if (stage < stages) {
      const T* head = static_cast<const T*>(p.query) + stage / S::kParts * p.query_head_stride +
                      stage % S::kParts * S::kQueryDims;
      copy_panels<kGroupRows, S::kQueryDims / kPanelDims, kGroupThreads>(
          queries + static_cast<uint32_t>(stage % 2) * S::kQueryBytes, thread, [&](int row) {
            return head + strip.tokens[min(first_row + row, strip.rows - 1)] * p.query_token_stride;
          });
    }
    ptx::cp_async_commit();
  };

  const ThreadRows rows = thread_rows(strip);
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale2 = p.scale * kLog2E;
  const int heads_per_key = p.num_heads / p.num_kv_heads, keys_per_group = p.num_kv_heads / p.groups;
  const int stages_per_key = heads_per_key * S::kParts;
  load_keys(0);
  load_query(0);
  for (int kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
    float products[64];
    float logsumexp2[2] = {};
    for (int i = 0; i < stages_per_key; ++i) {
      const int stage = kv_head * stages_per_key + i, part = i % S::kParts;
      if (i == 0) {
        ptx::cp_async_wait<0>();
        ptx::fence_for_wgmma();
        __syncthreads();
      } else {
        // The next KV head's keys, on their way since the first stage, may still be.
        i == 1 ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<0>();
        ptx::fence_for_wgmma();
        ptx::named_barrier(1 + warpgroup, kGroupThreads);
      }
      // Past the barrier every product on the buffers that are written now has been waited for.
      load_query(stage + 1);
      if (i == 0) {
        if (kv_head + 1 < p.num_kv_heads) load_keys(kv_head + 1);
        ptx::cp_async_commit();
      }
      if (part == 0) {
        const float* head = p.logsumexp + (stage / S::kParts) * p.logsumexp_head_stride;
#pragma unroll
        for (int j = 0; j < 2; ++j) logsumexp2[j] = head[rows.token[j]] * kLog2E;
      }
      const uint32_t query = queries + static_cast<uint32_t>(stage % 2) * S::kQueryBytes;
#pragma unroll
      for (int chunk = 0; chunk < S::kChunks; ++chunk) {
        ptx::wgmma_hold(products);
        ptx::wgmma_arrive();
#pragma unroll
        for (int step = 0; step < S::kQueryDims / 16; ++step) {
          const int panel = step / 4;
          const uint64_t a =
              ptx::wgmma_operand(query + static_cast<uint32_t>(panel * kGroupRows * kPanelRowBytes));
          const uint64_t b = ptx::wgmma_operand(
              keys + static_cast<uint32_t>(kv_head % 2) * S::kKeyBytes +
              static_cast<uint32_t>(
                  ((part * (S::kQueryDims / kPanelDims) + panel) * S::kKeys + chunk * kChunkKeys) *
                  kPanelRowBytes));
          ptx::wgmma_k16<T>(products, ptx::wgmma_advance(a, step % 4), ptx::wgmma_advance(b, step % 4),
                            part > 0 || step > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait_all();
        ptx::wgmma_hold(products);
        if (part == S::kParts - 1) {
#pragma unroll
          for (int j = 0; j < 64; ++j)
            mass[64 * chunk + j] += ptx::exp2_approx(products[j] * scale2 - logsumexp2[j / 2 % 2]);
        }
      }
    }
    if ((kv_head + 1) % keys_per_group == 0) {
      store_mass<S::kKeys>(p, kv_head / keys_per_group, column0, mass);
#pragma unroll
      for (int i = 0; i < S::kKeys / 2; ++i) mass[i] = 0.0f;
    }
  }
}

template <typename T, int kHeadDim>
cudaError_t start(const TeacherMassParams& p, cudaStream_t stream) {
  using S = Tile<kHeadDim>;
  const auto kernel = teacher_mass_kernel<T, kHeadDim>;
  const cudaError_t error = allow_shared_bytes(kernel, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel,
                {dim3(tiles(p.strip.width, S::kKeys), tiles(p.strip.rows, kTileRows)), dim3(kTileThreads),
                 S::kSharedBytes},
                stream, p);
}

template <typename T>
cudaError_t start(const TeacherMassParams& p, cudaStream_t stream) {
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

cudaError_t teacher_mass(const TeacherMassParams& p, cudaStream_t stream) {
  if (!is_strip(p.strip) || p.num_heads < 1 || p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0 ||
      p.groups < 1 || p.num_kv_heads % p.groups != 0 ||
      !aligned_rows(p.query, p.query_token_stride, p.query_head_stride) ||
      !aligned_rows(p.key, p.key_token_stride, p.key_head_stride) || p.logsumexp == nullptr ||
      p.mass == nullptr || reinterpret_cast<uintptr_t>(p.mass) % 16 != 0 || p.chunk_sums == nullptr)
    return cudaErrorInvalidValue;
  switch (p.data_type) {
    case DataType::kBf16:
      return start<__nv_bfloat16>(p, stream);
    case DataType::kF16:
      return start<__half>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace spot::kernels
