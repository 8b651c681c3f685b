// Contract: selector_kl.h. Two kernels over the same tiles: `normalize` finds each row's log-sum-exp of
// scores, chunk by chunk of keys; `diverge` computes the scores again, and with them everything else. For the
// sparse loss `normalize` stores the scores, and between the two top_members.h restricts the teacher and
// finds the log-sum-exp.
//
// A block takes 128 queries by a chunk of 512 keys: the queries of all four heads stay in shared memory, keys
// pass in tiles of 64 (32 with a key per head), two buffers. A warpgroup holds the four products of 64
// queries by a tile at once, since a score needs all four and its gradient all four again.
//
// Floor at L tokens, one layer: L^2 / 2 * 2 * 4 * 128 FLOP a kernel, at 16384 tokens 0.14 TFLOP: 0.14 ms at
// the 989 TFLOP/s of the data sheet, twice that as the small operands come out of shared memory. `diverge`
// reads L^2 / 2 * 4 bytes of teacher and writes twice as many: 1.6 GB, 0.5 ms at 3 TB/s.
//
// Grid: [width / 512, rows / 128], one block of 256 threads an SM (161 or 193 KB of shared memory). Cards that have less
// take 64 queries a block, by one warpgroup (97 KB; keys per head then pass through one buffer), with the same sums.
#include "kernels/query_strip.cuh"
#include "kernels/selector_kl.h"
#include "kernels/top_members.h"

namespace spot::kernels {
namespace {

using Bf16 = __nv_bfloat16;
constexpr int kPanels = kKeyDim / kPanelDims;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr uint32_t kQueryHeadBytes = kGroupRows * kKeyDim * 2;
constexpr float kMinusInfinity = -INFINITY;

template <int kKeyHeads, int kGroups>  // kGroups warpgroups
struct Tile {
  static constexpr int kRows = kGroups * kGroupRows, kThreads = kGroups * kGroupThreads;
  static constexpr int kKeys = kKeyHeads == 1 ? 64 : 32, kBuffers = kKeyHeads == 1 || kGroups == 2 ? 2 : 1;
  static constexpr uint32_t kHeadBytes = kKeys * kKeyDim * 2, kKeyBytes = kKeyHeads * kHeadBytes;
  static constexpr size_t kSharedBytes =
      1024 + kGroups * kSelectorHeads * kQueryHeadBytes + kBuffers * kKeyBytes;
};

// log2 of the row's sum over all chunks. The row's four lanes call it together.
__device__ __forceinline__ float combine_chunks(const float* chunks, int count) {
  float largest = kMinusInfinity, sum = 0.0f;
  for (int c = threadIdx.x % 4; c < count; c += 4) largest = fmaxf(largest, chunks[c]);
  largest = quad_max(largest);
  for (int c = threadIdx.x % 4; c < count; c += 4) sum += ptx::exp2_approx(chunks[c] - largest);
  return largest + log2f(quad_sum(sum));
}

// Comparisons and fmaxf drop NaN silently; this does not.
__device__ __forceinline__ float relu(float x) {
  return x < 0.0f ? 0.0f : x;
}

template <int kKeyHeads, bool kDiverge, int kGroups>
__global__ void __launch_bounds__(kGroups* kGroupThreads, 1) selector_kl_kernel(const SelectorKlParams p) {
  using S = Tile<kKeyHeads, kGroups>;
  const QueryStrip& strip = p.strip;
  const int column0 = static_cast<int>(blockIdx.x) * kKlChunk,
            column_end = min(column0 + kKlChunk, strip.width);
  const int num_chunks = static_cast<int>(gridDim.x);
  ThreadRows rows = thread_rows<S::kRows>(strip);
  const int quad = static_cast<int>(threadIdx.x) % 4;

  // The chunk's tiles that some query of the block sees.
  const SeenKeys seen = seen_keys<S::kRows>(strip);
  const int begin = max(seen.begin - strip.first_key, column0),
            end = min(seen.end - strip.first_key, column_end);
  const int first_tile = begin < end ? (begin - column0) / S::kKeys : 0;
  const int end_tile = begin < end ? (end - column0 + S::kKeys - 1) / S::kKeys : 0;

  const int warpgroup = static_cast<int>(threadIdx.x) / kGroupThreads;
  const uint32_t queries =
      aligned_shared() + static_cast<uint32_t>(warpgroup) * kSelectorHeads * kQueryHeadBytes;
  const uint32_t keys = aligned_shared() + kGroups * kSelectorHeads * kQueryHeadBytes;
  const auto load_keys = [&](int tile) {
    const int32_t first = strip.first_key + column0 + tile * S::kKeys;
    for (int head = 0; head < kKeyHeads; ++head)
      copy_panels<S::kKeys, kPanels, S::kThreads>(
          keys + static_cast<uint32_t>(tile % S::kBuffers) * S::kKeyBytes +
              static_cast<uint32_t>(head) * S::kHeadBytes,
          static_cast<int>(threadIdx.x), [&](int row) {
            return static_cast<const Bf16*>(p.key) + head * p.key_head_stride +
                   min(first + key_of_row(row), strip.num_tokens - 1) * p.key_token_stride;
          });
    ptx::cp_async_commit();
  };
  if (first_tile < end_tile) {
    const int first_row = static_cast<int>(blockIdx.y) * S::kRows + warpgroup * kGroupRows;
    for (int head = 0; head < kSelectorHeads; ++head)
      copy_panels<kGroupRows, kPanels, kGroupThreads>(
          queries + static_cast<uint32_t>(head) * kQueryHeadBytes,
          static_cast<int>(threadIdx.x) % kGroupThreads, [&](int row) {
            return static_cast<const Bf16*>(p.query) + head * p.query_head_stride +
                   strip.tokens[min(first_row + row, strip.rows - 1)] * p.query_token_stride;
          });
    load_keys(first_tile);
  }

  float weight[2][kSelectorHeads];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float4 w =
        *reinterpret_cast<const float4*>(p.weight + static_cast<int64_t>(rows.token[i]) * kSelectorHeads);
    weight[i][0] = w.x, weight[i][1] = w.y, weight[i][2] = w.z, weight[i][3] = w.w;
  }
  float largest[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {};  // normalize
  float logsumexp2[2] = {}, share[2] = {1.0f, 1.0f}, cross[2] = {}, entropy[2] = {}, total[2] = {},
        weight_grad[2][kSelectorHeads] = {};  // diverge
  if constexpr (kDiverge)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(rows.row[i], strip.rows - 1);
      logsumexp2[i] = combine_chunks(p.chunk_logsumexp + static_cast<int64_t>(row) * num_chunks, num_chunks);
      if (p.k_train > 0) continue;  // top_members has renormalised the teacher
      const float total = p.total[row];
      share[i] = 1.0f / total;
      if (total < kSmallestMass) rows.last[i] = rows.low[i] - 1;  // sees nothing
    }

  Bf16* const grad = static_cast<Bf16*>(p.dots_grad);
  if (kDiverge && grad != nullptr) {  // columns that no query of the block sees
    for (int i = 0; i < 2; ++i) {
      if (!rows.valid[i]) continue;
      for (int head = 0; head < kSelectorHeads; ++head)
        for (int column = column0 + 8 * quad; column < column_end; column += 32)
          if (const int tile = (column - column0) / S::kKeys; tile < first_tile || tile >= end_tile)
            *reinterpret_cast<uint4*>(grad + rows.row[i] * p.dots_grad_row_stride +
                                      head * p.dots_grad_head_stride + column) = make_uint4(0u, 0u, 0u, 0u);
    }
  }

  for (int tile = first_tile; tile < end_tile; ++tile) {
    ptx::cp_async_wait<0>();
    ptx::fence_for_wgmma();
    __syncthreads();
    // Past the barrier all products on the other buffer have been waited for.
    if (S::kBuffers == 2 && tile + 1 < end_tile) load_keys(tile + 1);
    float dots[kSelectorHeads][S::kKeys / 2];
#pragma unroll
    for (int head = 0; head < kSelectorHeads; ++head) ptx::wgmma_hold(dots[head]);
    ptx::wgmma_arrive();
#pragma unroll
    for (int head = 0; head < kSelectorHeads; ++head)
#pragma unroll
      for (int step = 0; step < kKeyDim / 16; ++step) {
        const uint32_t panel = static_cast<uint32_t>(step / 4);
        const uint64_t a = ptx::wgmma_operand(queries + static_cast<uint32_t>(head) * kQueryHeadBytes +
                                              panel * kGroupRows * kPanelRowBytes);
        const uint64_t b = ptx::wgmma_operand(
            keys + static_cast<uint32_t>(tile % S::kBuffers) * S::kKeyBytes +
            static_cast<uint32_t>(head % kKeyHeads) * S::kHeadBytes + panel * S::kKeys * kPanelRowBytes);
        ptx::wgmma_k16<Bf16>(dots[head], ptx::wgmma_advance(a, step % 4), ptx::wgmma_advance(b, step % 4),
                             step > 0);
      }
    ptx::wgmma_commit();

    const int tile_column = column0 + tile * S::kKeys + 8 * quad;
    float teacher[2][S::kKeys / 32][8];
    if constexpr (kDiverge) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int block = 0; block < S::kKeys / 32; ++block) {
          const int column = tile_column + 32 * block;
          float4 low = {}, high = {};
          if (column < column_end) {
            const float* from =
                p.mass + static_cast<int64_t>(min(rows.row[i], strip.rows - 1)) * strip.width + column;
            low = *reinterpret_cast<const float4*>(from);
            high = *reinterpret_cast<const float4*>(from + 4);
          }
          float(&t)[8] = teacher[i][block];
          t[0] = low.x, t[1] = low.y, t[2] = low.z, t[3] = low.w;
          t[4] = high.x, t[5] = high.y, t[6] = high.z, t[7] = high.w;
        }
    }
    ptx::wgmma_wait_all();
#pragma unroll
    for (int head = 0; head < kSelectorHeads; ++head) ptx::wgmma_hold(dots[head]);
    if (S::kBuffers == 1 && tile + 1 < end_tile) {
      __syncthreads();
      load_keys(tile + 1);
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Element j of block b of row i is accumulator 16 b + 4 (j / 2) + 2 i + j % 2.
      const auto score2 = [&](int element) {
        float score = 0.0f;
#pragma unroll
        for (int head = 0; head < kSelectorHeads; ++head)
          score += weight[i][head] * relu(dots[head][element]);
        return score * kLog2E;
      };
      const auto sees = [&](int column) {
        const int32_t token = strip.first_key + column;
        return token >= rows.low[i] && token <= rows.last[i];
      };
      if constexpr (!kDiverge) {
        float scores[S::kKeys / 4];
        float peak = largest[i];
#pragma unroll
        for (int n = 0; n < S::kKeys / 4; ++n) {
          const int block = n / 8, j = n % 8;
          scores[n] = sees(tile_column + 32 * block + j) ? score2(16 * block + j / 2 * 4 + 2 * i + j % 2)
                                                         : kMinusInfinity;
          peak = fmaxf(peak, scores[n]);
        }
        const float base = peak == kMinusInfinity ? 0.0f : peak;
        sum[i] *= ptx::exp2_approx(largest[i] - base);
#pragma unroll
        for (int n = 0; n < S::kKeys / 4; ++n) sum[i] += ptx::exp2_approx(scores[n] - base);
        largest[i] = peak;
        if (p.scores != nullptr && rows.valid[i]) {
          float* to = p.scores + static_cast<int64_t>(rows.row[i]) * strip.width;
#pragma unroll
          for (int n = 0; n < S::kKeys / 4; n += 4) {
            const int column = tile_column + n / 8 * 32 + n % 8;
            if (column < column_end)
              *reinterpret_cast<float4*>(to + column) =
                  make_float4(scores[n], scores[n + 1], scores[n + 2], scores[n + 3]);
          }
        }
      } else {
#pragma unroll
        for (int block = 0; block < S::kKeys / 32; ++block) {
          const int column = tile_column + 32 * block;
          float dots_grad[kSelectorHeads][8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int element = 16 * block + j / 2 * 4 + 2 * i + j % 2;
            const bool counts = sees(column + j) && !(teacher[i][block][j] < 0.0f);
            const float t = counts ? share[i] * teacher[i][block][j] : 0.0f;
            const float student_log = score2(element) - logsumexp2[i];
            // NaN scores and teachers reach the sums: only keys that do not count are left out.
            const float difference = counts ? ptx::exp2_approx(student_log) - t : 0.0f;
            cross[i] += counts ? t * student_log : 0.0f;
            entropy[i] += t == 0.0f ? 0.0f : t * ptx::log2_approx(t);
            total[i] += t;
#pragma unroll
            for (int head = 0; head < kSelectorHeads; ++head) {
              weight_grad[i][head] += difference * relu(dots[head][element]);
              dots_grad[head][j] = dots[head][element] > 0.0f ? weight[i][head] * difference : 0.0f;
            }
          }
          if (grad == nullptr || !rows.valid[i] || column >= column_end) continue;
#pragma unroll
          for (int head = 0; head < kSelectorHeads; ++head) {
            const float(&g)[8] = dots_grad[head];
            *reinterpret_cast<uint4*>(grad + rows.row[i] * p.dots_grad_row_stride +
                                      head * p.dots_grad_head_stride + column) =
                make_uint4(ptx::pack2<Bf16>(g[0], g[1]), ptx::pack2<Bf16>(g[2], g[3]),
                           ptx::pack2<Bf16>(g[4], g[5]), ptx::pack2<Bf16>(g[6], g[7]));
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t slot = static_cast<int64_t>(rows.row[i]) * num_chunks + blockIdx.x;
    if constexpr (!kDiverge) {
      const float peak = quad_max(largest[i]);
      const float base = peak == kMinusInfinity ? 0.0f : peak;
      const float whole = quad_sum(sum[i] * ptx::exp2_approx(largest[i] - base));
      if (quad == 0 && rows.valid[i]) p.chunk_logsumexp[slot] = base + log2f(whole);
    } else {
      const float log_student = quad_sum(cross[i]) * kLn2, log_teacher = quad_sum(entropy[i]) * kLn2;
      const float values[kKlSums] = {log_teacher - log_student,   log_teacher,
                                     quad_sum(total[i]),          0.0f,
                                     quad_sum(weight_grad[i][0]), quad_sum(weight_grad[i][1]),
                                     quad_sum(weight_grad[i][2]), quad_sum(weight_grad[i][3])};
      if (quad == 0 && rows.valid[i])
        for (int k = 0; k < kKlSums; ++k) p.sums[slot * kKlSums + k] = values[k];
    }
  }
}

template <int kKeyHeads, bool kDiverge, int kGroups>
cudaError_t start(const SelectorKlParams& p, cudaStream_t stream) {
  using S = Tile<kKeyHeads, kGroups>;
  const auto kernel = selector_kl_kernel<kKeyHeads, kDiverge, kGroups>;
  const cudaError_t error = allow_shared_bytes(kernel, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel,
                {dim3(tiles(p.strip.width, kKlChunk), tiles(p.strip.rows, S::kRows)), dim3(S::kThreads),
                 S::kSharedBytes},
                stream, p);
}
template <int kKeyHeads, bool kDiverge>
cudaError_t start(const SelectorKlParams& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  return Tile<kKeyHeads, 2>::kSharedBytes <= device.shared_bytes ? start<kKeyHeads, kDiverge, 2>(p, stream)
                                                                 : start<kKeyHeads, kDiverge, 1>(p, stream);
}

template <int kKeyHeads>
cudaError_t start(const SelectorKlParams& p, cudaStream_t stream) {
  cudaError_t error = start<kKeyHeads, false>(p, stream);
  if (error == cudaSuccess && p.k_train > 0)
    error = top_members({p.strip, p.k_train, p.scores, p.mass, p.chunk_logsumexp,
                         static_cast<int32_t>(tiles(p.strip.width, kKlChunk)), p.entropy},
                        stream);
  return error == cudaSuccess ? start<kKeyHeads, true>(p, stream) : error;
}

}  // namespace

cudaError_t selector_kl(const SelectorKlParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  if (!is_strip(p.strip) || (p.key_heads != 1 && p.key_heads != kSelectorHeads) ||
      !aligned_rows(p.query, p.query_token_stride, p.query_head_stride) ||
      !aligned_rows(p.key, p.key_token_stride, p.key_head_stride) || p.weight == nullptr ||
      !aligned(p.weight) || p.mass == nullptr || !aligned(p.mass) || p.chunk_logsumexp == nullptr ||
      p.sums == nullptr || !aligned(p.dots_grad) ||
      (p.k_train > 0 ? p.scores == nullptr || p.entropy == nullptr : p.total == nullptr) ||
      !aligned(p.scores) || p.dots_grad_row_stride % 8 != 0 || p.dots_grad_head_stride % 8 != 0)
    return cudaErrorInvalidValue;
  return p.key_heads == 1 ? start<1>(p, stream) : start<kSelectorHeads>(p, stream);
}

}  // namespace spot::kernels
