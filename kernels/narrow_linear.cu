// Contract: narrow_linear.h. Floor: the bytes of W at the memory's bandwidth.
//
// A tile is 16 rows of W, the rows of a tensor core's product, with up to 32 rows of x as its columns. The warps of a block
// share out a tile's columns in steps of 128 bytes of W: warp w takes steps w, w + 8, ...; the columns of one product are
// those that a lane finds side by side, in x as in W, so that both are read 16 bytes at a time and nothing is shuffled. The
// warps' sums meet in shared memory, in the warps' order.
//
// Two forms with the same sums: the portable one, here, keeps the next steps' part of W on its way into registers, across
// tiles too; that of narrow_linear_hopper.cuh has the copy engine fill a ring in shared memory, where x must fit beside it.
#include <algorithm>

#include "kernels/launch.h"
#include "kernels/narrow_linear_step.cuh"
#if !defined(SPOT_EMULATED)
#include "kernels/narrow_linear_hopper.cuh"
#endif

namespace spot::kernels {
namespace {

template <typename T, bool kCodes, int kColumns>
__global__ void __launch_bounds__(kLinearWarps * 32, kColumns > 2 ? 1 : 2)
    narrow_linear_portable(const NarrowLinearParams p) {
  constexpr int kStages = kColumns > (kCodes ? 1 : 2) ? 3 : 4, kPieceBytes = 16, kHalfBytes = kStepBytes / 2;
  struct Stage {
    Pieces w;
    float scale;
  };
  auto& sums = *reinterpret_cast<Sums<kColumns>*>(ptx::dynamic_shared());
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int row_bytes = p.width * (kCodes ? 1 : static_cast<int>(sizeof(T)));
  const int steps = (row_bytes + kStepBytes - 1) / kStepBytes, tiles = (p.out + kTileRows - 1) / kTileRows;
  const int blocks = static_cast<int>(gridDim.x);
  struct Place {
    int tile, step;
  };
  const auto advance = [&](Place& at) {
    at.step += warps;
    if (at.step >= steps) at.step = warp, at.tile += blocks;
  };

  const auto fetch = [&](Stage& stage, const Place& at) {
    if (at.tile >= tiles) return;
    const int row = at.tile * kTileRows, place = at.step * kStepBytes + t * kPieceBytes;
    const auto* const weight = static_cast<const uint8_t*>(p.weight);
    const uint8_t* const low = weight + static_cast<int64_t>(min(row + g, p.out - 1)) * row_bytes;
    const uint8_t* const high = weight + static_cast<int64_t>(min(row + g + 8, p.out - 1)) * row_bytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int from = place + half * kHalfBytes < row_bytes ? place + half * kHalfBytes : 0;
      stage.w.low[half] = ptx::load_streaming(low + from);
      stage.w.high[half] = ptx::load_streaming(high + from);
    }
    if constexpr (kCodes) stage.scale = p.scales[static_cast<int64_t>(row / kScaleBlock) * steps + at.step];
  };

  TileSum<T, kCodes, kColumns> sum;
  const auto multiply = [&](Stage& stage, int step) {
    const int place = step * kStepBytes + t * kPieceBytes;
    const bool whole = (step + 1) * kStepBytes <= row_bytes;
    if (!whole)  // what lies behind a row is not its
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (place + half * kHalfBytes >= row_bytes) stage.w.low[half] = stage.w.high[half] = {0, 0, 0, 0};
    sum.multiply(stage.w, stage.scale, [&](int column, int half, int move) {
      const int row = column * 8 + g, from = (place + half * kHalfBytes) / (kCodes ? 1 : 2) + move * 8;
      uint4 x = {0, 0, 0, 0};
      if (row < p.num_rows && (whole || from < p.width))
        x = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row * p.x_stride + from);
      return kCodes ? paired(x) : x;
    });
  };

  if (p.overlap != Overlap::kHistory) ptx::griddepcontrol_wait();
  Stage stages[kStages];
  Place next = {static_cast<int>(blockIdx.x), warp}, at = next;
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(stages[s], next), advance(next);
  if (p.overlap == Overlap::kHistory) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  for (int turn = 0; at.tile < tiles;) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (at.tile >= tiles) break;
      const Place now = at;
      advance(at);
      multiply(stages[s], now.step);
      fetch(stages[s], next), advance(next);
      if (at.tile != now.tile) sum.finish(p, sums, warps, now.tile, turn++);
    }
  }
}

template <typename T, bool kCodes, int kColumns>
cudaError_t start_portable(const NarrowLinearParams& p, cudaStream_t stream) {
  const auto kernel = narrow_linear_portable<T, kCodes, kColumns>;
  int processors = 0;
  if (const cudaError_t error = multiprocessor_count(&processors); error != cudaSuccess) return error;
  const int tiles = (p.out + kTileRows - 1) / kTileRows;
  const int steps = (p.width + kStepColumns<T, kCodes> - 1) / kStepColumns<T, kCodes>;
  LaunchShape shape;
  shape.shared_bytes = sizeof(Sums<kColumns>);
  // All blocks at once; those that share a multiprocessor are `processors` apart, so that every multiprocessor has about
  // as many tiles.
  shape.grid = dim3(static_cast<unsigned>(std::min(tiles, processors * (kColumns > 2 ? 1 : 2))));
  shape.block = dim3(static_cast<unsigned>(std::min(steps, kLinearWarps)) * 32);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p);
}

template <typename T, bool kCodes, int kColumns>
cudaError_t start(const NarrowLinearParams& p, cudaStream_t stream) {
#if !defined(SPOT_EMULATED)
  bool hopper = false;
  const cudaError_t error = has_warpgroup_products(&hopper);
  if (error != cudaSuccess) return error;
  RingShape ring;
  uint32_t bytes;
  // Two blocks' worth of shared memory, so that the next kernel's can start beside this one's; or one's.
  if (hopper && (ring_fits<T, kCodes, kColumns>(p, kHalfOfShared, &ring, &bytes) ||
                 ring_fits<T, kCodes, kColumns>(p, kAllOfShared, &ring, &bytes)))
    return start_ring<T, kCodes, kColumns>(p, ring, bytes, stream);
#endif
  return start_portable<T, kCodes, kColumns>(p, stream);
}

template <typename T, bool kCodes>
cudaError_t start_rows(const NarrowLinearParams& p, cudaStream_t stream) {
  if (p.num_rows <= 8) return start<T, kCodes, 1>(p, stream);
  if (p.num_rows <= 16) return start<T, kCodes, 2>(p, stream);
  return start<T, kCodes, 4>(p, stream);
}

}  // namespace

cudaError_t narrow_linear(const NarrowLinearParams& p, cudaStream_t stream) {
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (p.num_rows < 0 || p.num_rows > kNarrowRows || p.width < 1 || p.out < 1 ||
      p.width % (p.e4m3 ? 16 : 8) != 0 || p.x_stride % 8 != 0)
    return cudaErrorInvalidValue;
  if (p.num_rows == 0) return cudaSuccess;
  if (p.x == nullptr || p.weight == nullptr || p.y == nullptr || (p.e4m3 && p.scales == nullptr) ||
      !aligned(p.x) || !aligned(p.weight))
    return cudaErrorInvalidValue;
  if (p.type == DataType::kBf16)
    return p.e4m3 ? start_rows<__nv_bfloat16, true>(p, stream) : start_rows<__nv_bfloat16, false>(p, stream);
  if (p.type == DataType::kF16)
    return p.e4m3 ? start_rows<__half, true>(p, stream) : start_rows<__half, false>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
