// narrow_linear on compute capability 9.0; included by narrow_linear.cu, whose head has the contract and the floor.
//
// A block a multiprocessor, from tile to tile. One warp has the copy engine bring 1 KB of each of a tile's 16 rows a
// stage into a ring in shared memory, some tens of KB ahead and across tiles, and its first stages before the wait
// for the predecessor; the other eight take a step of each stage. x lies in shared memory throughout.
#pragma once

#include "kernels/narrow_linear_step.cuh"
#include "kernels/ptx_hopper.cuh"

namespace spot::kernels {
namespace {

constexpr int kChunkBytes = kLinearWarps * kStepBytes;  // of a row of W, a stage
constexpr uint32_t kRingRowBytes = kChunkBytes + 64;    // so that neighbouring rows lie in other banks
constexpr uint32_t kRingStageBytes = kTileRows * kRingRowBytes;
constexpr uint32_t kAllOfShared = 232448,
                   kHalfOfShared = 233472 / 2 - 1024;  // of a multiprocessor, for a block
constexpr int kMinStages = 3, kMaxStages = 12;
constexpr uint32_t kIdleBytes = 2 * kStepBytes;  // zeros: a step of the rows that x does not have

struct RingShape {
  int stages;
  uint32_t x_row_bytes;  // in shared memory
};

template <typename T, bool kCodes, int kColumns, bool kBare = false>
__global__ void __launch_bounds__((kLinearWarps + 1) * 32, kColumns > 1 ? 1 : 2)
    narrow_linear_ring(const NarrowLinearParams p, const RingShape shape) {
  constexpr uint32_t kXStepBytes = kStepColumns<T, kCodes> * sizeof(T);
  uint8_t* const ring = ptx::dynamic_shared();
  uint8_t* const idle = ring + shape.stages * kRingStageBytes;
  uint8_t* const x = idle + kIdleBytes;
  auto& sums = *reinterpret_cast<Sums<kColumns>*>(x + p.num_rows * shape.x_row_bytes);
  const uint32_t full = ptx::shared_address(&sums + 1), empty = full + kMaxStages * 8;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int row_bytes = p.width * (kCodes ? 1 : static_cast<int>(sizeof(T)));
  const int tiles = (p.out + kTileRows - 1) / kTileRows;
  const int first_tile = static_cast<int>(blockIdx.x), stride = static_cast<int>(gridDim.x);

  if (threadIdx.x < kIdleBytes / 16) reinterpret_cast<uint4*>(idle)[threadIdx.x] = {0, 0, 0, 0};
  if (threadIdx.x == 0) {
    for (int i = 0; i < shape.stages; ++i) {
      ptx::barrier_init(full + i * 8, 1);
      ptx::barrier_init(empty + i * 8, kLinearWarps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (p.overlap != Overlap::kHistory) ptx::griddepcontrol_wait();

  if (warp == kLinearWarps) {
    const auto* const weight = static_cast<const uint8_t*>(p.weight);
    const uint32_t to = ptx::shared_address(ring) + static_cast<uint32_t>(lane) * kRingRowBytes;
    int stage = 0;
    uint32_t parity = 1;
    for (int tile = first_tile; tile < tiles; tile += stride) {
      const int row = min(tile * kTileRows + lane, p.out - 1);
      const uint8_t* const from = weight + static_cast<int64_t>(row) * row_bytes;
      for (int begin = 0; begin < row_bytes; begin += kChunkBytes) {
        const auto bytes = static_cast<uint32_t>(min(kChunkBytes, row_bytes - begin));
        ptx::barrier_wait(empty + stage * 8, parity);
        if (lane == 0) ptx::barrier_arrive_expecting(full + stage * 8, kTileRows * bytes);
        __syncwarp();
        if (lane < kTileRows)
          ptx::copy_bytes(to + stage * kRingStageBytes, from + begin, bytes, full + stage * 8);
        if (++stage == shape.stages) stage = 0, parity ^= 1;
      }
    }
    return;
  }

  if (p.overlap == Overlap::kHistory) ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int g = lane / 4, t = lane % 4;
  const int steps = (row_bytes + kStepBytes - 1) / kStepBytes;

  // Each warp brings x of its own steps, one step ahead, with its first tile; zeros behind its end.
  constexpr int kRowMoves = kXStepBytes / 16, kMoves = kColumns * 8 * kRowMoves / 32;
  uint4 moved[kMoves];
  const auto fetch_x = [&](int step) {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const int row = (i * 32 + lane) / kRowMoves,
                from = step * kStepColumns<T, kCodes> + lane % kRowMoves * 8;
      moved[i] = {0, 0, 0, 0};
      if (row < p.num_rows && from < p.width)
        moved[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row * p.x_stride + from);
    }
  };
  const auto store_x = [&](int step) {
#pragma unroll
    for (int i = 0; i < kMoves; ++i) {
      const int row = (i * 32 + lane) / kRowMoves;
      if (row >= p.num_rows) continue;
      uint8_t* const to = x + row * shape.x_row_bytes + step * kXStepBytes + lane % kRowMoves * 16;
      *reinterpret_cast<uint4*>(to) = kCodes ? paired(moved[i]) : moved[i];
    }
    __syncwarp();
  };

  const uint8_t* own_x[kColumns];
  uint32_t x_step[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) {
    const int row = column * 8 + g;
    const bool has = row < p.num_rows;
    own_x[column] = (has ? x + row * shape.x_row_bytes : idle) + t * (kXStepBytes / 8);
    x_step[column] = has ? kXStepBytes : 0;
  }
  const auto scale_of = [&](int tile, int step) {
    return kCodes && tile < tiles && step < steps
               ? p.scales[static_cast<int64_t>(tile * kTileRows / kScaleBlock) * steps + step]
               : 0.0f;
  };

  fetch_x(warp);
  TileSum<T, kCodes, kColumns> sum;
  float next_scale = scale_of(first_tile, warp);
  const uint8_t* const own = ring + warp * kStepBytes + g * kRingRowBytes + t * 16;
  int stage = 0, turn = 0;
  uint32_t parity = 0;
  for (int tile = first_tile; tile < tiles; tile += stride, ++turn) {
    for (int first_step = 0; first_step < steps; first_step += kLinearWarps) {
      const int step = first_step + warp;
      const float scale = next_scale;
      next_scale = first_step + kLinearWarps < steps ? scale_of(tile, step + kLinearWarps)
                                                     : scale_of(tile + stride, warp);
      ptx::barrier_wait(full + stage * 8, parity);
      Pieces pieces;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* const from = own + stage * kRingStageBytes + half * (kStepBytes / 2);
        pieces.low[half] = *reinterpret_cast<const uint4*>(from);
        pieces.high[half] = *reinterpret_cast<const uint4*>(from + 8 * kRingRowBytes);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(empty + stage * 8);
      if (++stage == shape.stages) stage = 0, parity ^= 1;
      if (kBare || step >= steps) continue;
      if (turn == 0) store_x(step), fetch_x(step + kLinearWarps);
      if ((step + 1) * kStepBytes > row_bytes)  // what lies behind a row is not its
#pragma unroll
        for (int half = 0; half < 2; ++half)
          if (step * kStepBytes + half * (kStepBytes / 2) + t * 16 >= row_bytes)
            pieces.low[half] = pieces.high[half] = {0, 0, 0, 0};
      sum.multiply(pieces, scale, [&](int column, int half, int move) {
        return *reinterpret_cast<const uint4*>(own_x[column] + step * x_step[column] +
                                               half * (kXStepBytes / 2) + move * 16);
      });
    }
    sum.finish(p, sums, kLinearWarps, tile, turn);
  }
}

// Whether the ring takes these; `most` bytes of shared memory a block.
template <typename T, bool kCodes, int kColumns>
bool ring_fits(const NarrowLinearParams& p, uint32_t most, RingShape* shape, uint32_t* bytes) {
  // Rows of x: whole chunks, and apart by what keeps the lanes that read together in other banks.
  constexpr uint32_t kXStepBytes = kStepColumns<T, kCodes> * sizeof(T);
  const uint32_t steps =
      (static_cast<uint32_t>(p.width) * (kCodes ? 1 : sizeof(T)) + kStepBytes - 1) / kStepBytes;
  shape->x_row_bytes = steps * kXStepBytes + (kCodes ? 16 : 64);
  const uint64_t others = uint64_t{shape->x_row_bytes} * static_cast<uint32_t>(p.num_rows) + kIdleBytes +
                          sizeof(Sums<kColumns>) + 2 * kMaxStages * 8;
  if (others + kMinStages * kRingStageBytes > most) return false;
  shape->stages = static_cast<int>(std::min<uint64_t>((most - others) / kRingStageBytes, kMaxStages));
  *bytes = static_cast<uint32_t>(others) + static_cast<uint32_t>(shape->stages) * kRingStageBytes;
  return true;
}

template <typename T, bool kCodes, int kColumns, bool kBare = false>
cudaError_t start_ring(const NarrowLinearParams& p, const RingShape& ring, uint32_t bytes,
                       cudaStream_t stream, int per_processor = 1) {
  const auto kernel = narrow_linear_ring<T, kCodes, kColumns, kBare>;
  int processors = 0;
  cudaError_t error = multiprocessor_count(&processors);
  if (error == cudaSuccess) error = allow_shared_bytes(kernel, bytes);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.shared_bytes = bytes;
  shape.grid =
      dim3(static_cast<unsigned>(std::min((p.out + kTileRows - 1) / kTileRows, processors * per_processor)));
  shape.block = dim3((kLinearWarps + 1) * 32);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p, ring);
}

}  // namespace
}  // namespace spot::kernels
