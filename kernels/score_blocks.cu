// Contract: score_blocks.h.
//
// Floor (bytes): key_bytes(format) * key_heads a token: 9.4 MB for shared INT4 at 128K, 3.1 us at 3.03 TB/s;
// per-head INT4 37.7 MB, 12.5 us; bf16 33.6 and 134 MB. FLOP: 1024 a token, nothing.
//
// Schedule. A warp owns whole blocks of 16 tokens: the tokens are the 16 rows of mma.m16n8k16, the columns
// 0-3 are the four selector heads and the columns 4-7 what rounding the queries to 16 bits left over (zero
// for bf16 and f16 models, and then skipped at the end). cp.async brings whole pages into the warp's own
// shared memory, up to two items ahead; pages are stored in fragment order, so a lane reads 16-byte pieces
// without conflict or shuffle. (Pages loaded straight into registers were slower: the query's load shares
// their scoreboard, so that nothing could begin before the last page had come. The bulk copy engine was
// slower: a warp's lanes hand it their pages one after the other.) At 128K and batch 1 a warp's whole work is
// one item, asked for at once.
//
// Decoding. A 4-bit integer left in bits 0-3 or 4-7 of a float16 IS the subnormal n 2^-24 or n 2^-20, which
// tensor cores multiply exactly; the 1/16 goes into the query, the zero point into the initial accumulator.
// E2M1 bits moved to bits 15 and 11-9 are its value times 2^-14. The powers of two are undone in the weights,
// as ReLU lets them through. Group scales multiply each group's partial dot in float32, before the ReLU. With
// per-head keys, head h's page is multiplied by all columns and column h is kept: the padding is free.
//
// Grid: up to 4 blocks of 4 warps a multiprocessor, striding over items of kWarps * kUnits blocks (kWarps
// with per-head keys).
#include <algorithm>
#include <type_traits>

#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/score_blocks.h"
#include "kernels/selector_key_math.h"

namespace spot::kernels {
namespace {

constexpr int kWarps = 4;
constexpr int kSteps = kKeyDim / 16;  // k steps of an mma
constexpr uint32_t kAll = 0xffffffffu;

// Registers of one page of one head: a lane's codes, and the scales of tokens lane / 4 and lane / 4 + 8.
template <KeyFormat kFormat>
struct PageRegisters {
  static constexpr int kChunks = page_code_bytes(kFormat) / 512;
  uint4 codes[kChunks];
  uint4 scales;  // mxfp4 uses x and y only

  __device__ __forceinline__ void load(const uint8_t* page, int lane) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) codes[i] = reinterpret_cast<const uint4*>(page)[i * 32 + lane];
    const uint8_t* at = page + page_code_bytes(kFormat);
    if constexpr (kFormat == KeyFormat::mxfp4) {
      const uint2 two = reinterpret_cast<const uint2*>(at)[lane / 4];
      scales = make_uint4(two.x, two.y, 0, 0);
    } else if constexpr (kFormat != KeyFormat::bf16) {
      scales = reinterpret_cast<const uint4*>(at)[lane / 4];
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& c = codes[i / 4];
    return i % 4 == 0 ? c.x : i % 4 == 1 ? c.y : i % 4 == 2 ? c.z : c.w;
  }
  // The mma A fragment of k step s.
  __device__ __forceinline__ void fragment(int s, uint32_t (&a)[4]) const {
    if constexpr (kFormat == KeyFormat::bf16) {
      a[0] = codes[s].x, a[1] = codes[s].y, a[2] = codes[s].z, a[3] = codes[s].w;
    } else if constexpr (kFormat == KeyFormat::int8) {
      const uint32_t first = word(2 * s), second = word(2 * s + 1);
      a[0] = __byte_perm(first, 0, 0x4140), a[2] = __byte_perm(first, 0, 0x4342);
      a[1] = __byte_perm(second, 0, 0x4140), a[3] = __byte_perm(second, 0, 0x4342);
    } else if constexpr (kFormat == KeyFormat::int4) {
      const uint32_t x = word(s), y = x >> 8;
      a[0] = x & 0x000f000fu, a[2] = x & 0x00f000f0u;
      a[1] = y & 0x000f000fu, a[3] = y & 0x00f000f0u;
    } else {
      const uint32_t x = word(s);
      a[1] = x & 0x8e008e00u;
      a[0] = (x << 8) & 0x8e008e00u;
      a[3] = ((x >> 3) & 0x0e000e00u) | ((x << 7) & 0x80008000u);
      a[2] = ((x << 5) & 0x0e000e00u) | ((x << 15) & 0x80008000u);
    }
  }
  // Scales of group j for the two tokens.
  __device__ __forceinline__ float2 scale(int j) const {
    if constexpr (kFormat == KeyFormat::mxfp4) {
      const auto get = [j](uint32_t x) {
        return __uint_as_float((j == 0   ? x << 23
                                : j == 1 ? x << 15
                                : j == 2 ? x << 7
                                         : x >> 1) &
                               0x7f800000u);
      };
      return make_float2(get(scales.x), get(scales.y));
    } else if constexpr (kFormat == KeyFormat::nvfp4) {
      const uint32_t low = j / 4 == 0 ? scales.x : scales.y, high = j / 4 == 0 ? scales.z : scales.w;
      const float2 a = ptx::e4m3x2_to_float2(low >> (j % 4 / 2 * 16)),
                   b = ptx::e4m3x2_to_float2(high >> (j % 4 / 2 * 16));
      return j % 2 == 0 ? make_float2(a.x, b.x) : make_float2(a.y, b.y);
    } else {
      const uint32_t low = j / 2 == 0 ? scales.x : scales.y, high = j / 2 == 0 ? scales.z : scales.w;
      const auto get = [j](uint32_t x) { return __uint_as_float(j % 2 == 0 ? x << 16 : x & 0xffff0000u); };
      return make_float2(get(low), get(high));
    }
  }
};

// What the four warps of a block prepare together for one row: the query as mma B fragments, and what undoes
// the number tricks. Warp h prepares head h: column h, and column h + 4 with what rounding to 16 bits left
// over.
template <KeyFormat kFormat>
struct SharedQuery {
  using Type = std::conditional_t<kFormat == KeyFormat::bf16, __nv_bfloat16, __half>;
  static constexpr bool kInteger = kFormat == KeyFormat::int8 || kFormat == KeyFormat::int4;
  static constexpr int kZeros = kInteger ? num_groups(kFormat) : 1;
  uint2 fragments[kSteps][32];  // [k step][lane = 4 column + t]
  float zero[kZeros][8];        // -zero point * sum of the group's query, a column
  float weight[kSelectorHeads];
  int remainder[kSelectorHeads];  // whether column h + 4 holds anything

  // A lane's share of a head, in memory's type.
  struct Raw {
    uint2 lower, upper;
    float weight;
    __device__ __forceinline__ void load(const ScoreBlocksParams& p, int row, int head, int lane) {
      const int64_t first = (static_cast<int64_t>(row) * kSelectorHeads + head) * kKeyDim;
      if (p.query_type == DataType::kF32) {
        const float* at = static_cast<const float*>(p.queries) + first;
        lower = *reinterpret_cast<const uint2*>(at + lane_dim(lane, 0));
        upper = *reinterpret_cast<const uint2*>(at + lane_dim(lane, 2));
      } else {
        const uint16_t* at = static_cast<const uint16_t*>(p.queries) + first;
        lower.x = *reinterpret_cast<const uint32_t*>(at + lane_dim(lane, 0));
        upper.x = *reinterpret_cast<const uint32_t*>(at + lane_dim(lane, 2));
      }
      weight = p.weights[row * kSelectorHeads + head];
    }
  };

  __device__ __forceinline__ void prepare(const ScoreBlocksParams& p, const Raw& raw, int head, int lane) {
    const int step = lane / 4, t = lane % 4;
    const float2 q0 = two_floats(p.query_type, raw.lower), q1 = two_floats(p.query_type, raw.upper);
    const float q[4] = {q0.x, q0.y, q1.x, q1.y};
    // The head times a power of two that brings its largest number to [2^14, 2^15): float16's best range.
    int exponent = 127;  // biased
    if constexpr (kFormat != KeyFormat::bf16) {
      const float largest = fmaxf(fmaxf(fabsf(q[0]), fabsf(q[1])), fmaxf(fabsf(q[2]), fabsf(q[3])));
      const int top = static_cast<int>(ptx::reduce_max(__float_as_uint(largest)) >> 23);
      exponent = min(127 + 14 + 127 - top, 253);
    }
    const float factor = __uint_as_float(static_cast<uint32_t>(exponent) << 23);
    float main[4], rest[4], main_sum = 0.0f, rest_sum = 0.0f;
    bool any = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float scaled = q[i] * factor;
      main[i] = to_float(ptx::from_float<Type>(scaled));
      rest[i] = to_float(ptx::from_float<Type>(scaled - main[i]));
      main_sum += main[i];
      rest_sum += rest[i];
      any = any || rest[i] != 0.0f;
    }
    constexpr float kUpper = kFormat == KeyFormat::int4 ? 0.0625f : 1.0f;
    fragments[step][head * 4 + t] =
        make_uint2(ptx::pack2<Type>(main[0], main[1]), ptx::pack2<Type>(main[2] * kUpper, main[3] * kUpper));
    fragments[step][(head + 4) * 4 + t] =
        make_uint2(ptx::pack2<Type>(rest[0], rest[1]), ptx::pack2<Type>(rest[2] * kUpper, rest[3] * kUpper));
    if constexpr (kInteger) {
      constexpr float kZeroPoint = (kFormat == KeyFormat::int8 ? -128.0f : -8.0f) / 16777216.0f;
#pragma unroll
      for (int offset = 1; offset < 8; offset *= 2) {  // a group is 8 neighbouring lanes
        main_sum += __shfl_xor_sync(kAll, main_sum, offset);
        rest_sum += __shfl_xor_sync(kAll, rest_sum, offset);
      }
      if (lane % 8 == 0) {
        zero[lane / 8][head] = kZeroPoint * main_sum;
        zero[lane / 8][head + 4] = kZeroPoint * rest_sum;
      }
    }
    any = __any_sync(kAll, any);
    if (lane == 0) {
      constexpr int kCodeShift = kInteger ? 24 : kFormat == KeyFormat::bf16 ? 0 : 14;
      const float w = raw.weight * (kFormat == KeyFormat::nvfp4 ? p.global_scale : 1.0f);
      weight[head] = ldexpf(w, kCodeShift + 127 - exponent);
      remainder[head] = any ? 1 : 0;
    }
  }
  static __device__ __forceinline__ float2 two_floats(DataType type, const uint2& bits) {
    if (type == DataType::kF32) return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
    if (type == DataType::kBf16)
      return make_float2(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u));
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(bits.x);
    raw.y = static_cast<unsigned short>(bits.x >> 16);
    return __half22float2(__half2(raw));
  }
  static __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
  static __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
};

// A lane's part of it.
template <KeyFormat kFormat>
struct QueryRegisters {
  using Shared = SharedQuery<kFormat>;
  uint2 b[kSteps];
  float zero[Shared::kZeros][2];  // of columns 2t and 2t + 1
  float weight[2];                // of heads 2t % 4 and 2t % 4 + 1
  bool remainder;

  __device__ __forceinline__ void load(const Shared& shared, int lane) {
    const int t = lane % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) b[s] = shared.fragments[s][lane];
#pragma unroll
    for (int j = 0; j < Shared::kZeros; ++j) {
      zero[j][0] = Shared::kInteger ? shared.zero[j][2 * t] : 0.0f;
      zero[j][1] = Shared::kInteger ? shared.zero[j][2 * t + 1] : 0.0f;
    }
    weight[0] = shared.weight[2 * t % 4];
    weight[1] = shared.weight[2 * t % 4 + 1];
    remainder = (shared.remainder[0] | shared.remainder[1] | shared.remainder[2] | shared.remainder[3]) != 0;
  }
};

// dots[i]: row lane / 4 (+ 8 for i >= 2), column 2t + i % 2: the page's keys times the query columns, scales
// applied.
template <KeyFormat kFormat>
__device__ __forceinline__ void page_dots(const PageRegisters<kFormat>& page,
                                          const QueryRegisters<kFormat>& q, float (&dots)[4]) {
  using Shared = SharedQuery<kFormat>;
  using Type = typename Shared::Type;
  constexpr int kGroups = num_groups(kFormat), kStepsPerGroup = kSteps / kGroups;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    float part[4];
    const float zero0 = q.zero[Shared::kInteger ? j : 0][0];
    const float zero1 = q.zero[Shared::kInteger ? j : 0][1];
#pragma unroll
    for (int i = 0; i < kStepsPerGroup; ++i) {
      const int s = j * kStepsPerGroup + i;
      uint32_t a[4];
      page.fragment(s, a);
      if (i == 0)
        ptx::mma_m16n8k16<Type>(part, a, q.b[s].x, q.b[s].y, zero0, zero1, zero0, zero1);
      else
        ptx::mma_accumulate<Type>(part, a, q.b[s].x, q.b[s].y);
    }
    if constexpr (kFormat == KeyFormat::bf16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[i] = part[i];
    } else {
      const float2 scale = page.scale(j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = i < 2 ? scale.x : scale.y;
        dots[i] = j == 0 ? factor * part[i] : fmaf(factor, part[i], dots[i]);
      }
    }
  }
}

// The block's score, in all lanes with t = 0 (t = 1 too), from its dots.
template <KeyFormat kFormat>
__device__ __forceinline__ float block_score(float (&dots)[4], const QueryRegisters<kFormat>& q,
                                             int valid_tokens, int lane) {
  if (q.remainder) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dots[i] += __shfl_xor_sync(kAll, dots[i], 2);
  }
  float upper = fmaf(q.weight[1], fmaxf(dots[1], 0.0f), q.weight[0] * fmaxf(dots[0], 0.0f));
  float lower = fmaf(q.weight[1], fmaxf(dots[3], 0.0f), q.weight[0] * fmaxf(dots[2], 0.0f));
  upper += __shfl_xor_sync(kAll, upper, 1);
  lower += __shfl_xor_sync(kAll, lower, 1);
  if (valid_tokens < kPageTokens) {
    const float minus_infinity = __uint_as_float(0xff800000u);
    if (lane / 4 >= valid_tokens) upper = minus_infinity;
    if (lane / 4 + 8 >= valid_tokens) lower = minus_infinity;
  }
  float score = fmaxf(upper, lower);
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) score = fmaxf(score, __shfl_xor_sync(kAll, score, offset));
  return score;
}

// Row and first block of an item of kItemBlocks blocks, found by summing the rows' item counts 32 rows at a
// time.
struct Item {
  int row, first_block, length;
};
template <int kItemBlocks>
__device__ __forceinline__ bool find_item(const ScoreBlocksParams& p, int64_t index, int lane, Item& item) {
  for (int base = 0; base < p.batch; base += 32) {
    const int length = base + lane < p.batch ? p.lengths[base + lane] : 0;
    const int count = (length + kPageTokens * kItemBlocks - 1) / (kPageTokens * kItemBlocks);
    int sum = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(kAll, sum, offset);
      if (lane >= offset) sum += other;
    }
    const unsigned past = __ballot_sync(kAll, sum > index);
    if (past != 0) {
      const int owner = __ffs(past) - 1;
      item.row = base + owner;
      item.length = __shfl_sync(kAll, length, owner);
      item.first_block = (static_cast<int>(index) - __shfl_sync(kAll, sum - count, owner)) * kItemBlocks;
      return true;
    }
    index -= __shfl_sync(kAll, sum, 31);
  }
  return false;
}

// Shared memory of one thread block: for each warp kStages stages of kUnits pages of one head.
template <KeyFormat kFormat, int kUnits, int kStages>
struct ScoreShared {
  alignas(128) uint8_t pages[kWarps][kStages][kUnits][page_head_bytes(kFormat)];
  SharedQuery<kFormat> query;
};

// An item is kWarps runs of kWarpBlocks blocks of one row, one run a warp: kUnits pages of one head each,
// copied kStages items ahead, a page a copy group.
template <KeyFormat kFormat, int kKeyHeads, int kUnits, int kStages>
__global__ void __launch_bounds__(kWarps * 32) score_kernel(const ScoreBlocksParams p) {
  static_assert(kKeyHeads == 1 || kKeyHeads == kUnits);
  constexpr int kWarpBlocks = kKeyHeads == 1 ? kUnits : 1;
  constexpr int kItemBlocks = kWarps * kWarpBlocks;
  constexpr int kPageBytes = page_head_bytes(kFormat);
  using Shared = ScoreShared<kFormat, kUnits, kStages>;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool one_row = p.batch == 1;

  bool waited = p.overlap != Overlap::kHistory;
  if (waited) {
    ptx::griddepcontrol_wait();
    ptx::griddepcontrol_launch_dependents();
  }
  // The one row's query, page and length are asked for together; the query before the pages, to arrive first.
  typename SharedQuery<kFormat>::Raw raw_query;
  if (waited && one_row) raw_query.load(p, 0, warp, lane);
  int64_t index = blockIdx.x;
  const int own_block = warp * kWarpBlocks + (kKeyHeads == 1 && lane < kUnits ? lane : 0);
  int only_page = 0, only_length = 0;
  if (one_row) {
    only_page = p.page_table[min(index * kItemBlocks + own_block, p.page_table_stride - 1)];
    only_length = p.lengths[0];
  }

  struct Work {
    Item item;
    int page;         // of this lane's block (lanes below kUnits)
    int first_block;  // of this warp
    int blocks;       // of the row; 0: no more work
  };
  const auto plan = [&](int64_t at) {
    Work work = {};
    if (one_row) {
      work.item = {0, static_cast<int>(at * kItemBlocks), only_length};
      if (at * kItemBlocks * kPageTokens >= only_length) return work;
    } else if (!find_item<kItemBlocks>(p, at, lane, work.item)) {
      return work;
    }
    work.blocks = (work.item.length + kPageTokens - 1) / kPageTokens;
    work.first_block = work.item.first_block + warp * kWarpBlocks;
    if (one_row && at == blockIdx.x)
      work.page = only_page;
    else
      work.page = p.page_table[work.item.row * p.page_table_stride +
                               min(work.item.first_block + own_block, work.blocks - 1)];
    return work;
  };
  const auto issue = [&](const Work& work, int stage) {
    if (work.blocks == 0) {  // nothing to copy, but later waits count the groups
#pragma unroll
      for (int u = 0; u < kUnits; ++u) ptx::cp_async_commit();
      return;
    }
    if (!waited && work.first_block + kWarpBlocks >= work.blocks) {  // may hold the newest block
      ptx::griddepcontrol_wait();
      waited = true;
    }
    const uint32_t to = ptx::shared_address(shared.pages[warp][stage]) + lane * 16;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t id = __shfl_sync(kAll, work.page, kKeyHeads == 1 ? u : 0);
      if (work.first_block + (kKeyHeads == 1 ? u : 0) < work.blocks) {
        const uint8_t* from = p.pages + (id * kKeyHeads + (kKeyHeads == 1 ? 0 : u)) * kPageBytes + lane * 16;
#pragma unroll
        for (int i = 0; i < kPageBytes / 512; ++i)
          ptx::cp_async_16(to + u * kPageBytes + i * 512, from + i * 512);
        if (lane < kPageBytes % 512 / 16)
          ptx::cp_async_16(to + u * kPageBytes + kPageBytes / 512 * 512, from + kPageBytes / 512 * 512);
      }
      ptx::cp_async_commit();
    }
  };

  Work work = plan(index), next = {};
  issue(work, 0);
  if constexpr (kStages == 2) {
    next = plan(index + gridDim.x);
    issue(next, 1);
  }
  if (!waited) {
    ptx::griddepcontrol_wait();
    waited = true;
  }
  if (p.overlap == Overlap::kHistory) {
    ptx::griddepcontrol_launch_dependents();
    if (one_row) raw_query.load(p, 0, warp, lane);
  }
  QueryRegisters<kFormat> query;
  int loaded_row = -1, stage = 0;
  while (work.blocks > 0) {
    index += gridDim.x;
    const Work after = plan(index + (kStages - 1) * static_cast<int64_t>(gridDim.x));
    if (work.item.row != loaded_row) {
      if (!one_row) raw_query.load(p, work.item.row, warp, lane);
      if (loaded_row >= 0) __syncthreads();
      shared.query.prepare(p, raw_query, warp, lane);
      __syncthreads();
      query.load(shared.query, lane);
      loaded_row = work.item.row;
    }
    float* out = p.block_scores + work.item.row * p.score_stride;
    float score = 0.0f;
    float pairs[2][4];  // per-head keys: heads 0 and 1, heads 2 and 3
    const auto score_unit = [&](int u) {
      const int block = work.first_block + (kKeyHeads == 1 ? u : 0);
      if (block >= work.blocks) return;
      __syncwarp();
      PageRegisters<kFormat> page;
      page.load(shared.pages[warp][stage][u], lane);
      float dots[4];
      page_dots<kFormat>(page, query, dots);
      if constexpr (kKeyHeads == 1) {
        const float s = block_score<kFormat>(dots, query, work.item.length - block * kPageTokens, lane);
        score = lane == 4 * u ? s : score;
      } else {
        pairs[u / 2][u % 2] = dots[u % 2];
        pairs[u / 2][2 + u % 2] = dots[2 + u % 2];
      }
    };
    // Groups that may still be under way when unit u is due: the later units, and the next stage.
    constexpr int kLater = kUnits - 1 + (kStages - 1) * kUnits;
    ptx::cp_async_wait<kLater>();
    score_unit(0);
    ptx::cp_async_wait<kLater - 1>();
    score_unit(1);
    if constexpr (kUnits == 4) {
      ptx::cp_async_wait<kLater - 2>();
      score_unit(2);
      ptx::cp_async_wait<kLater - 3>();
      score_unit(3);
    }
    if constexpr (kKeyHeads == 1) {
      const int block = work.first_block + lane / 4;
      if (lane % 4 == 0 && lane < 4 * kUnits && block < work.blocks) out[block] = score;
    } else if (work.first_block < work.blocks) {
      float dots[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) dots[i] = lane % 2 == 0 ? pairs[0][i] : pairs[1][i];
      const float s =
          block_score<kFormat>(dots, query, work.item.length - work.first_block * kPageTokens, lane);
      if (lane == 0) out[work.first_block] = s;
    }
    __syncwarp();
    issue(after, stage);
    work = kStages == 2 ? next : after;
    next = after;
    stage = (stage + 1) % kStages;
  }

  const float minus_infinity = __uint_as_float(0xff800000u);
  for (int row = 0; row < p.batch; ++row) {
    const int blocks = ((one_row ? only_length : p.lengths[row]) + kPageTokens - 1) / kPageTokens;
    const int64_t first = blocks + static_cast<int64_t>(blockIdx.x) * (kWarps * 32) + threadIdx.x;
    for (int64_t j = first; j < p.max_blocks; j += static_cast<int64_t>(gridDim.x) * (kWarps * 32))
      p.block_scores[row * p.score_stride + j] = minus_infinity;
  }
}

template <KeyFormat kFormat, int kKeyHeads, int kUnits, int kStages>
cudaError_t launch_score(const ScoreBlocksParams& p, cudaStream_t stream) {
  using Shared = ScoreShared<kFormat, kUnits, kStages>;
  const auto kernel = score_kernel<kFormat, kKeyHeads, kUnits, kStages>;
  int multiprocessors = 0;
  cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error == cudaSuccess) error = allow_shared_bytes(kernel, sizeof(Shared));
  if (error != cudaSuccess) return error;
  constexpr int kItemBlocks = kWarps * (kKeyHeads == 1 ? kUnits : 1);
  constexpr int kResident = std::min<int>(4, 220 * 1024 / sizeof(Shared));  // blocks a multiprocessor
  const int64_t most = static_cast<int64_t>(p.batch) * ((p.max_blocks + kItemBlocks - 1) / kItemBlocks);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>(most, kResident * multiprocessors)));
  shape.block = dim3(kWarps * 32);
  shape.shared_bytes = sizeof(Shared);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p);
}
template <KeyFormat kFormat>
cudaError_t launch_score_heads(const ScoreBlocksParams& p, cudaStream_t stream) {
  constexpr int kUnits = kFormat == KeyFormat::bf16 || kFormat == KeyFormat::int8 ? 2 : 4;
  constexpr int kStagesOfHeads = kFormat == KeyFormat::bf16 ? 1 : 2;
  return p.key_heads == 1 ? launch_score<kFormat, 1, kUnits, 2>(p, stream)
                          : launch_score<kFormat, kSelectorHeads, kSelectorHeads, kStagesOfHeads>(p, stream);
}

}  // namespace

cudaError_t score_blocks(const ScoreBlocksParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.max_blocks < 0 || (p.key_heads != 1 && p.key_heads != kSelectorHeads) ||
      p.score_stride < p.max_blocks || p.page_table_stride < p.max_blocks)
    return cudaErrorInvalidValue;
  if (p.batch == 0 || p.max_blocks == 0) return cudaSuccess;
  if (p.queries == nullptr || p.weights == nullptr || p.pages == nullptr || p.page_table == nullptr ||
      p.lengths == nullptr || p.block_scores == nullptr || reinterpret_cast<uintptr_t>(p.pages) % 16 != 0)
    return cudaErrorInvalidValue;
  switch (p.format) {
    case KeyFormat::bf16:
      return launch_score_heads<KeyFormat::bf16>(p, stream);
    case KeyFormat::int8:
      return launch_score_heads<KeyFormat::int8>(p, stream);
    case KeyFormat::int4:
      return launch_score_heads<KeyFormat::int4>(p, stream);
    case KeyFormat::mxfp4:
      return launch_score_heads<KeyFormat::mxfp4>(p, stream);
    case KeyFormat::nvfp4:
      return launch_score_heads<KeyFormat::nvfp4>(p, stream);
    case KeyFormat::f32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
