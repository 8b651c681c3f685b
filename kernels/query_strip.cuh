// What the kernels over a QueryStrip share: tiles of 128 queries, two warpgroups with 64 rows each, and their
// operands in the layout of wgmma.
#pragma once

#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/query_strip.h"

namespace spot::kernels {
namespace {

constexpr int kTileRows = 128, kGroupRows = 64, kGroupThreads = 128, kTileThreads = 256;
constexpr int kPanelDims = 64, kPanelRowBytes = 128;
constexpr size_t kOwnSharedBytes = 1024;  // room for a kernel's shared memory beside the dynamic one

// Row n of a tile of keys in shared memory holds key key_of_row(n) of the tile: within 32 keys, a thread's
// eight accumulators of a row then belong to eight neighbouring keys, 8 (lane % 4) and on, which it moves in
// whole 16-byte pieces.
__device__ __forceinline__ int key_of_row(int n) {
  return (n & ~31) | (n & 6) << 2 | (n & 24) >> 2 | (n & 1);
}

// Starts copying kRows rows of kPanels * 64 16-bit numbers, source(row) the first of each, to panels at `to`.
template <int kRows, int kPanels, int kThreads, typename Source>
__device__ __forceinline__ void copy_panels(uint32_t to, int thread, const Source& source) {
  constexpr int kPieces = 8 * kPanels, kStep = kThreads / kPieces;
  // A thread's pieces lie at one place of their rows: whole steps of eight keep the swizzle.
  static_assert(kThreads % kPieces == 0 && kStep % 8 == 0 && kRows % kStep == 0);
  const int first = thread / kPieces, piece = thread % kPieces;
  to += static_cast<uint32_t>(((piece / 8 * kRows + first) * 8 + (piece % 8 ^ (first & 7))) * 16);
#pragma unroll 4
  for (int row = 0; row < kRows; row += kStep)
    ptx::cp_async_16(to + static_cast<uint32_t>(row * kPanelRowBytes), source(first + row) + 8 * piece);
}

__device__ __forceinline__ uint32_t aligned_shared() {
  return (ptx::shared_address(ptx::dynamic_shared()) + 1023u) & ~1023u;
}

// Sum and largest of the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The two rows of a thread's accumulators: row lane / 4 of its warp's 16, and the one 8 below.
struct ThreadRows {
  int row[2];  // of the strip; may lie past its end
  int32_t low[2], last[2], token[2];
  bool valid[2];
};
template <int kRows = kTileRows>  // of a block
__device__ __forceinline__ ThreadRows thread_rows(const QueryStrip& strip) {
  ThreadRows rows;
  const int first = blockIdx.y * kRows + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows.row[i] = first + 8 * i;
    rows.valid[i] = rows.row[i] < strip.rows;
    const int row = min(rows.row[i], strip.rows - 1);
    rows.low[i] = strip.low[row];
    rows.last[i] = strip.last[row];
    rows.token[i] = strip.tokens[row];
  }
  return rows;
}

// The tokens seen by some query of this block's tile: begin .. end - 1.
struct SeenKeys {
  int32_t begin, end;
};
template <int kRows = kTileRows>
__device__ __forceinline__ SeenKeys seen_keys(const QueryStrip& strip) {
  const int first = blockIdx.y * kRows;
  return {strip.low[first], strip.last[min(first + kRows, strip.rows) - 1] + 1};
}

inline bool is_strip(const QueryStrip& s) {
  return s.tokens != nullptr && s.low != nullptr && s.last != nullptr && s.rows >= 1 && s.first_key >= 0 &&
         s.width >= 8 && s.width % 8 == 0 && s.num_tokens >= 1;
}
inline bool aligned_rows(const void* p, int64_t token_stride, int64_t head_stride) {
  return p != nullptr && reinterpret_cast<uintptr_t>(p) % 16 == 0 && token_stride % 8 == 0 &&
         head_stride % 8 == 0;
}
inline unsigned tiles(int64_t count, int64_t size) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace
}  // namespace spot::kernels
