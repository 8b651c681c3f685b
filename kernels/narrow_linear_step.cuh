// What both forms of narrow_linear.cu, whose head has the contract, share: the products of one step and the sums of a tile.
#pragma once

#include "kernels/narrow_linear.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kLinearWarps = 8, kTileRows = 16;
constexpr int kStepBytes = 128;  // of each row of W: what a warp multiplies at a time
template <typename T, bool kCodes>
constexpr int kStepColumns = kCodes ? kStepBytes : kStepBytes / static_cast<int>(sizeof(T));
static_assert(kStepColumns<__half, true> == kScaleBlock);

// A lane's part of a step, lane = 4 g + t: rows g and g + 8 of the tile, bytes 16 t to 16 t + 15 of either half.
struct Pieces {
  uint4 low[2], high[2];
};

// Codes 0 and 2, and 1 and 3, of a word as two T each, exactly: sign, exponent and fraction moved to their places in
// T, then the powers of two by which the exponents' biases differ. NaN comes out as 480: Largest finds it.
template <typename T>
__device__ __forceinline__ void unpack_codes(uint32_t codes, uint32_t& even, uint32_t& odd,
                                             uint32_t& largest) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kRight = kBf16 ? 4 : 1;
  constexpr uint32_t kSign = 0x80008000u, kSize = 0x7f007f00u >> kRight;
  constexpr uint32_t kScale = kBf16 ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
  const uint32_t odd_size = codes >> kRight & kSize, even_size = codes << (8 - kRight) & kSize;
#if !defined(SPOT_NO_NAN)
  largest = ptx::max_u16x2(ptx::max_u16x2(odd_size, even_size), largest);
#endif
  odd = ptx::multiply2<T>((codes & kSign) | odd_size, kScale);
  even = ptx::multiply2<T>((codes << 8 & kSign) | even_size, kScale);
}
// Eight numbers of x as unpack_codes pairs their columns.
__device__ __forceinline__ uint4 paired(uint4 x) {
  return {__byte_perm(x.x, x.y, 0x5410), __byte_perm(x.x, x.y, 0x7632), __byte_perm(x.z, x.w, 0x5410),
          __byte_perm(x.z, x.w, 0x7632)};
}

// The warps' sums of one tile, [warps][rows of x][16]; two, so that the next tile's need not wait for the readers.
template <int kColumns>
struct Sums {
  float of[2][kLinearWarps][kColumns * 8][kTileRows + 1];
};

template <typename T, bool kCodes, int kColumns>
struct TileSum {
  static constexpr int kMoves = kCodes ? 2 : 1;  // of 8 numbers of x, a half step

  float total[kColumns][4] = {};
  uint32_t largest[2] = {};  // codes of rows g, g + 8

  // x(column, half, move): numbers of row 8 column + g of x.
  template <typename X>
  __device__ __forceinline__ void multiply(const Pieces& w, float scale, X&& x) {
    float part[kColumns][4] = {};
    auto& sum = *(kCodes ? &part : &total);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t low[4] = {w.low[half].x, w.low[half].y, w.low[half].z, w.low[half].w};
      const uint32_t high[4] = {w.high[half].x, w.high[half].y, w.high[half].z, w.high[half].w};
#pragma unroll
      for (int move = 0; move < kMoves; ++move) {
        uint32_t a[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if constexpr (kCodes) {
            unpack_codes<T>(low[2 * move + j], a[j][0], a[j][2], largest[0]);
            unpack_codes<T>(high[2 * move + j], a[j][1], a[j][3], largest[1]);
          } else {
            a[j][0] = low[2 * j], a[j][1] = high[2 * j], a[j][2] = low[2 * j + 1], a[j][3] = high[2 * j + 1];
          }
        }
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const uint4 b = x(column, half, move);
          ptx::mma_accumulate<T>(sum[column], a[0], b.x, b.y);
          ptx::mma_accumulate<T>(sum[column], a[1], b.z, b.w);
        }
      }
    }
    if constexpr (kCodes)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[column][i] = fmaf(scale, part[column][i], total[column][i]);
  }

  // The warps' sums together, in their order; all threads of `warps` warps call it, tile after tile.
  __device__ __forceinline__ void finish(const NarrowLinearParams& p, Sums<kColumns>& sums, int warps,
                                         int tile, int turn) {
    const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
    const int g = lane / 4, t = lane % 4;
    if constexpr (kCodes) spread_nan();
    // total[0], [1]: row g of the tile, rows 2 t and 2 t + 1 of x; [2], [3]: row g + 8.
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.of[turn % 2][warp][column * 8 + 2 * t + i % 2][g + i / 2 * 8] = total[column][i];
        total[column][i] = 0;
      }
    ptx::named_barrier(1, warps * 32);
    // The warps take turns at adding, as it keeps one of them from its next step.
    const int first = (static_cast<int>(threadIdx.x) + turn % warps * 32) % (warps * 32);
    for (int i = first; i < p.num_rows * kTileRows; i += warps * 32) {
      const int x_row = i / kTileRows, row = tile * kTileRows + i % kTileRows;
      if (row >= p.out) continue;
      T& y = static_cast<T*>(p.y)[x_row * p.y_stride + row];
      const float before = p.accumulate ? to_float(y) : 0.0f;
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums.of[turn % 2][w][x_row][i % kTileRows];
      if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
      y = rounded<T>(p.accumulate ? before + sum : sum);
    }
  }

  __device__ __forceinline__ void spread_nan() {
    constexpr uint32_t kNan = std::is_same_v<T, __nv_bfloat16> ? 0x7f0 : 0x3f80;
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if ((largest[i] & 0xffff) == kNan || largest[i] >> 16 == kNan) found |= 1u << i;
      largest[i] = 0;
    }
    if (!__any_sync(0xffffffffu, found != 0)) return;
    found |= __shfl_xor_sync(0xffffffffu, found, 1);
    found |= __shfl_xor_sync(0xffffffffu, found, 2);
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (found >> i / 2 & 1) total[column][i] = __uint_as_float(0x7fffffffu);
  }
};

}  // namespace
}  // namespace spot::kernels
