// Contract: select_blocks.h; the method: select_row.cuh.
// Floor (bytes): the scores once, 32 KB a row at 128K tokens, from L2; nothing beside the latencies of about
// ten block barriers and, where masses are summed, two shared-memory atomics a block. Grid: one block of 512 threads a row.
#include <algorithm>

#include "kernels/launch.h"
#include "kernels/select_row.cuh"

namespace spot::kernels {
namespace {

// kMass: see SelectTask.
template <bool kMass>
__global__ void __launch_bounds__(kSelectThreads, 1)
    select_kernel(const SelectBlocksParams p, const SelectConstants constants) {
  SelectShared& shared = *reinterpret_cast<SelectShared*>(ptx::dynamic_shared());
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int r = blockIdx.x;
  const float* scores = p.scores + r * p.score_stride;
  if (p.score_stride <= constants.cached) {
    float* cached = reinterpret_cast<float*>(&shared + 1);
    copy_scores(scores, static_cast<int>(p.score_stride), cached);
    scores = cached;
  }
  const SelectRow row = select_row(constants.rules, p.lengths[r / p.rows_per_sequence], constants.capacity);
  const int count = select_row_bitmap<kMass>(
      scores, row, constants, threshold_of(constants.rules, r % p.rows_per_sequence),
      p.covered_share == nullptr ? nullptr : p.covered_share + r, [](int) {}, shared);
  int32_t* out = p.selected + static_cast<int64_t>(r) * p.max_selected;
  list_bitmap(shared, row.num_blocks, 0, count, [&](int position, int block) { out[position] = block; });
  for (int i = count + threadIdx.x; i < p.max_selected; i += kSelectThreads) out[i] = -1;
  if (threadIdx.x == 0) p.counts[r] = count;
}

bool valid_thresholds(const SetThresholds& thresholds) {
  if (thresholds.count < 0 || thresholds.count > kMostSets) return false;
  for (int32_t set = 0; set < thresholds.count; ++set)
    if (!(thresholds.of[set] > 0.0)) return false;
  return true;
}

}  // namespace

bool valid_rules(const SelectionRule& rules) {
  return rules.block_size > 0 && rules.sinks >= 0 && rules.recency >= 0 && rules.floor >= 0 &&
         rules.cap >= 0 && rules.budget >= 0 && rules.budget_fraction >= 0.0 &&
         rules.budget_fraction <= 1.0 && rules.p == rules.p && rules.threshold > 0.0 &&
         rules.temperature > 0.0f && valid_thresholds(rules.thresholds);
}

cudaError_t select_blocks(const SelectBlocksParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows_per_sequence < 1 || p.rows % p.rows_per_sequence != 0 || !valid_rules(p.rules) ||
      p.max_selected < smallest_capacity(p.rules))
    return cudaErrorInvalidValue;
  if (p.rows == 0) return cudaSuccess;
  if (p.scores == nullptr || p.lengths == nullptr || p.selected == nullptr || p.counts == nullptr)
    return cudaErrorInvalidValue;
  const auto kernel = p.rules.mode != SelectionMode::top_k || p.covered_share != nullptr
                          ? select_kernel<true>
                          : select_kernel<false>;
  LaunchShape shape;
  shape.grid = dim3(p.rows);
  shape.block = dim3(kSelectThreads);
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int32_t cached = std::min<int32_t>(
      kSelectCached, static_cast<int32_t>((device.shared_bytes - sizeof(SelectShared)) / 4));
  shape.shared_bytes = sizeof(SelectShared) + (p.score_stride <= cached ? p.score_stride * sizeof(float) : 0);
  error = allow_shared_bytes(kernel, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p, select_constants(p.rules, p.max_selected, cached));
}

}  // namespace spot::kernels
