// Selection of one row by one thread block, without a sort. Used by select_blocks.cu and by the fused decode
// kernel.
//
// Every residual block falls into one of 2048 bins that keep the order of scores: first linear in the score
// between the row's smallest and largest, which spreads real scores well. Counts, and for top_p the integer
// masses, are summed per bin; a scan from the top finds the bin in which the budget ends. Bins above it are
// selected whole. The few members of the bin itself (the candidates) are ranked among each other exactly, by
// (score, index). A bin with too many members is split again, linearly in the integer order of its scores, at
// most three times; if all its scores are equal, the ties are taken by lowest index from a bitmap. All sums
// are of integers, so the atomics' order cannot matter.
#pragma once

#include "kernels/ptx.cuh"
#include "kernels/select_blocks.h"

namespace spot::kernels {

// What the host computes once for all rows.
struct SelectConstants {
  SelectParams rules;
  float scale;           // mass_scale
  uint32_t probability;  // fixed_probability
  int32_t capacity;
};
inline SelectConstants select_constants(const SelectParams& rules, int32_t capacity) {
  return {rules, mass_scale(rules), fixed_probability(rules), capacity};
}

constexpr int kSelectBins = 2048;
constexpr int kSelectCandidates = 256;
constexpr int kSelectItems = 16;  // scores a thread holds at once
constexpr int kMassSplit =
    12;  // bins sum the low 12 bits of masses and the rest apart, so that neither overflows

struct SelectShared {
  uint32_t count[kSelectBins];
  uint32_t mass_low[kSelectBins];
  uint32_t mass_high[kSelectBins];
  uint32_t bitmap[kMaxSelectBlocks / 32];  // the selected blocks
  uint32_t ties[kMaxSelectBlocks / 32];
  uint32_t candidate_key[kSelectCandidates];
  uint32_t candidate_mass[kSelectCandidates];
  int32_t candidate_block[kSelectCandidates];
  uint32_t warp_a[32], warp_b[32];
  unsigned long long warp_mass[32];
  unsigned long long base_mass, covered, total;
  uint32_t base_count, bin, bin_count, num_candidates;
};

// Whether the block at sorted position `position` (from 0), with `mass_before` ahead of it, is selected.
__device__ __forceinline__ bool within_budget(const SelectRow& row, bool top_p, unsigned long long target,
                                              unsigned long long mass_before, uint32_t position) {
  if (position >= static_cast<uint32_t>(row.max_residual)) return false;
  return position < static_cast<uint32_t>(row.min_residual) || (top_p && mass_before < target);
}

// The bins of one pass: linear in the score, or in its order_key between `low` and `high`.
struct Bins {
  bool by_key;
  float smallest, factor;
  uint32_t low, high, shift;
  // -1 below, kSelectBins above.
  __device__ __forceinline__ int operator()(float score) const {
    if (!by_key) {
      const int bin = static_cast<int>((score - smallest) * factor);  // saturates; NaN gives 0
      return min(max(bin, 0), kSelectBins - 1);
    }
    const uint32_t key = order_key(score);
    return key < low ? -1 : key > high ? kSelectBins : static_cast<int>((key - low) >> shift);
  }
};

// Selects blocks of the row into s.bitmap (words up to ceil(n / 32)). All kThreads threads of the block call
// it; it ends with __syncthreads(). `share` (may be null) is written by thread 0.
template <int kThreads>
__device__ void select_row_bitmap(const float* __restrict__ scores, const SelectRow& row,
                                  const SelectConstants& constants, float* share, SelectShared& s) {
  constexpr int kWarps = kThreads / 32;
  constexpr int kTile = kThreads * kSelectItems;
  constexpr int kBinsPerThread = kSelectBins / kThreads;
  constexpr uint32_t kAllLanes = 0xffffffffu;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int n = row.num_blocks, words = (n + 31) / 32;

  if (row.take_all != 0) {
    for (int w = tid; w < words; w += kThreads)
      s.bitmap[w] = n - w * 32 >= 32 ? kAllLanes : (1u << (n - w * 32)) - 1;
    if (tid == 0 && share != nullptr) *share = 1.0f;
    __syncthreads();
    return;
  }
  const bool top_p = constants.rules.mode == SelectMode::kTopP;
  const bool with_mass = top_p || share != nullptr;
  const float minus_infinity = bits_float(0xff800000u), not_residual = bits_float(0x7fffffffu);
  const int tiles = (n + kTile - 1) / kTile;
  float score[kSelectItems];  // NaN marks what is not residual

  const auto load_tile = [&](int tile) {
    if (tile == 0 && tiles == 1) return;
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const int block = tile * kTile + i * kThreads + tid;
      score[i] = block >= row.residual_begin && block < row.residual_end ? canonical_score(scores[block])
                                                                         : not_residual;
    }
  };
  const auto clear_bins = [&]() {
    for (int i = tid; i < kSelectBins; i += kThreads) s.count[i] = s.mass_low[i] = s.mass_high[i] = 0;
  };

  // Smallest finite-or-greater and largest score.
  uint32_t largest_key = 0, smallest_key = 0xffffffffu;
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const int block = tile * kTile + i * kThreads + tid;
      score[i] = block >= row.residual_begin && block < row.residual_end ? canonical_score(scores[block])
                                                                         : not_residual;
      if (score[i] == score[i]) {
        const uint32_t key = order_key(score[i]);
        largest_key = max(largest_key, key);
        if (score[i] != minus_infinity) smallest_key = min(smallest_key, key);
      }
    }
  }
  clear_bins();
  largest_key = ptx::reduce_max(largest_key);
  smallest_key = ptx::reduce_min(smallest_key);
  if (lane == 0) s.warp_a[warp] = largest_key, s.warp_b[warp] = smallest_key;
  if (tid == 0) {
    s.base_mass = s.covered = s.total = 0;
    s.base_count = s.num_candidates = 0;
  }
  __syncthreads();
  largest_key = ptx::reduce_max(s.warp_a[lane % kWarps]);
  smallest_key = ptx::reduce_min(s.warp_b[lane % kWarps]);
  const float largest = score_of_key(largest_key);
  const bool any_mass = largest != minus_infinity;
  const auto mass = [&](float x) { return any_mass ? mass_of(x, largest, constants.scale) : 0u; };

  Bins bins = {};
  bins.smallest = any_mass ? score_of_key(smallest_key) : 0.0f;
  bins.factor = any_mass ? static_cast<float>(kSelectBins - 1) / (largest - bins.smallest) : 0.0f;
  unsigned long long target = 0;
  bool first = true, equal_ties = false;

  for (;;) {
    // 1. Histogram.
    for (int tile = 0; tile < tiles; ++tile) {
      load_tile(tile);
#pragma unroll
      for (int i = 0; i < kSelectItems; ++i) {
        if (score[i] != score[i]) continue;
        const int bin = bins(score[i]);
        if (bin < 0 || bin >= kSelectBins) continue;
        atomicAdd(&s.count[bin], 1u);
        if (with_mass) {
          const uint32_t m = mass(score[i]);
          if (m & ((1u << kMassSplit) - 1)) atomicAdd(&s.mass_low[bin], m & ((1u << kMassSplit) - 1));
          if (m >> kMassSplit) atomicAdd(&s.mass_high[bin], m >> kMassSplit);
        }
      }
    }
    __syncthreads();

    // 2. Sums from the top bin down; thread t owns bins [top - kBinsPerThread, top).
    uint32_t bin_counts[kBinsPerThread], count_sum = 0;
    unsigned long long bin_masses[kBinsPerThread], mass_sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const int bin = kSelectBins - 1 - (tid * kBinsPerThread + i);
      bin_counts[i] = s.count[bin];
      bin_masses[i] =
          with_mass ? (static_cast<unsigned long long>(s.mass_high[bin]) << kMassSplit) + s.mass_low[bin] : 0;
      count_sum += bin_counts[i];
      mass_sum += bin_masses[i];
    }
    uint32_t count_before = count_sum;
    unsigned long long mass_before = mass_sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t c = __shfl_up_sync(kAllLanes, count_before, offset);
      const unsigned long long m = with_mass ? __shfl_up_sync(kAllLanes, mass_before, offset) : 0;
      if (lane >= offset) count_before += c, mass_before += m;
    }
    if (lane == 31) s.warp_a[warp] = count_before, s.warp_mass[warp] = mass_before;
    count_before -= count_sum;
    mass_before -= mass_sum;
    __syncthreads();
    unsigned long long pass_mass = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const unsigned long long m = s.warp_mass[w];
      if (w < warp) count_before += s.warp_a[w], mass_before += m;
      pass_mass += m;
    }
    if (first) {
      target = top_p ? mass_target(constants.probability, pass_mass) : 0;
      if (tid == 0) s.total = pass_mass;
    }
    // The bin of the last selected block: its first block is within the budget, the next bin's first is not.
    const uint32_t base_count = s.base_count;
    const unsigned long long base_mass = s.base_mass;
    __syncthreads();
    count_before += base_count;
    mass_before += base_mass;
    if (first && tid == 0 && !within_budget(row, top_p, target, 0, 0)) s.bin = kSelectBins, s.bin_count = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const uint32_t count_after = count_before + bin_counts[i];
      const unsigned long long mass_after = mass_before + bin_masses[i];
      if (bin_counts[i] != 0 && within_budget(row, top_p, target, mass_before, count_before) &&
          !within_budget(row, top_p, target, mass_after, count_after)) {
        s.bin = kSelectBins - 1 - (tid * kBinsPerThread + i);
        s.bin_count = bin_counts[i];
        s.base_count = count_before;
        s.base_mass = mass_before;
      }
      count_before = count_after;
      mass_before = mass_after;
    }
    __syncthreads();
    first = false;
    if (s.bin_count <= kSelectCandidates) break;
    if (bins.by_key && bins.low == bins.high) {
      equal_ties = true;
      break;
    }

    // 3. Too many: split the bin, by the keys it really holds.
    uint32_t low = 0xffffffffu, high = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      load_tile(tile);
#pragma unroll
      for (int i = 0; i < kSelectItems; ++i) {
        if (score[i] != score[i] || bins(score[i]) != static_cast<int>(s.bin)) continue;
        const uint32_t key = order_key(score[i]);
        low = min(low, key);
        high = max(high, key);
      }
    }
    clear_bins();
    low = ptx::reduce_min(low);
    high = ptx::reduce_max(high);
    if (lane == 0) s.warp_a[warp] = high, s.warp_b[warp] = low;
    __syncthreads();
    bins.by_key = true;
    bins.high = ptx::reduce_max(s.warp_a[lane % kWarps]);
    bins.low = ptx::reduce_min(s.warp_b[lane % kWarps]);
    const int width = 32 - __clz(static_cast<int>(bins.high - bins.low));  // bits of the range; 0 when equal
    bins.shift = width > 11 ? width - 11 : 0;
    __syncthreads();
  }

  // 4. The bitmap: reserved blocks, bins above, and the candidates of the bin (or its ties) apart.
  const int chosen_bin = static_cast<int>(s.bin);
  for (int tile = 0; tile < tiles; ++tile) {
    load_tile(tile);
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const int block = tile * kTile + i * kThreads + tid;
      const bool residual = score[i] == score[i];
      const int bin = residual ? bins(score[i]) : -1;
      const bool above = residual ? bin > chosen_bin : block < n;
      const bool inside = residual && bin == chosen_bin;
      const uint32_t above_word = __ballot_sync(kAllLanes, above),
                     inside_word = __ballot_sync(kAllLanes, inside);
      const int w = (tile * kTile + i * kThreads) / 32 + warp;
      if (lane == 0 && w < words) {
        s.bitmap[w] = above_word;
        if (equal_ties) s.ties[w] = inside_word;
      }
      if (inside && !equal_ties) {
        const uint32_t at = atomicAdd(&s.num_candidates, 1u);
        s.candidate_key[at] = order_key(score[i]);
        s.candidate_mass[at] = with_mass ? mass(score[i]) : 0;
        s.candidate_block[at] = block;
      }
    }
  }
  __syncthreads();

  if (equal_ties) {
    const uint32_t each = with_mass ? mass(score_of_key(bins.low)) : 0;
    unsigned long long nucleus = 0;
    if (top_p && each != 0 && s.base_mass < target) nucleus = (target - s.base_mass + each - 1) / each;
    unsigned long long position = s.base_count + nucleus;
    position = max(position, static_cast<unsigned long long>(row.min_residual));
    position = min(position, static_cast<unsigned long long>(row.max_residual));
    const uint32_t taken = min(static_cast<uint32_t>(position - s.base_count), s.bin_count);
    // Lowest indices first: a word keeps its first (taken - ties before it) ties.
    uint32_t carried = 0;
    for (int base = 0; base < words; base += kThreads) {
      const int w = base + tid;
      uint32_t word = w < words ? s.ties[w] : 0;
      const uint32_t own = __popc(word);
      uint32_t before = own;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t c = __shfl_up_sync(kAllLanes, before, offset);
        if (lane >= offset) before += c;
      }
      if (lane == 31) s.warp_a[warp] = before;
      before += carried - own;
      __syncthreads();
      for (int v = 0; v < kWarps; ++v) {
        if (v < warp) before += s.warp_a[v];
        carried += s.warp_a[v];
      }
      if (w < words && before < taken) {
        uint32_t keep = taken - before, kept = 0;
        for (; keep > 0 && word != 0; --keep) {
          kept |= word & (~word + 1);
          word &= word - 1;
        }
        s.bitmap[w] |= kept;
      }
      __syncthreads();
    }
    if (tid == 0) s.covered = s.base_mass + static_cast<unsigned long long>(taken) * each;
  } else {
    const int candidates = static_cast<int>(s.num_candidates);
    for (int c = tid; c < candidates; c += kThreads) {
      const uint32_t key = s.candidate_key[c];
      const int block = s.candidate_block[c];
      uint32_t position = s.base_count;
      unsigned long long before = s.base_mass;
      for (int other = 0; other < candidates; ++other) {
        const uint32_t other_key = s.candidate_key[other];
        if (other_key > key || (other_key == key && s.candidate_block[other] < block)) {
          ++position;
          before += s.candidate_mass[other];
        }
      }
      if (within_budget(row, top_p, target, before, position)) {
        atomicOr(&s.bitmap[block / 32], 1u << (block % 32));
        if (share != nullptr) atomicAdd(&s.covered, static_cast<unsigned long long>(s.candidate_mass[c]));
      }
    }
    __syncthreads();
    if (tid == 0) s.covered += s.base_mass;
  }
  if (tid == 0 && share != nullptr)
    *share = s.total == 0 ? 1.0f
                          : static_cast<float>(static_cast<double>(s.covered) / static_cast<double>(s.total));
  __syncthreads();
}

// Blocks in the bitmap, to every thread. Ends with __syncthreads().
template <int kThreads>
__device__ int count_bitmap(SelectShared& s, int num_blocks) {
  int own = 0;
  for (int w = threadIdx.x; w < (num_blocks + 31) / 32; w += kThreads) own += __popc(s.bitmap[w]);
  own = __reduce_add_sync(0xffffffffu, own);
  if (threadIdx.x % 32 == 0) s.warp_b[threadIdx.x / 32] = static_cast<uint32_t>(own);
  __syncthreads();
  return static_cast<int>(
      __reduce_add_sync(0xffffffffu, threadIdx.x % 32 < kThreads / 32 ? s.warp_b[threadIdx.x % 32] : 0u));
}

// Lists the bitmap's blocks in ascending order: `write(position, block)` for each, positions from 0. Returns
// the count, to every thread. write is called by whichever thread holds the word.
template <int kThreads, typename Write>
__device__ int list_bitmap(SelectShared& s, int num_blocks, const Write& write) {
  constexpr int kWarps = kThreads / 32;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (num_blocks + 31) / 32;
  int total = 0;
  for (int base = 0; base < words; base += kThreads) {
    const int w = base + tid;
    uint32_t word = w < words ? s.bitmap[w] : 0;
    const int own = __popc(word);
    int before = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int c = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += c;
    }
    if (lane == 31) s.warp_a[warp] = before;
    before += total - own;
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kWarps; ++v) {
      if (v < warp) before += s.warp_a[v];
      total += s.warp_a[v];
    }
    for (; word != 0; word &= word - 1) write(before++, w * 32 + __ffs(static_cast<int>(word)) - 1);
    __syncthreads();
  }
  return total;
}

}  // namespace spot::kernels
