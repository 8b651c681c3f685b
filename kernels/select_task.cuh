// What every way of selecting one row by one thread block shares: its constants, its shared memory, sums of
// masses. Used by select_row.cuh and select_threshold.cuh.
#pragma once

#include "kernels/ptx.cuh"
#include "kernels/select_blocks.h"

namespace spot::kernels {

// What the host computes once for all rows.
struct SelectConstants {
  SelectionRule rules;
  float scale;           // mass_scale
  uint32_t probability;  // fixed_probability
  int32_t capacity;
  int32_t cached;  // rows of so many scores are kept in shared memory
};
inline SelectConstants select_constants(const SelectionRule& rules, int32_t capacity, int32_t cached) {
  return {rules, mass_scale(rules), fixed_probability(rules), capacity, cached};
}

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSelectItems = 16;  // scores a thread looks at before it visits those that count
constexpr int kSelectBins = 2 * kSelectThreads;
constexpr int kSelectCached = 24 * 1024;  // most scores of a row that are kept in shared memory

constexpr int kSelectFew = 256;  // members of a bin that are ranked
constexpr int kMassSplit = 12;   // bins sum the low 12 bits of masses and the rest apart: neither overflows
constexpr int kSelectCandidates = kMaxSelectBlocks / 16;  // more: select_from_all
static_assert(kMaxSelectBlocks <= 65536);                 // candidates are 16 bits
constexpr uint32_t kAllLanes = 0xffffffffu;

struct SelectShared {
  uint32_t bitmap[kMaxSelectBlocks / 32];  // the selected blocks
  union {
    uint32_t ties[kMaxSelectBlocks / 32];            // select_from_all
    uint16_t candidates[kSelectCandidates];          // select_from_candidates: blocks, in any order
    uint32_t first_position[kMaxSelectBlocks / 32];  // list_bitmap: of a word's blocks
  };
  uint32_t count[kSelectBins];
  uint32_t mass_low[kSelectBins];
  uint32_t mass_high[kSelectBins];
  unsigned long long few[kSelectFew];  // key, then the complement of the block: larger is earlier
  uint32_t few_mass[kSelectFew];
  uint32_t warp_a[4][32], warp_b[32];
  unsigned long long warp_mass[32];
  unsigned long long base_mass, covered;
  uint32_t base_count, bin, bin_count, num_candidates, num_few, taken;
};

// What both ways need of a row. kMass: whether masses can be asked for at all.
template <bool kMass>
struct SelectTask {
  const float* scores;  // shared or global memory
  SelectRow row;
  bool top_p, with_mass;
  float scale;
  uint32_t probability;

  __device__ __forceinline__ SelectTask(const float* scores, const SelectRow& row,
                                        const SelectConstants& constants, bool with_share)
      : scores(scores),
        row(row),
        top_p(kMass && constants.rules.mode == SelectionMode::top_p),
        with_mass(kMass && (top_p || with_share)),
        scale(constants.scale),
        probability(constants.probability) {}
  __device__ __forceinline__ bool residual(int block) const {
    return static_cast<uint32_t>(block - row.residual_begin) <
           static_cast<uint32_t>(row.residual_end - row.residual_begin);
  }
  __device__ __forceinline__ int reserved_blocks() const {
    return row.num_blocks - (row.residual_end - row.residual_begin);
  }
  // Whether the block at sorted position `position` (from 0), with `mass_before` ahead of it, is selected.
  __device__ __forceinline__ bool within_budget(unsigned long long target, unsigned long long mass_before,
                                                uint32_t position) const {
    if (position >= static_cast<uint32_t>(row.max_residual)) return false;
    return position < static_cast<uint32_t>(row.min_residual) || (top_p && mass_before < target);
  }
  __device__ __forceinline__ uint32_t mass(uint32_t key, uint32_t largest_key) const {
    return largest_key == order_key(bits_float(0xff800000u))
               ? 0u
               : mass_of(score_of_key(key), score_of_key(largest_key), scale);
  }
};

// The bin of a place along all of them, the first or the last beyond their ends; NaN is in the first.
__device__ __forceinline__ int bin_at(float place) {
  return place >= 1.0f ? static_cast<int>(fminf(place, kSelectBins - 1)) : 0;
}

__device__ __forceinline__ uint32_t bits_below(int n) {
  return n >= 32 ? kAllLanes : (1u << n) - 1;
}

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}
__device__ __forceinline__ unsigned long long warp_inclusive_sum(unsigned long long value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const unsigned long long other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}
// The sum of 32 values below 2^48, to every lane.
__device__ __forceinline__ unsigned long long warp_sum(unsigned long long value) {
  const unsigned long long low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value & 0xffffff));
  return low +
         (static_cast<unsigned long long>(__reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 24)))
          << 24);
}

// Starts copying the first `count` scores of a row into shared memory; a thread copies those it will look at
// first, so that these need no barrier. Called before the row's length is known: the two latencies overlap.
__device__ __forceinline__ void copy_scores(const float* scores, int count, float* cached) {
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kSelectThreads)
    ptx::cp_async_4(ptx::shared_address(cached + i), scores + i);
  ptx::cp_async_commit();
}

// Mass of all residual blocks, to every thread. Two barriers.
template <bool kMass>
__device__ __forceinline__ unsigned long long total_mass(const SelectTask<kMass>& task, uint32_t largest_key,
                                                         SelectShared& s) {
  const float largest = score_of_key(largest_key);
  unsigned long long sum = 0;
#pragma unroll 4
  for (int block = task.row.residual_begin + static_cast<int>(threadIdx.x); block < task.row.residual_end;
       block += kSelectThreads)
    sum += mass_of(canonical_score(task.scores[block]), largest, task.scale);
  if (largest == bits_float(0xff800000u)) sum = 0;
  sum = warp_sum(sum);
  const int lane = threadIdx.x % 32;
  if (lane == 0) s.warp_mass[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(lane < kSelectWarps ? s.warp_mass[lane] : 0ull);
  __syncthreads();
  return sum;
}

static __device__ __attribute__((noinline)) void store_share(float* share, unsigned long long covered,
                                                             unsigned long long total) {
  *share = total == 0 ? 1.0f : static_cast<float>(static_cast<double>(covered) / static_cast<double>(total));
}

}  // namespace spot::kernels
