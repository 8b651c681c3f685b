// mass[r, g, c] = mean over the query heads h of group g of e^(scale q_rh . k_c - logsumexp_rh); contract:
// teacher_mass.h.
//
// A block takes 128 queries by 256 keys (128 keys where a head has 256 dims), adds up all heads'
// probabilities in registers, and writes each number once. Its two warpgroups share the keys of a KV head
// (two buffers: the next head's load meanwhile) and have 64 queries each, of which two buffers again; they
// meet once a KV head. Tensor cores and the exponentials' unit have equal work, so each warpgroup keeps both
// busy: it multiplies 64 x 64 into one set of accumulators while it takes the exponentials of the other.
//
// Floor at L tokens, one layer: L^2 / 2 * 2 * num_heads * head_dim FLOP, the same as a causal QK^T, and
// L^2 / 2 * num_heads exponentials, 16 a clock and SM: at 16384 tokens and 32 heads of 128 dims 1.1 TFLOP
// (1.1 ms at the 989 TFLOP/s of the data sheet) and 4.3 G (1.2 ms at 1.7 GHz), in different units. Tiles come
// from L2: 192 KB for 33.5 MFLOP. kernels/NOTES.md has the whole step.
//
// Grid: [width / 256, rows / 128], one block of 256 threads an SM (193 KB of shared memory). Cards that have less load
// into one buffer of each kind, between the products (97 KB), with the same sums.
#include "kernels/query_strip.cuh"
#include "kernels/teacher_mass.h"

namespace spot::kernels {
namespace {

constexpr int kChunkKeys = 64;  // of one product

template <int kHeadDim>
struct Tile {
  static constexpr int kKeys = mass_chunk(kHeadDim);
  static constexpr int kQueryDims = kHeadDim < 128 ? kHeadDim : 128;  // loaded at once
  static constexpr int kParts = kHeadDim / kQueryDims;
  static constexpr int kChunks = kKeys / kChunkKeys;
  static constexpr uint32_t kKeyBytes = kKeys * kHeadDim * 2, kQueryBytes = kGroupRows * kQueryDims * 2;
  static constexpr size_t shared_bytes(int buffers) {
    return 1024 + static_cast<size_t>(buffers) * (kKeyBytes + 2 * kQueryBytes);
  }
  // Two sets of accumulators take turns, and with several parts each sums up one chunk's.
  static_assert(kChunks % 2 == 0 && (kParts == 1 || kChunks == 2));
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

template <typename T, int kHeadDim, int kBuffers>
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

  // By a shuffle, that the compiler may know it to be one for a warp: operands are named by uniform
  // registers.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kGroupThreads, 0),
            thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const uint32_t keys = aligned_shared();
  const uint32_t queries =
      keys + kBuffers * S::kKeyBytes + static_cast<uint32_t>(warpgroup) * kBuffers * S::kQueryBytes;
  __shared__ int32_t tokens[kTileRows];
  if (threadIdx.x < kTileRows) {
    const int row = min(static_cast<int>(blockIdx.y * kTileRows + threadIdx.x), strip.rows - 1);
    tokens[threadIdx.x] = strip.tokens[row];
  }
  __syncthreads();
  const auto load_keys = [&](int kv_head) {
    const T* head = static_cast<const T*>(p.key) + kv_head * p.key_head_stride;
    copy_panels<S::kKeys, kHeadDim / kPanelDims, kTileThreads>(
        keys + static_cast<uint32_t>(kv_head % kBuffers) * S::kKeyBytes, static_cast<int>(threadIdx.x),
        [&](int row) {
          return head + min(first_token + key_of_row(row), strip.num_tokens - 1) * p.key_token_stride;
        });
  };
  // Stage s: part s % kParts of the dims of query head s / kParts.
  const int stages = p.num_heads * S::kParts;
  const auto load_query = [&](int stage) {
    const T* head = static_cast<const T*>(p.query) + stage / S::kParts * p.query_head_stride +
                    stage % S::kParts * S::kQueryDims;
    copy_panels<kGroupRows, S::kQueryDims / kPanelDims, kGroupThreads>(
        queries + static_cast<uint32_t>(stage % kBuffers) * S::kQueryBytes, thread,
        [&](int row) { return head + tokens[warpgroup * kGroupRows + row] * p.query_token_stride; });
  };
  const auto multiply = [&](float(&products)[32], int stage, int part, int kv_head, int chunk) {
    const uint32_t query = queries + static_cast<uint32_t>(stage % kBuffers) * S::kQueryBytes;
    const uint32_t key = keys + static_cast<uint32_t>(kv_head % kBuffers) * S::kKeyBytes +
                         static_cast<uint32_t>(chunk * kChunkKeys * kPanelRowBytes);
    ptx::wgmma_hold(products);
    ptx::wgmma_arrive();
#pragma unroll
    for (int panel = 0; panel < S::kQueryDims / kPanelDims; ++panel) {
      const uint64_t a =
          ptx::wgmma_operand(query + static_cast<uint32_t>(panel * kGroupRows * kPanelRowBytes));
      const uint64_t b =
          ptx::wgmma_operand(key + static_cast<uint32_t>((part * (S::kQueryDims / kPanelDims) + panel) *
                                                         S::kKeys * kPanelRowBytes));
#pragma unroll
      for (int step = 0; step < kPanelDims / 16; ++step)
        ptx::wgmma_k16<T>(products, ptx::wgmma_advance(a, step), ptx::wgmma_advance(b, step),
                          part > 0 || panel > 0 || step > 0);
    }
    ptx::wgmma_commit();
  };

  const int heads_per_key = p.num_heads / p.num_kv_heads, heads_per_group = p.num_heads / p.groups;
  // Waits for stage `stage`'s operands, the i-th of its KV head, and starts loading those to come: past the
  // barrier every product on the buffers written now has been waited for.
  const auto meet = [&](int stage, int kv_head, int i) {
    if constexpr (kBuffers == 1) {  // brings them itself, when the products before are done
      if (i == 0)
        __syncthreads();
      else
        ptx::named_barrier(1 + warpgroup, kGroupThreads);
      if (i == 0) load_keys(kv_head);
      load_query(stage);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      ptx::fence_for_wgmma();
      if (i == 0)
        __syncthreads();
      else
        ptx::named_barrier(1 + warpgroup, kGroupThreads);
      return;
    }
    // The next KV head's keys, on their way since the head's first stage, may still be at its second.
    i == 1 ? ptx::cp_async_wait<1>() : ptx::cp_async_wait<0>();
    ptx::fence_for_wgmma();
    if (i == 0)
      __syncthreads();
    else
      ptx::named_barrier(1 + warpgroup, kGroupThreads);
    if (stage + 1 < stages) load_query(stage + 1);
    ptx::cp_async_commit();
    if (i == 0) {
      if (kv_head + 1 < p.num_kv_heads) load_keys(kv_head + 1);
      ptx::cp_async_commit();
    }
  };
  constexpr float kLog2E = 1.4426950408889634f;
  const float scale2 = p.scale * kLog2E;
  float products[2][32], logsumexp2[2];
  const auto add = [&](int chunk) {
    ptx::wgmma_hold(products[chunk % 2]);  // not before the products that run beside it have been started
#pragma unroll
    for (int j = 0; j < 32; ++j)
      mass[32 * chunk + j] += ptx::exp2_approx(products[chunk % 2][j] * scale2 - logsumexp2[j / 2 % 2]);
  };
  if constexpr (kBuffers == 2) {
    load_keys(0);
    load_query(0);
    ptx::cp_async_commit();
  }
  int kv_head = 0, head_of_key = 0;
  for (int group = 0; group < p.groups; ++group) {
    // What the first head finds of a head before it: nothing.
    logsumexp2[0] = logsumexp2[1] = INFINITY;
#pragma unroll
    for (int j = 0; j < 32; ++j) products[1][j] = 0.0f;
    for (int head = group * heads_per_group; head < (group + 1) * heads_per_group; ++head) {
      const float* sums = p.logsumexp + head * p.logsumexp_head_stride;
      const int row = static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4;
      const float sum[2] = {sums[tokens[row]], sums[tokens[row + 8]]};
#pragma unroll
      for (int part = 0; part < S::kParts; ++part) {
        const int stage = head * S::kParts + part;
        meet(stage, kv_head, head_of_key * S::kParts + part);
#pragma unroll
        for (int chunk = 0; chunk < S::kChunks; ++chunk) {
          multiply(products[chunk % 2], stage, part, kv_head, chunk);
          // Exponentials of the chunk before.
          if (part == 0 && chunk == 0) {
            add(S::kChunks - 1);
            logsumexp2[0] = sum[0] * kLog2E, logsumexp2[1] = sum[1] * kLog2E;
          } else if (part == S::kParts - 1 && chunk > 0) {
            add(chunk - 1);
          }
          ptx::wgmma_wait_all();
          ptx::wgmma_hold(products[chunk % 2]);
        }
      }
      if (++head_of_key == heads_per_key) head_of_key = 0, ++kv_head;
    }
    add(S::kChunks - 1);
    store_mass<S::kKeys>(p, group, column0, mass);
#pragma unroll
    for (int j = 0; j < S::kKeys / 2; ++j) mass[j] = 0.0f;
  }
}

template <typename T, int kHeadDim>
cudaError_t start(const TeacherMassParams& p, cudaStream_t stream) {
  using S = Tile<kHeadDim>;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int buffers = S::shared_bytes(2) + kOwnSharedBytes <= device.shared_bytes ? 2 : 1;
  const size_t shared_bytes = S::shared_bytes(buffers);
  const auto kernel =
      buffers == 2 ? teacher_mass_kernel<T, kHeadDim, 2> : teacher_mass_kernel<T, kHeadDim, 1>;
  error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel,
                {dim3(tiles(p.strip.width, S::kKeys), tiles(p.strip.rows, kTileRows)), dim3(kTileThreads),
                 shared_bytes},
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
