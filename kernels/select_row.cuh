// Selection of one row by one thread block, without a sort. Used by select_blocks.cu and by the fused decode
// kernel, where it lies on the critical path: what counts there is the number of dependent steps and the
// amount of code that runs once (a layer's weights wash it out of the caches before the next layer comes),
// not bytes. Hence loops that seldom turn twice are not unrolled, and masses are a template parameter.
// select_from_candidates, the usual case:
// 1. A budget of k blocks can only fall on scores >= the k-th largest of any subset's scores; the subset is
//    each thread's largest scores, one or four a thread. A few halvings of their range find a bound that a
//    little more than k of them reach. What reaches it are the candidates, some 350 of 8192 blocks for
//    k = 232; they are listed.
// 2. They fall into 1024 bins, linear in the score. Counts, and for top_p the integer masses, are summed per
//    bin; a scan from the top finds the bin in which the budget ends. Bins above it are selected whole.
// 3. The few members of that bin are ranked among each other exactly, by (score, index).
// select_from_all, where that cannot work (k too large, plateaus of equal scores, a nucleus longer than
// supposed): all residual blocks are the candidates, and a bin with too many members is split again, linearly
// in the integer order of its scores, at most three times; if all its scores are equal, the ties are taken by
// lowest index. All sums are of integers, so the order of atomics cannot matter, and both give the same
// blocks.
// A threshold needs neither order nor bins (select_threshold.cuh); only where floor or cap bind does
// select_from_all choose their number of blocks.
#pragma once

#include <type_traits>

#include "kernels/select_task.cuh"
#include "kernels/select_threshold.cuh"

namespace spot::kernels {

template <bool kMass>
__device__ __forceinline__ void add_to_bin(const SelectTask<kMass>& task, uint32_t key, uint32_t largest_key,
                                           int bin, SelectShared& s) {
  atomicAdd(&s.count[bin], 1u);
  if (task.with_mass) {
    const uint32_t m = task.mass(key, largest_key), low = m & ((1u << kMassSplit) - 1),
                   high = m >> kMassSplit;
    if (low != 0) atomicAdd(&s.mass_low[bin], low);
    if (high != 0) atomicAdd(&s.mass_high[bin], high);
  }
}

// Sums bins from the top down and finds the one in which the budget ends: s.bin, s.bin_count, and
// s.base_count and s.base_mass of what lies above it, starting from what these two hold. s.bin is kSelectBins
// where nothing is selected. Clears the bins. Thread t owns bins kSelectBins - 1 - 2t and the one below.
// False if the budget reaches beyond the bins. Two barriers.
template <bool kWithMass>
__device__ __forceinline__ bool find_bin(const SelectTask<kWithMass>& task, unsigned long long target,
                                         SelectShared& s) {
  using Mass = std::conditional_t<kWithMass, unsigned long long, uint32_t>;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, top = kSelectBins - 1 - 2 * tid;
  uint32_t counts[2];
  Mass masses[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    counts[i] = s.count[top - i];
    s.count[top - i] = 0;
    if constexpr (kWithMass) {
      masses[i] = (static_cast<Mass>(s.mass_high[top - i]) << kMassSplit) + s.mass_low[top - i];
      s.mass_high[top - i] = s.mass_low[top - i] = 0;
    }
  }
  uint32_t position = warp_inclusive_sum(counts[0] + counts[1], lane);
  Mass before = kWithMass ? warp_inclusive_sum(masses[0] + masses[1], lane) : 0;
  if (lane == 31) {
    s.warp_a[0][warp] = position;
    if constexpr (kWithMass) s.warp_mass[warp] = before;
  }
  position += s.base_count - counts[0] - counts[1];
  if constexpr (kWithMass) before += s.base_mass - masses[0] - masses[1];
  if (tid == 0) s.bin = kSelectBins, s.bin_count = 0;
  __syncthreads();
  position += __reduce_add_sync(kAllLanes, lane < warp ? s.warp_a[0][lane] : 0u);
  if constexpr (kWithMass) before += warp_sum(lane < warp ? s.warp_mass[lane] : 0ull);
  // The bin of the last selected block: its first block is within the budget, the next bin's first is not.
  bool within = task.within_budget(target, before, position);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool after = task.within_budget(target, before + masses[i], position + counts[i]);
    if (counts[i] != 0 && within && !after) {
      s.bin = static_cast<uint32_t>(top - i);
      s.bin_count = counts[i];
      s.base_count = position;
      if constexpr (kWithMass) s.base_mass = before;
    }
    within = after;
    position += counts[i];
    before += masses[i];
  }
  if (tid == kSelectThreads - 1) s.warp_b[0] = within ? 1 : 0;
  __syncthreads();
  return s.warp_b[0] == 0;
}

template <bool kMass>
__device__ __forceinline__ void keep_few(const SelectTask<kMass>& task, uint32_t key, uint32_t largest_key,
                                         int block, SelectShared& s) {
  const uint32_t at = atomicAdd(&s.num_few, 1u);
  s.few[at] = static_cast<unsigned long long>(key) << 32 | ~static_cast<uint32_t>(block);
  if (task.with_mass) s.few_mass[at] = task.mass(key, largest_key);
}
// Ranks the bin's few members and selects those within the budget. A barrier must follow.
template <bool kMass>
__device__ __forceinline__ void take_few(const SelectTask<kMass>& task, unsigned long long target,
                                         SelectShared& s) {
  const int members = static_cast<int>(s.num_few), tid = threadIdx.x;
  if (tid >= members) return;
  const unsigned long long own = s.few[tid];
  const int block = static_cast<int>(~static_cast<uint32_t>(own));
  uint32_t position = s.base_count;
  unsigned long long before = s.base_mass;
  if (task.with_mass) {
#pragma unroll 4
    for (int other = 0; other < members; ++other) {
      const bool earlier = s.few[other] > own;
      position += earlier ? 1 : 0;
      before += earlier ? s.few_mass[other] : 0;
    }
  } else {
#pragma unroll 4
    for (int other = 0; other < members; ++other) position += s.few[other] > own ? 1 : 0;
  }
  if (!task.within_budget(target, before, position)) return;
  atomicOr(&s.bitmap[block / 32], 1u << (block % 32));
  atomicAdd(&s.taken, 1u);
  if (task.with_mass) atomicAdd(&s.covered, static_cast<unsigned long long>(s.few_mass[tid]));
}
// How many of the threads' largest reach `bound`. Calls in a row alternate `buffer`. One barrier.
__device__ __forceinline__ int count_largest(const float (&best)[4], bool one, float bound, int buffer,
                                             SelectShared& s) {
  const int lane = threadIdx.x % 32;
  uint32_t count = __popc(__ballot_sync(kAllLanes, best[0] >= bound));
  if (!one) {
#pragma unroll
    for (int i = 1; i < 4; ++i) count += __popc(__ballot_sync(kAllLanes, best[i] >= bound));
  }
  if (lane == 0) s.warp_a[buffer][threadIdx.x / 32] = count;
  __syncthreads();
  return static_cast<int>(__reduce_add_sync(kAllLanes, lane < kSelectWarps ? s.warp_a[buffer][lane] : 0u));
}

// Selects into the bitmap and returns the number of blocks to every thread, or -1 where this way cannot work;
// ends with a barrier. The row must not be take_all. `chosen(block)` is called for residual blocks as soon as
// they are known to be selected, by any thread; not for all.
template <bool kMass, typename Chosen>
__device__ __forceinline__ int select_from_candidates(const SelectTask<kMass>& task, float* share,
                                                      const Chosen& chosen, SelectShared& s) {
  const SelectRow& row = task.row;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (row.num_blocks + 31) / 32;
  const float minus_infinity = bits_float(0xff800000u);
  // A nucleus longer than supposed costs select_from_all; one shorter, some candidates too many.
  const int supposed = task.top_p ? min(row.max_residual, 5 * kSelectThreads / 2) : row.max_residual;
  if (supposed == 0 || supposed > 5 * kSelectThreads / 2) return -1;
  const bool one = supposed <= 3 * kSelectThreads / 4;  // one a thread suffices
  const auto residual_score = [&](int block) {          // NaN for what is not residual
    return task.residual(block) ? task.scores[block] : bits_float(0x7fffffffu);
  };

  // The thread's largest scores, of every fourth block it looks at; and a bitmap of the reserved blocks, and
  // clear bins.
  float best[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  // The scores stay in registers until they are compared with the bound, unless the row is too long for that.
  float own_scores[kSelectItems];
  const auto load_scores = [&](int first) {
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) own_scores[i] = residual_score(first + lane + i * kSelectThreads);
  };
#pragma unroll 1
  for (int first = warp * 32; first < row.residual_end; first += kSelectItems * kSelectThreads) {
    load_scores(first);
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) best[i % 4] = fmaxf(best[i % 4], own_scores[i]);
  }
#pragma unroll 1
  for (int w = tid; w < words; w += kSelectThreads) {
    const int at = w * 32;
    s.bitmap[w] = bits_below(max(row.residual_begin - at, 0)) |
                  (bits_below(max(row.num_blocks - at, 0)) & ~bits_below(max(row.residual_end - at, 0)));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    s.count[tid + i * kSelectThreads] = 0;
    if (kMass) s.mass_low[tid + i * kSelectThreads] = s.mass_high[tid + i * kSelectThreads] = 0;
  }
  if (tid == 0) {
    s.base_mass = s.covered = 0;
    s.base_count = s.num_candidates = s.num_few = s.taken = 0;
  }
  const float top = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3])) + 0.0f;
  if (one) best[0] = top;
  uint32_t low = best[0] != minus_infinity ? order_key(best[0] + 0.0f) : 0xffffffffu;
  if (!one) {
#pragma unroll
    for (int i = 1; i < 4; ++i)
      if (best[i] != minus_infinity) low = min(low, order_key(best[i] + 0.0f));
  }
  const uint32_t warp_high = ptx::reduce_max(order_key(top)), warp_low = ptx::reduce_min(low);
  uint32_t valid = __popc(__ballot_sync(kAllLanes, best[0] != minus_infinity));
  if (!one) {
#pragma unroll
    for (int i = 1; i < 4; ++i) valid += __popc(__ballot_sync(kAllLanes, best[i] != minus_infinity));
  }
  if (lane == 0) s.warp_a[2][warp] = warp_high, s.warp_b[warp] = warp_low, s.warp_a[3][warp] = valid;
  __syncthreads();
  const uint32_t largest_key = ptx::reduce_max(s.warp_a[2][lane % kSelectWarps]);
  low = ptx::reduce_min(s.warp_b[lane % kSelectWarps]);
  int reached = static_cast<int>(__reduce_add_sync(kAllLanes, lane < kSelectWarps ? s.warp_a[3][lane] : 0u));
  if (reached < supposed) return -1;

  // Halve [bound, above) while far more than `supposed` of the largest reach bound.
  float bound = score_of_key(low), above = score_of_key(largest_key);
  const int enough = supposed + (one ? supposed / 2 + 16 : 128);
#pragma unroll 1
  for (int step = 0; step < 12 && reached > enough; ++step) {
    const float middle = bound + 0.5f * (above - bound);
    if (!(middle > bound && middle < above)) break;
    const int count = count_largest(best, one, middle, step % 2, s);
    if (count >= supposed) {
      bound = middle;
      reached = count;
    } else {
      above = middle;
    }
  }
  const unsigned long long total = task.with_mass ? total_mass(task, largest_key, s) : 0;
  const unsigned long long target = task.top_p ? mass_target(task.probability, total) : 0;

  // What reaches the bound is listed first: then a thread has one candidate or two, where a warp's most would
  // hold up the others.
#pragma unroll 1
  for (int first = warp * 32; first < row.residual_end; first += kSelectItems * kSelectThreads) {
    const int base = first + lane;
    uint32_t mask = 0;
    if (row.residual_end > kSelectItems * kSelectThreads) load_scores(first);
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i)
      if (own_scores[i] >= bound) mask |= 1u << i;
    const uint32_t own = __popc(mask), up_to = warp_inclusive_sum(own, lane);
    uint32_t at = lane == 31 ? atomicAdd(&s.num_candidates, up_to) : 0;
    at = __shfl_sync(kAllLanes, at, 31) + up_to - own;
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1, ++at)
      if (at < kSelectCandidates)
        s.candidates[at] = static_cast<uint16_t>(base + (__ffs(static_cast<int>(mask)) - 1) * kSelectThreads);
  }
  __syncthreads();
  const int candidates = static_cast<int>(s.num_candidates);
  if (candidates > kSelectCandidates) return -1;
  const auto each_candidate = [&](const auto& visit) {
#pragma unroll 1
    for (int i = tid; i < candidates; i += kSelectThreads) {
      const int block = s.candidates[i];
      visit(order_key(task.scores[block] + 0.0f), block);
    }
  };
  const float factor = static_cast<float>(kSelectBins - 1) / (score_of_key(largest_key) - bound);
  const auto bin_of = [&](uint32_t key) { return bin_at((score_of_key(key) - bound) * factor); };
  each_candidate([&](uint32_t key, int) { add_to_bin(task, key, largest_key, bin_of(key), s); });
  __syncthreads();
  const bool found = find_bin(task, target, s);
  if (!found || s.bin_count > kSelectFew) return -1;

  const int last_bin = static_cast<int>(s.bin);
  each_candidate([&](uint32_t key, int block) {
    const int bin = bin_of(key);
    if (bin > last_bin) {
      chosen(block);
      atomicOr(&s.bitmap[block / 32], 1u << (block % 32));
    }
    if (bin == last_bin) keep_few(task, key, largest_key, block, s);
  });
  __syncthreads();
  take_few(task, target, s);
  __syncthreads();
  if (kMass && tid == 0 && share != nullptr) store_share(share, s.covered + s.base_mass, total);
  return task.reserved_blocks() + static_cast<int>(s.base_count + s.taken);
}

// The bins of one pass of select_from_all: linear in the score, or in its order_key between `low` and `high`.
struct Bins {
  bool by_key;
  float smallest, factor;
  uint32_t low, high, shift;
  // -1 below, kSelectBins above.
  __device__ __forceinline__ int operator()(uint32_t key) const {
    if (!by_key) return bin_at((score_of_key(key) - smallest) * factor);
    return key < low ? -1 : key > high ? kSelectBins : static_cast<int>((key - low) >> shift);
  }
};

// All members of the last bin have the key `key`: the lowest indices of s.ties. Returns how many.
template <bool kMass>
__device__ __forceinline__ uint32_t take_ties(const SelectTask<kMass>& task, uint32_t key,
                                              uint32_t largest_key, unsigned long long target,
                                              SelectShared& s) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (task.row.num_blocks + 31) / 32;
  const uint32_t each = task.with_mass ? task.mass(key, largest_key) : 0;
  unsigned long long nucleus = 0;
  if (task.top_p && each != 0 && s.base_mass < target) nucleus = (target - s.base_mass + each - 1) / each;
  unsigned long long position = s.base_count + nucleus;
  position = max(position, static_cast<unsigned long long>(task.row.min_residual));
  position = min(position, static_cast<unsigned long long>(task.row.max_residual));
  const uint32_t taken = min(static_cast<uint32_t>(position - s.base_count), s.bin_count);
  uint32_t carried = 0;
  for (int base = 0; base < words; base += kSelectThreads) {
    const int w = base + tid;
    uint32_t word = w < words ? s.ties[w] : 0;
    const uint32_t own = __popc(word);
    uint32_t before = warp_inclusive_sum(own, lane);
    if (lane == 31) s.warp_a[0][warp] = before;
    before += carried - own;
    __syncthreads();
    for (int v = 0; v < kSelectWarps; ++v) {
      if (v < warp) before += s.warp_a[0][v];
      carried += s.warp_a[0][v];
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
  if (tid == 0) {
    s.taken = taken;
    s.covered = static_cast<unsigned long long>(taken) * each;
  }
  return taken;
}

// As select_from_candidates, for every row; out of line, as it seldom runs.
template <bool kMass>
static __device__ __attribute__((noinline)) int select_from_all(const SelectTask<kMass> task, float* share,
                                                                SelectShared& s) {
  const SelectRow& row = task.row;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (row.num_blocks + 31) / 32;
  const uint32_t minus_infinity = order_key(bits_float(0xff800000u));
  const auto each_block = [&](const auto& visit) {
#pragma unroll 4
    for (int block = row.residual_begin + tid; block < row.residual_end; block += kSelectThreads)
      visit(order_key(canonical_score(task.scores[block])));
  };
  // Smallest and largest of `wanted` keys, to every thread.
  const auto range = [&](const auto& wanted, uint32_t& low, uint32_t& high) {
    low = 0xffffffffu, high = 0;
    each_block([&](uint32_t key) {
      if (!wanted(key)) return;
      low = min(low, key);
      high = max(high, key);
    });
    low = ptx::reduce_min(low);
    high = ptx::reduce_max(high);
    __syncthreads();
    if (lane == 0) s.warp_a[0][warp] = high, s.warp_b[warp] = low;
    __syncthreads();
    high = ptx::reduce_max(s.warp_a[0][lane % kSelectWarps]);
    low = ptx::reduce_min(s.warp_b[lane % kSelectWarps]);
    __syncthreads();
  };
  for (int i = tid; i < kSelectBins; i += kSelectThreads) s.count[i] = s.mass_low[i] = s.mass_high[i] = 0;
  Bins bins = {};
  uint32_t smallest, largest_key;
  range([&](uint32_t key) { return key > minus_infinity; }, smallest, largest_key);
  largest_key = max(largest_key, minus_infinity);  // all -infinity: nothing was above it
  if (largest_key != minus_infinity) {
    bins.smallest = score_of_key(smallest);
    bins.factor = static_cast<float>(kSelectBins - 1) / (score_of_key(largest_key) - bins.smallest);
  }
  if (tid == 0) {
    s.base_mass = s.covered = 0;
    s.base_count = s.num_few = s.taken = 0;
  }
  const unsigned long long total = task.with_mass ? total_mass(task, largest_key, s) : 0;
  const unsigned long long target = task.top_p ? mass_target(task.probability, total) : 0;
  __syncthreads();

  bool equal_ties = false;
  for (;;) {
    each_block([&](uint32_t key) {
      const int bin = bins(key);
      if (bin >= 0 && bin < kSelectBins) add_to_bin(task, key, largest_key, bin, s);
    });
    __syncthreads();
    find_bin(task, target, s);

    if (s.bin_count <= kSelectFew) break;
    if (bins.by_key && bins.low == bins.high) {
      equal_ties = true;
      break;
    }
    // Too many: the bin's members become the range of the next pass, by the keys they really have.
    uint32_t low, high;
    const int split = static_cast<int>(s.bin);
    range([&](uint32_t key) { return bins(key) == split; }, low, high);
    bins.by_key = true;
    bins.low = low;
    bins.high = high;
    const int width = 32 - __clz(static_cast<int>(high - low));  // bits of the range; 0 when equal
    bins.shift = width > 10 ? width - 10 : 0;
  }

  const int chosen = static_cast<int>(s.bin);
  for (int base = 0; base < words * 32; base += kSelectThreads) {
    const int block = base + tid;
    const bool is_residual = task.residual(block);
    const uint32_t key = is_residual ? order_key(canonical_score(task.scores[block])) : 0;
    const int bin = is_residual ? bins(key) : -1;
    const uint32_t above = __ballot_sync(kAllLanes, is_residual ? bin > chosen : block < row.num_blocks);
    const uint32_t inside = __ballot_sync(kAllLanes, is_residual && bin == chosen);
    const int w = base / 32 + warp;
    if (lane == 0 && w < words) {
      s.bitmap[w] = above;
      s.ties[w] = inside;
    }
    if (is_residual && bin == chosen && !equal_ties) keep_few(task, key, largest_key, block, s);
  }
  __syncthreads();
  if (equal_ties)
    take_ties(task, bins.low, largest_key, target, s);
  else
    take_few(task, target, s);
  __syncthreads();
  if (kMass && tid == 0 && share != nullptr) store_share(share, s.covered + s.base_mass, total);
  return task.reserved_blocks() + static_cast<int>(s.base_count + s.taken);
}

// Selects blocks of a row into s.bitmap and returns their number, to every thread; ends with a barrier. All
// kSelectThreads threads of the block call it. `scores` may be in global memory, or what copy_scores began to
// copy. `threshold` is that of the row's set; `share` (may be null, must be without kMass) is written by thread 0;
// `chosen` as above.
template <bool kMass, typename Chosen>
__device__ __forceinline__ int select_row_bitmap(const float* scores, const SelectRow& row,
                                                 const SelectConstants& constants, double threshold,
                                                 float* share, const Chosen& chosen, SelectShared& s) {
  ptx::cp_async_wait<0>();
  if (row.take_all != 0) {
    const int words = (row.num_blocks + 31) / 32;
#pragma unroll 1
    for (int w = threadIdx.x; w < words; w += kSelectThreads)
      s.bitmap[w] = bits_below(row.num_blocks - w * 32);
    if (threadIdx.x == 0 && share != nullptr) *share = 1.0f;
    __syncthreads();
    return row.num_blocks;
  }
  SelectTask<kMass> task(scores, row, constants, share != nullptr);
  if constexpr (kMass) {
    if (constants.rules.mode == SelectionMode::threshold) {
      const int heavy = select_by_threshold(task, threshold, share, chosen, s);
      return heavy >= 0 ? heavy : select_from_all(task, share, s);
    }
  }
  int count = select_from_candidates(task, share, chosen, s);
  if (count < 0) {
    __syncthreads();
    count = select_from_all(task, share, s);
  }
  return count;
}

// Lists the bitmap's blocks in ascending order: `write(position, block)` for positions [begin, end), a thread
// a position: it finds the position's word among the words' first positions, then the bit. (Threads that
// write the bits of their own word leave most others idle: reserved blocks fill whole words.) Ends with a
// barrier.
template <typename Write>
__device__ __forceinline__ void list_bitmap(SelectShared& s, int num_blocks, int begin, int end,
                                            const Write& write) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (num_blocks + 31) / 32;
  uint32_t total = 0;
#pragma unroll 1
  for (int base = 0; base < words; base += kSelectThreads) {
    const int at = base + tid;
    const uint32_t own = at < words ? __popc(s.bitmap[at]) : 0;
    const uint32_t up_to = warp_inclusive_sum(own, lane);
    if (lane == 31) s.warp_a[0][warp] = up_to;
    __syncthreads();
    const uint32_t sums = lane < kSelectWarps ? s.warp_a[0][lane] : 0u;
    const uint32_t before = __reduce_add_sync(kAllLanes, lane < warp ? sums : 0u);
    if (at < words) s.first_position[at] = total + before + up_to - own;
    if (base + kSelectThreads < words) total += __reduce_add_sync(kAllLanes, sums);
    __syncthreads();
  }
#pragma unroll 1
  for (int position = begin + tid; position < end; position += kSelectThreads) {
    const auto wanted = static_cast<uint32_t>(position);
    int low = 0,
        high = words;  // the last word whose first position is not beyond: empty words before it share it
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (s.first_position[middle] <= wanted)
        low = middle;
      else
        high = middle;
    }
    uint32_t bits = s.bitmap[low], left = wanted - s.first_position[low];
    int bit = 0;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      const uint32_t lower = __popc(bits & ((1u << half) - 1));
      if (left >= lower) {
        left -= lower;
        bits >>= half;
        bit += half;
      }
    }
    write(position, low * 32 + bit);
  }
  __syncthreads();
}

}  // namespace spot::kernels
