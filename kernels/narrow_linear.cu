// Contract: narrow_linear.h. Floor: the bytes of W at the memory's bandwidth.
//
// A tile is 16 rows of W, the rows of a tensor core's product, with up to 32 rows of x as its columns. The warps of a block
// share out a tile's columns in steps of 128: warp w takes steps w, w + warps, ...; the columns of one product are those
// that a lane finds side by side, in x as in W, so that both are read 16 bytes at a time and nothing is shuffled. Blocks
// stay and go from tile to tile; each warp keeps the next steps' part of W on its way, across tiles too. The warps' sums
// meet in shared memory, in the warps' order.
#include <algorithm>

#include "kernels/launch.h"
#include "kernels/narrow_linear.h"
#include "kernels/ptx.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kWarps = 8, kTileRows = 16, kStep = kScaleBlock;

// A lane's share of a step: rows g and g + 8 of the tile, 16 bytes from each run of 4 x 16 bytes.
template <bool kCodes>
struct Stage {
  static constexpr int kRuns = kCodes ? 2 : 4;
  uint4 low[kRuns], high[kRuns];
  float scale;
};

template <typename T>
__device__ __forceinline__ void unpack_codes(uint32_t codes, uint32_t& first, uint32_t& second) {
  const float2 a = ptx::e4m3x2_to_float2(codes & 0xffff), b = ptx::e4m3x2_to_float2(codes >> 16);
  first = ptx::pack2<T>(a.x, a.y);
  second = ptx::pack2<T>(b.x, b.y);
}

// The warps' sums of one tile, [warps][rows of x][16]; two, so that the next tile's need not wait for the readers.
template <int kColumns>
struct Sums {
  float of[2][kWarps][kColumns * 8][kTileRows + 1];
};

template <typename T, bool kCodes, int kColumns>
__global__ void __launch_bounds__(kWarps * 32, kColumns > 2 ? 1 : 2)
    narrow_linear_kernel(const NarrowLinearParams p) {
  constexpr int kStages = kCodes ? 3 : 2, kPerLoad = kCodes ? 16 : 8;
  using Own = Stage<kCodes>;
  auto& sums = *reinterpret_cast<Sums<kColumns>*>(ptx::dynamic_shared());
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  const int steps = (p.width + kStep - 1) / kStep, tiles = (p.out + kTileRows - 1) / kTileRows;
  const int per_tile = (steps - warp + warps - 1) / warps;  // this warp's steps of a tile, at least one
  const int own_tiles =
      (tiles - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const int items = own_tiles * per_tile;
  const auto tile_of = [&](int item) {
    return static_cast<int>(blockIdx.x) + item / per_tile * static_cast<int>(gridDim.x);
  };
  const auto step_of = [&](int item) { return warp + item % per_tile * warps; };

  const auto fetch = [&](Own& stage, int item) {
    if (item >= items) return;
    const int row = tile_of(item) * kTileRows, step = step_of(item);
    const int64_t low = row + g < p.out ? row + g : p.out - 1,
                  high = row + g + 8 < p.out ? row + g + 8 : p.out - 1;
    const auto* weight = static_cast<const uint8_t*>(p.weight);
    constexpr int kBytes = kCodes ? 1 : 2;
#pragma unroll
    for (int run = 0; run < Own::kRuns; ++run) {
      const int column = step * kStep + (run * 4 + t) * kPerLoad;
      const bool inside = column < p.width;
      const uint4 none = {0, 0, 0, 0};
      stage.low[run] = inside ? ptx::load_streaming(weight + (low * p.width + column) * kBytes) : none;
      stage.high[run] = inside ? ptx::load_streaming(weight + (high * p.width + column) * kBytes) : none;
    }
    if constexpr (kCodes) stage.scale = p.scales[static_cast<int64_t>(row / kScaleBlock) * steps + step];
  };

  float total[kColumns][4] = {};
  const auto multiply = [&](const Own& stage, int step) {
    float part[kColumns][4] = {};
    auto& sum = *(kCodes ? &part : &total);
#pragma unroll
    for (int run = 0; run < Own::kRuns; ++run) {
      const int first = step * kStep + (run * 4 + t) * kPerLoad;
      uint4 x[kColumns][kPerLoad / 8] = {};
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int row = column * 8 + g;
        if (row >= p.num_rows || first >= p.width) continue;
        const T* from = static_cast<const T*>(p.x) + row * p.x_stride + first;
#pragma unroll
        for (int i = 0; i < kPerLoad / 8; ++i) x[column][i] = *reinterpret_cast<const uint4*>(from + i * 8);
      }
      const uint32_t low[4] = {stage.low[run].x, stage.low[run].y, stage.low[run].z, stage.low[run].w};
      const uint32_t high[4] = {stage.high[run].x, stage.high[run].y, stage.high[run].z, stage.high[run].w};
#pragma unroll
      for (int j = 0; j < kPerLoad / 4; ++j) {
        uint32_t a[4];
        if constexpr (kCodes) {
          unpack_codes<T>(low[j], a[0], a[2]);
          unpack_codes<T>(high[j], a[1], a[3]);
        } else {
          a[0] = low[2 * j], a[1] = high[2 * j], a[2] = low[2 * j + 1], a[3] = high[2 * j + 1];
        }
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          const uint4 b = x[column][j / 2];
          ptx::mma_accumulate<T>(sum[column], a, j % 2 ? b.z : b.x, j % 2 ? b.w : b.y);
        }
      }
    }
    if constexpr (kCodes)
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[column][i] = fmaf(stage.scale, part[column][i], total[column][i]);
  };

  // d[0], d[1]: row g of the tile, rows 2 t and 2 t + 1 of x; d[2], d[3]: row g + 8.
  const auto finish = [&](int tile, int buffer) {
#pragma unroll
    for (int column = 0; column < kColumns; ++column)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums.of[buffer][warp][column * 8 + 2 * t + i % 2][g + i / 2 * 8] = total[column][i];
        total[column][i] = 0;
      }
    ptx::named_barrier(1, warps * 32);
    for (int i = static_cast<int>(threadIdx.x); i < p.num_rows * kTileRows; i += warps * 32) {
      const int x_row = i / kTileRows, row = tile * kTileRows + i % kTileRows;
      if (row >= p.out) continue;
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums.of[buffer][w][x_row][i % kTileRows];
      if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
      T& y = static_cast<T*>(p.y)[x_row * p.y_stride + row];
      y = rounded<T>(p.accumulate ? to_float(y) + sum : sum);
    }
  };

  if (p.overlap != Overlap::kHistory) ptx::griddepcontrol_wait();
  Own stages[kStages];
#pragma unroll
  for (int s = 0; s < kStages; ++s) fetch(stages[s], s);
  if (p.overlap == Overlap::kHistory) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  for (int base = 0; base < items; base += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int item = base + s;
      if (item >= items) break;
      multiply(stages[s], step_of(item));
      fetch(stages[s], item + kStages);
      if ((item + 1) % per_tile == 0) finish(tile_of(item), item / per_tile % 2);
    }
  }
}

template <typename T, bool kCodes, int kColumns>
cudaError_t start(const NarrowLinearParams& p, cudaStream_t stream) {
  const auto kernel = narrow_linear_kernel<T, kCodes, kColumns>;
  int processors = 0;
  if (const cudaError_t error = multiprocessor_count(&processors); error != cudaSuccess) return error;
  // As many tiles for every block, all blocks at once.
  const int tiles = (p.out + kTileRows - 1) / kTileRows, steps = (p.width + kStep - 1) / kStep;
  const int places = processors * (kColumns > 2 ? 1 : 2), rounds = (tiles + places - 1) / places;
  LaunchShape shape;
  shape.shared_bytes = sizeof(Sums<kColumns>);
  shape.grid = dim3(static_cast<unsigned>((tiles + rounds - 1) / rounds));
  shape.block = dim3(static_cast<unsigned>(std::min(steps, kWarps)) * 32);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p);
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
