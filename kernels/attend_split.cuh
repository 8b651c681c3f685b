// Attention of up to 8 query heads of one KV head over one split of a block list, by 4 warps. Used by
// sparse_decode_attention.cu and by the fused decode kernel, which therefore agree bit for bit.
//
// A warp owns whole blocks of 16 tokens: it copies a block's K and V (16 rows each) into its own shared
// memory with cp.async, kStages blocks ahead, and needs no barrier with other warps. Both products are
// mma.m16n8k16 with the query heads as the 8 columns: S^T = K Q^T (tokens are rows), then O^T = V^T P^T (dims
// are rows); P^T comes from S^T by one movmatrix a half. Padding 4 heads to 8 costs nothing that matters: the
// copies do. Rows are stored with their 16-byte chunks XORed by token % 8 (by half of that where a row is 64
// bytes), so that ldmatrix meets no bank twice.
//
// Pages of E4M3 codes (kBytes 1; 2 are numbers of the queries' type): ldmatrix moves pairs of codes, and each
// becomes a float16 in its fragment, exactly. The products are float16 then, whatever the queries: those of
// bfloat16 are divided by a power of two a head, so that the largest of a head is 1 to 2. That power and the
// keys' scale go into the scale of the logits, the values' scale into the last factor.
#pragma once

#include <type_traits>

#include "kernels/ptx.cuh"
#include "kernels/sparse_decode_attention.h"

namespace spot::kernels {

constexpr int kAttendWarps = 4;
constexpr int kHeadTile = 8;  // query heads a pass; groups of up to 16 take two

template <int kHeadDim, int kBytes = 2>
struct AttendShape {
  static constexpr int kRowBytes = kHeadDim * kBytes;
  static constexpr int kTileBytes = kPageTokens * kRowBytes;  // K or V of a block
  static constexpr int kBlockBytes = 2 * kTileBytes;
  static constexpr int kSteps = kHeadDim / 16;
  static constexpr int kOutStride =
      kHeadDim + 4;  // floats from head to head when warps are folded: no bank conflicts
  // Where the 16-byte chunk of a token lies in its row.
  static __device__ __forceinline__ int place(int chunk, int token) {
    return chunk ^ (kRowBytes == 64 ? token / 2 & 3 : token & 7);
  }
};

template <int kHeadDim, int kStages, int kBytes = 2>
struct AttendShared {
  using Shape = AttendShape<kHeadDim, kBytes>;
  // A warp's stages; when the warps are folded, its O instead: [kHeadTile][kOutStride] float32.
  alignas(128) uint8_t tiles[kAttendWarps][kStages][Shape::kBlockBytes];
  uint2 query[Shape::kSteps][32];          // B fragments of Q^T
  float maximum[kAttendWarps][kHeadTile];  // log2 units
  float sum[kAttendWarps][kHeadTile];
  float query_scale[kHeadTile];  // of E4M3 codes: what the fragments were divided by
  static_assert(sizeof(tiles[0]) >= kHeadTile * Shape::kOutStride * sizeof(float));
};

// What the tensor cores multiply.
template <typename T, int kBytes>
using ProductType = std::conditional_t<kBytes == 1, __half, T>;

// What one (sequence, KV head, head tile) reads. Pointers to its own head; strides in bytes.
struct AttendSource {
  const uint16_t* queries;  // [heads, head_dim]
  const uint8_t* keys;
  const uint8_t* values;
  int64_t page_stride, token_stride;
  const float* key_scale;  // null: 1
  int heads;               // 1..8
  int last_entry;          // index of the list's last entry, whose block alone may be partial (lists ascend),
  int last_valid;          // and the tokens of the sequence from that block's start on
  float scale_log2;
};

// Q^T as B fragments into shared memory; a barrier must follow.
template <int kHeadDim>
__device__ __forceinline__ void load_query_fragments(const AttendSource& source, uint2 (*query)[32]) {
#pragma unroll 1
  for (int i = threadIdx.x; i < AttendShape<kHeadDim>::kSteps * 32; i += blockDim.x) {
    const int step = i / 32, head = i % 32 / 4, t = i % 4;
    uint2 v = make_uint2(0, 0);
    if (head < source.heads) {
      const uint32_t* at =
          reinterpret_cast<const uint32_t*>(source.queries + head * kHeadDim + step * 16 + t * 2);
      v = make_uint2(at[0], at[4]);
    }
    query[step][i % 32] = v;
  }
}

// The same for E4M3 codes: float16, and in the order of dims that a lane finds in a word of codes. Of T =
// bfloat16 a head's numbers are divided by the power of two in scale[head].
template <typename T, int kHeadDim>
__device__ __forceinline__ void load_query_fragments_e4m3(const AttendSource& source, uint2 (*query)[32],
                                                          float* scale) {
  constexpr int kFours = kHeadDim / 4, kMost = (kFours + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
#pragma unroll 1
  for (int head = warp; head < kHeadTile; head += warps) {
    uint2 fours[kMost];
    uint32_t largest = 0;  // magnitudes of bfloat16, which order as numbers do
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int at = i * 32 + lane;
      fours[i] = make_uint2(0, 0);
      if (head < source.heads && at < kFours)
        fours[i] = reinterpret_cast<const uint2*>(source.queries + head * kHeadDim)[at];
      largest = max(largest, max(max(fours[i].x & 0x7fff, fours[i].x >> 16 & 0x7fff),
                                 max(fours[i].y & 0x7fff, fours[i].y >> 16 & 0x7fff)));
    }
    if constexpr (!std::is_same_v<T, __half>) {
      const uint32_t exponent = min(max(ptx::reduce_max(largest) >> 7, 1u), 253u);
      const float factor = __uint_as_float((254 - exponent) << 23);
      const auto halves = [factor](uint32_t two) {
        return ptx::pack2<__half>(__uint_as_float(two << 16) * factor,
                                  __uint_as_float(two & 0xffff0000u) * factor);
      };
#pragma unroll
      for (int i = 0; i < kMost; ++i) fours[i] = make_uint2(halves(fours[i].x), halves(fours[i].y));
      if (lane == 0) scale[head] = __uint_as_float(exponent << 23);
    } else if (lane == 0) {
      scale[head] = 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (const int at = i * 32 + lane; at < kFours) query[at / 4][head * 4 + at % 4] = fours[i];
  }
}
template <typename T, int kHeadDim, int kBytes, typename Shared>
__device__ __forceinline__ void load_query(const AttendSource& source, Shared& shared) {
  if constexpr (kBytes == 1)
    load_query_fragments_e4m3<T, kHeadDim>(source, shared.query, shared.query_scale);
  else
    load_query_fragments<kHeadDim>(source, shared.query);
}

// Starts the copies of one block into a warp's stage.
template <int kHeadDim, int kBytes>
__device__ __forceinline__ void copy_block(const AttendSource& source, int64_t page, uint32_t stage,
                                           int lane) {
  using Shape = AttendShape<kHeadDim, kBytes>;
  constexpr int kChunks = Shape::kRowBytes / 16;  // a row
  const uint8_t* key = source.keys + page * source.page_stride;
  const uint8_t* value = source.values + page * source.page_stride;
#pragma unroll 4
  for (int i = 0; i < kPageTokens * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    const int64_t from = row * source.token_stride + chunk * 16;
    const uint32_t to = stage + row * Shape::kRowBytes + Shape::place(chunk, row) * 16;
    ptx::cp_async_16(to, key + from);
    ptx::cp_async_16(to + Shape::kTileBytes, value + from);
  }
}

// Zeroes the values behind a partial block's `valid` tokens: a weight of 0 does not silence a NaN.
template <int kHeadDim, int kBytes>
__device__ __forceinline__ void clear_tail(uint8_t* stage, int valid, int lane) {
  using Shape = AttendShape<kHeadDim, kBytes>;
#pragma unroll 1
  for (int at = valid * Shape::kRowBytes + lane * 16; at < Shape::kTileBytes; at += 32 * 16)
    *reinterpret_cast<uint4*>(stage + Shape::kTileBytes + at) = make_uint4(0, 0, 0, 0);
}

// The running softmax of one warp: maximum and sum of heads 2t and 2t + 1, and O^T.
template <int kHeadDim, int kBytes = 2>
struct WarpAttention {
  using Shape = AttendShape<kHeadDim, kBytes>;
  float maximum[2], sum[2];
  float out[Shape::kSteps][4];

  __device__ __forceinline__ void reset() {
    maximum[0] = maximum[1] = __uint_as_float(0xff800000u);
    sum[0] = sum[1] = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
  }

  // Adds the block in `stage`, of which the first `valid` tokens count (at least one). T is what is multiplied,
  // scale_log2 of the lane's two heads.
  template <typename T>
  __device__ __forceinline__ void add_block(uint32_t stage, const uint2 (*query)[32], int valid,
                                            const float (&scale_log2)[2], int lane) {
    float even[4] = {0.0f, 0.0f, 0.0f, 0.0f}, odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const int row = lane % 16;
#pragma unroll
    for (int i = 0; i < Shape::kRowBytes / 32; ++i) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, stage + row * Shape::kRowBytes + Shape::place(2 * i + lane / 16, row) * 16);
      if constexpr (kBytes == 2) {
        const uint2 b = query[i][lane];
        ptx::mma_accumulate<T>(i % 2 == 0 ? even : odd, a, b.x, b.y);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // dims of one chunk of codes are a product's
          uint32_t numbers[4];
          ptx::e4m3x4_to_halves(a[2 * half], numbers[0], numbers[2]);
          ptx::e4m3x4_to_halves(a[2 * half + 1], numbers[1], numbers[3]);
          const uint2 b = query[2 * i + half][lane];
          ptx::mma_accumulate<T>(half == 0 ? even : odd, numbers, b.x, b.y);
        }
      }
    }
    float logits[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) logits[j] = (even[j] + odd[j]) * scale_log2[j % 2];
    if (valid < kPageTokens) {
      const float minus_infinity = __uint_as_float(0xff800000u);
      if (lane / 4 >= valid) logits[0] = logits[1] = minus_infinity;
      if (lane / 4 + 8 >= valid) logits[2] = logits[3] = minus_infinity;
    }
    float rescale[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float m = fmaxf(logits[j], logits[j + 2]);
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, offset));
      m = fmaxf(m, maximum[j]);
      // A logit that is -infinity everywhere (or a NaN, which fmaxf drops) must not turn into inf - inf.
      const float base = m == __uint_as_float(0xff800000u) ? 0.0f : m;
      rescale[j] = ptx::exp2_approx(maximum[j] - base);
      maximum[j] = m;
      logits[j] = ptx::exp2_approx(logits[j] - base);
      logits[j + 2] = ptx::exp2_approx(logits[j + 2] - base);
      sum[j] = sum[j] * rescale[j] + (logits[j] + logits[j + 2]);
    }
    const uint32_t b0 = ptx::movmatrix_trans(ptx::pack2<T>(logits[0], logits[1]));
    const uint32_t b1 = ptx::movmatrix_trans(ptx::pack2<T>(logits[2], logits[3]));
    const uint32_t value = stage + Shape::kTileBytes;
    const int token = lane % 8 + lane / 16 * 8;
    const auto accumulate = [&](float(&sums)[4], const uint32_t(&a)[4]) {
      sums[0] *= rescale[0], sums[1] *= rescale[1], sums[2] *= rescale[0], sums[3] *= rescale[1];
      ptx::mma_accumulate<T>(sums, a, b0, b1);
    };
#pragma unroll
    for (int i = 0; i < Shape::kRowBytes / 32; ++i) {
      uint32_t a[4];
      ptx::ldmatrix_x4_trans(
          a, value + token * Shape::kRowBytes + Shape::place(2 * i + lane / 8 % 2, token) * 16);
      if constexpr (kBytes == 2) {
        accumulate(out[i], a);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // two tokens' codes of two dims, by tokens; then by dims
          uint32_t numbers[4];
          ptx::e4m3x4_to_halves(__byte_perm(a[half], 0, 0x3120), numbers[0], numbers[1]);
          ptx::e4m3x4_to_halves(__byte_perm(a[half + 2], 0, 0x3120), numbers[2], numbers[3]);
          accumulate(out[2 * i + half], numbers);
        }
      }
    }
  }

  // The dim of out[i][j] in this lane.
  static __device__ __forceinline__ int dim(int i, int j, int lane) {
    return 16 * i + (kBytes == 2 ? lane / 4 + j / 2 * 8 : lane / 4 * 2 + j / 2);
  }

  // Parks the result where the block can fold it: O over the warp's own (idle) stages.
  __device__ __forceinline__ void park(uint8_t* tiles, float* shared_maximum, float* shared_sum, int lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], offset);
    }
    const int t = lane % 4;
    if (lane < 4) {
      shared_maximum[2 * t] = maximum[0], shared_maximum[2 * t + 1] = maximum[1];
      shared_sum[2 * t] = sum[0], shared_sum[2 * t + 1] = sum[1];
    }
    __syncwarp();
    float* o = reinterpret_cast<float*>(tiles);
#pragma unroll
    for (int i = 0; i < Shape::kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[(2 * t + j % 2) * Shape::kOutStride + dim(i, j, lane)] = out[i][j];
  }
};

// One warp's part of a split: entries begin + warp, + 8, ... of [begin, end) of the list. `page_of(i)` gives
// the page of entry i. Leaves the result parked; a barrier must follow before fold_warps.
template <typename T, int kHeadDim, int kStages, int kBytes, typename PageOf>
__device__ __forceinline__ void attend_warp(const AttendSource& source, int begin, int end,
                                            const PageOf& page_of,
                                            AttendShared<kHeadDim, kStages, kBytes>& shared, int warp,
                                            int lane) {
  WarpAttention<kHeadDim, kBytes> state;
  state.reset();
  float scale_log2[2] = {source.scale_log2, source.scale_log2};
  if constexpr (kBytes == 1) {
    const float codes = source.scale_log2 * (source.key_scale == nullptr ? 1.0f : *source.key_scale);
#pragma unroll
    for (int j = 0; j < 2; ++j) scale_log2[j] = codes * shared.query_scale[lane % 4 * 2 + j];
  }
  const int first = begin + warp;
  const int blocks = first < end ? (end - first + kAttendWarps - 1) / kAttendWarps : 0;
  const uint32_t stages = ptx::shared_address(shared.tiles[warp]);
  constexpr int kBlockBytes = AttendShape<kHeadDim, kBytes>::kBlockBytes;
  // The pages of 32 blocks at a time, one a lane, so that their look-up is off the path.
  int window = 0;
  int pages = lane < blocks ? page_of(first + lane * kAttendWarps) : 0;
  const auto copy = [&](int i, int stage) {  // block i of this warp
    if (i - window == 32) {
      window = i;
      pages = i + lane < blocks ? page_of(first + (i + lane) * kAttendWarps) : 0;
    }
    copy_block<kHeadDim, kBytes>(source, __shfl_sync(0xffffffffu, pages, i - window),
                                 stages + stage * kBlockBytes, lane);
  };
  // Block i is copied at turn i and attended to at turn i + kStages: one place in the code for each.
  int stage = 0;
#pragma unroll 1
  for (int i = 0; i < blocks + kStages; ++i) {
    if (i >= kStages) {
      ptx::cp_async_wait<kStages - 1>();
      __syncwarp();
      const int entry = first + (i - kStages) * kAttendWarps;
      const int valid = entry == source.last_entry ? source.last_valid : kPageTokens;
      if (valid < kPageTokens) {
        clear_tail<kHeadDim, kBytes>(shared.tiles[warp][stage], valid, lane);
        __syncwarp();
      }
      state.template add_block<ProductType<T, kBytes>>(stages + stage * kBlockBytes, shared.query, valid,
                                                       scale_log2, lane);
      __syncwarp();
    }
    if (i < blocks) copy(i, stage);
    ptx::cp_async_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncwarp();
  state.park(shared.tiles[warp][0], shared.maximum[warp], shared.sum[warp], lane);
}

// The workspace of partial results: counters, then {maximum, sum}, then O, of every pair (sequence, KV head,
// head tile) and split.
struct SplitWorkspace {
  int64_t pairs;
  int head_dim;
  __host__ __device__ size_t sums_bytes() const {
    return static_cast<size_t>(pairs) * kAttentionSplits * kHeadTile * sizeof(float2);
  }
  __host__ __device__ size_t bytes() const {
    return kCounterBytes + sums_bytes() +
           static_cast<size_t>(pairs) * kAttentionSplits * kHeadTile * head_dim * sizeof(float);
  }
};
__host__ __device__ inline int head_tiles(int num_heads, int num_kv_heads) {
  return (num_heads / num_kv_heads + kHeadTile - 1) / kHeadTile;
}

// Query heads a KV head, and the tiles of up to 8 they are attended in: divided once, by the host.
struct HeadTiling {
  int32_t group, tiles;
};
inline HeadTiling head_tiling(const SparseDecodeAttentionParams& p) {
  return {p.num_heads / p.num_kv_heads, head_tiles(p.num_heads, p.num_kv_heads)};
}

// Which part of the problem a thread block has.
struct SplitPlace {
  int batch_row, kv_head, tile, split;
  int first_head, heads;  // query heads of the tile
  int64_t pair;
  __device__ __forceinline__ SplitPlace(const HeadTiling& tiling, int split, int y, int batch_row)
      : batch_row(batch_row), kv_head(y), tile(0), split(split) {
    if (tiling.tiles > 1) {
      kv_head = y / tiling.tiles;
      tile = y - kv_head * tiling.tiles;
    }
    first_head = kv_head * tiling.group + tile * kHeadTile;
    heads = min(tiling.group - tile * kHeadTile, kHeadTile);
    pair = static_cast<int64_t>(batch_row) * gridDim.y + y;
  }
};
template <int kHeadDim, int kBytes = 2>
__device__ __forceinline__ AttendSource attend_source(const SparseDecodeAttentionParams& p,
                                                      const SplitPlace& place) {
  AttendSource source;
  source.queries = static_cast<const uint16_t*>(p.queries) +
                   (static_cast<int64_t>(place.batch_row) * p.num_heads + place.first_head) * kHeadDim;
  source.keys = static_cast<const uint8_t*>(p.keys) + place.kv_head * p.head_stride * kBytes;
  source.values = static_cast<const uint8_t*>(p.values) + place.kv_head * p.head_stride * kBytes;
  source.page_stride = p.page_stride * kBytes;
  source.token_stride = p.token_stride * kBytes;
  source.key_scale = p.key_scales == nullptr ? nullptr : p.key_scales + place.kv_head * p.key_scale_stride;
  source.heads = place.heads;
  source.scale_log2 = p.scale * 1.4426950408889634f;
  return source;
}

struct CombineShared {
  float factor[kHeadTile][kAttentionSplits];
  int last;
};

// Folds the warps' parked results in order, publishes the split, and in the last of the 16 thread blocks to
// arrive folds the splits in order and writes the output. No block ever waits for another; the counter is
// reset for the next launch. All kThreads threads of the block call it, after a barrier.
template <typename T, int kThreads, int kHeadDim, int kStages, int kBytes>
__device__ __forceinline__ void combine(const SparseDecodeAttentionParams& p, const SplitPlace& place,
                                        const AttendShared<kHeadDim, kStages, kBytes>& shared,
                                        CombineShared& combined) {
  using Shape = AttendShape<kHeadDim, kBytes>;
  const float minus_infinity = __uint_as_float(0xff800000u);
  const SplitWorkspace layout = {static_cast<int64_t>(p.batch) * gridDim.y, kHeadDim};
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  float2* sums =
      reinterpret_cast<float2*>(workspace + kCounterBytes) + place.pair * kAttentionSplits * kHeadTile;
  float4* partial = reinterpret_cast<float4*>(workspace + kCounterBytes + layout.sums_bytes()) +
                    place.pair * kAttentionSplits * kHeadTile * (kHeadDim / 4);
  const int vectors = place.heads * (kHeadDim / 4), tid = threadIdx.x;
#pragma unroll 1
  for (int v = tid; v < vectors; v += kThreads) {
    const int head = v / (kHeadDim / 4), at = head * Shape::kOutStride + v % (kHeadDim / 4) * 4;
    float largest = minus_infinity, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) largest = fmaxf(largest, shared.maximum[w][head]);
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      const float m = shared.maximum[w][head];
      const float factor = m == minus_infinity ? 0.0f : ptx::exp2_approx(m - largest);
      const float4 o =
          *reinterpret_cast<const float4*>(reinterpret_cast<const float*>(shared.tiles[w][0]) + at);
      sum = fmaf(factor, shared.sum[w][head], sum);
      value.x = fmaf(factor, o.x, value.x);
      value.y = fmaf(factor, o.y, value.y);
      value.z = fmaf(factor, o.z, value.z);
      value.w = fmaf(factor, o.w, value.w);
    }
    partial[place.split * kHeadTile * (kHeadDim / 4) + v] = value;
    if (v % (kHeadDim / 4) == 0) sums[place.split * kHeadTile + head] = make_float2(largest, sum);
  }
  __syncthreads();
  if (tid == 0) {
    uint32_t* counter = reinterpret_cast<uint32_t*>(workspace) + place.pair;
    combined.last = ptx::add_acquire_release(counter, 1u) == kAttentionSplits - 1;
    if (combined.last) *counter = 0;
  }
  __syncthreads();
  if (!combined.last) return;

  // The first of a thread's pieces is asked for before the factors are known.
  constexpr int kPiece = kHeadTile * (kHeadDim / 4);
  float4 parts[kAttentionSplits];
  const auto load_parts = [&](int v) {
#pragma unroll
    for (int s = 0; s < kAttentionSplits; ++s) parts[s] = __ldcg(&partial[s * kPiece + v]);
  };
  if (tid < vectors) load_parts(tid);
  const int lane = tid % 32, split = lane % kAttentionSplits;
  constexpr int kWarpsOfBlock = kThreads / 32;
#pragma unroll 1
  for (int head = kWarpsOfBlock - 1 - tid / 32; head < place.heads; head += kWarpsOfBlock) {
    const float2 own = __ldcg(&sums[split * kHeadTile + head]);
    float largest = own.x;
#pragma unroll
    for (int offset = 1; offset < kAttentionSplits; offset *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const float factor = own.x == minus_infinity ? 0.0f : ptx::exp2_approx(own.x - largest);
    float sum = factor * own.y;
#pragma unroll
    for (int offset = 1; offset < kAttentionSplits; offset *= 2)
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    float weight = sum > 0.0f ? factor / sum : sum;
    if constexpr (kBytes == 1)
      if (p.value_scales != nullptr) weight *= p.value_scales[place.kv_head * p.value_scale_stride];
    if (lane < kAttentionSplits) combined.factor[head][split] = weight;
    if (lane == 0 && p.log_sum_exp != nullptr)
      p.log_sum_exp[static_cast<int64_t>(place.batch_row) * p.num_heads + place.first_head + head] =
          sum == 0.0f ? minus_infinity : (largest + log2f(sum)) * 0.6931471805599453f;
  }
  __syncthreads();
  T* out = static_cast<T*>(p.out) +
           (static_cast<int64_t>(place.batch_row) * p.num_heads + place.first_head) * kHeadDim;
#pragma unroll 1
  for (int v = tid; v < vectors; v += kThreads) {
    if (kPiece > kThreads && v != tid) load_parts(v);
    const int head = v / (kHeadDim / 4);
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < kAttentionSplits; ++s) {
      const float factor = combined.factor[head][s];
      value.x = fmaf(factor, parts[s].x, value.x);
      value.y = fmaf(factor, parts[s].y, value.y);
      value.z = fmaf(factor, parts[s].z, value.z);
      value.w = fmaf(factor, parts[s].w, value.w);
    }
    reinterpret_cast<uint2*>(out)[v] =
        make_uint2(ptx::pack2<T>(value.x, value.y), ptx::pack2<T>(value.z, value.w));
  }
}

}  // namespace spot::kernels
