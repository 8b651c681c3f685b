// Selection by a threshold on a block's share of the residual mass, one row by one thread block. It needs neither
// order nor bins: the largest score, the sum of masses, then a compare whose ballots are the bitmap.
#pragma once

#include "kernels/select_task.cuh"

namespace spot::kernels {

// Selects into the bitmap and returns the number of blocks to every thread; ends with a barrier. The row must not
// be take_all. Where floor or cap bind it returns -1 and leaves their number of blocks in task.row, for
// select_from_all to choose. `chosen` as in select_row.cuh. Masses are computed twice, once for their sum and once
// for the comparison: cheaper than keeping those of long rows.
template <typename Chosen>
__device__ __forceinline__ int select_by_threshold(SelectTask<true>& task, double threshold, float* share,
                                                   const Chosen& chosen, SelectShared& s) {
  const SelectRow& row = task.row;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (row.num_blocks + 31) / 32;
  uint32_t largest_key = order_key(bits_float(0xff800000u));
#pragma unroll 4
  for (int block = tid; block < row.residual_end;
       block += kSelectThreads)  // those that copy_scores gave this thread
    if (block >= row.residual_begin)
      largest_key = max(largest_key, order_key(canonical_score(task.scores[block])));
  largest_key = ptx::reduce_max(largest_key);
  if (lane == 0) s.warp_b[warp] = largest_key;
  __syncthreads();
  largest_key = ptx::reduce_max(s.warp_b[lane % kSelectWarps]);
  const unsigned long long total = total_mass(task, largest_key, s);
  const unsigned long long least = mass_threshold(threshold, total);

  uint32_t taken = 0;
  unsigned long long covered = 0;
#pragma unroll 1
  for (int base = 0; base < words * 32; base += kSelectThreads) {
    const int block = base + tid, w = base / 32 + warp;
    const bool residual = task.residual(block);
    const uint32_t mass =
        residual ? task.mass(order_key(canonical_score(task.scores[block])), largest_key) : 0u;
    const bool heavy = residual && mass >= least;
    if (heavy) covered += mass;
    const uint32_t word = __ballot_sync(kAllLanes, residual ? heavy : block < row.num_blocks);
    taken += __popc(__ballot_sync(kAllLanes, heavy));
    if (lane == 0 && w < words) s.bitmap[w] = word;
  }
  covered = warp_sum(covered);
  if (lane == 0) {
    s.warp_a[0][warp] = taken;
    s.warp_mass[warp] = covered;
  }
  __syncthreads();
  const int count =
      static_cast<int>(__reduce_add_sync(kAllLanes, lane < kSelectWarps ? s.warp_a[0][lane] : 0u));
  covered = warp_sum(lane < kSelectWarps ? s.warp_mass[lane] : 0ull);
  if (count < row.min_residual || count > row.max_residual) {
    __syncthreads();
    task.row.min_residual = task.row.max_residual =
        count < row.min_residual ? row.min_residual : row.max_residual;
    return -1;
  }
#pragma unroll 1
  for (int block = row.residual_begin + tid; block < row.residual_end; block += kSelectThreads)
    if ((s.bitmap[block / 32] >> (block % 32) & 1u) != 0) chosen(block);
  if (tid == 0 && share != nullptr) store_share(share, covered, total);
  __syncthreads();
  return task.reserved_blocks() + count;
}

}  // namespace spot::kernels
