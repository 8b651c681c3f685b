// Selection of one row by one thread block, without a sort. Used by select_blocks.cu and by the fused decode
// kernel, where it lies on the critical path: what counts is the number of dependent steps, not bytes.
//
// 1. Candidates. A budget of k blocks can only fall on scores >= the k-th largest of any subset's scores; the
// subset is
//    each thread's largest scores, one or four a thread. A few halvings of their range find a bound that a
//    little more than k of them reach, and everything that reaches it is listed: 300 to 500 of 8192 blocks
//    for k = 232. Where that cannot work (k too large, a plateau of equal scores, a nucleus longer than
//    supposed), all residual blocks are the candidates.
// 2. Candidates fall into 1024 bins that keep the order of scores: first linear in the score, which spreads
// real scores
//    well. Counts, and for top_p the integer masses, are summed per bin; a scan from the top finds the bin in
//    which the budget ends. Bins above it are selected whole.
// 3. The few members of that bin are ranked among each other exactly, by (score, index). A bin with too many
// members is
//    split again, linearly in the integer order of its scores, at most three times; if all its scores are
//    equal, the ties are taken by lowest index from a bitmap.
// All sums are of integers, so the order of atomics cannot matter.
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

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kSelectItems = 16;  // scores a thread holds at once
constexpr int kSelectTile = kSelectThreads * kSelectItems;
constexpr int kSelectBins = 2 * kSelectThreads;
constexpr int kSelectCandidates = 2048;
constexpr int kSelectFew = 256;  // members of a bin that are ranked
constexpr int kMassSplit =
    12;  // bins sum the low 12 bits of masses and the rest apart, so that neither overflows
constexpr uint32_t kAllLanes = 0xffffffffu;

struct SelectShared {
  uint32_t bitmap[kMaxSelectBlocks / 32];  // the selected blocks
  union {
    struct {
      uint32_t key[kSelectCandidates];
      int32_t block[kSelectCandidates];
    } candidates;
    uint32_t ties[kMaxSelectBlocks / 32];  // only where all blocks are candidates
  };
  uint32_t count[kSelectBins];
  uint32_t mass_low[kSelectBins];
  uint32_t mass_high[kSelectBins];
  struct {
    uint32_t key[kSelectFew];
    uint32_t mass[kSelectFew];
    int32_t block[kSelectFew];
  } few;
  uint32_t warp_a[2][32], warp_b[32];
  unsigned long long warp_mass[32];
  unsigned long long base_mass, covered;
  uint32_t base_count, bin, bin_count, num_few, num_candidates, taken;
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
  __device__ __forceinline__ int operator()(uint32_t key) const {
    if (!by_key) {
      const int bin = static_cast<int>((score_of_key(key) - smallest) * factor);  // saturates; NaN gives 0
      return min(max(bin, 0), kSelectBins - 1);
    }
    return key < low ? -1 : key > high ? kSelectBins : static_cast<int>((key - low) >> shift);
  }
};

__device__ __forceinline__ uint32_t warp_inclusive_sum(uint32_t value, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += other;
  }
  return value;
}

// A thread's first 16 scores, asked for before the row's length is known so that the two latencies overlap.
// Blocks past `allocated` are not touched.
struct FirstScores {
  float score[kSelectItems];
  __device__ __forceinline__ void load(const float* scores, int allocated) {
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const int block = i * kSelectThreads + static_cast<int>(threadIdx.x);
      score[i] = block < allocated ? scores[block] : 0.0f;
    }
  }
};

class RowSelector {
 public:
  // All kSelectThreads threads of the block; `scores` is the row, `row` its budgets.
  __device__ __forceinline__ RowSelector(const float* scores, const SelectRow& row,
                                         const SelectConstants& constants, SelectShared& shared)
      : scores_(scores),
        row_(row),
        constants_(constants),
        s_(shared),
        tid_(threadIdx.x),
        lane_(tid_ % 32),
        warp_(tid_ / 32),
        words_((row.num_blocks + 31) / 32),
        top_p_(constants.rules.mode == SelectMode::kTopP) {}

  // Selects into the bitmap and returns the number of blocks, to every thread; ends with __syncthreads().
  // `share` (may be null) is written by thread 0.
  __device__ __forceinline__ int run(FirstScores& first, float* share) {
    if (row_.take_all != 0) {
      for (int w = tid_; w < words_; w += kSelectThreads)
        s_.bitmap[w] = row_.num_blocks - w * 32 >= 32 ? kAllLanes : (1u << (row_.num_blocks - w * 32)) - 1;
      if (tid_ == 0 && share != nullptr) *share = 1.0f;
      __syncthreads();
      return row_.num_blocks;
    }
    with_mass_ = top_p_ || share != nullptr;
    find_candidates(first);
    const unsigned long long total = with_mass_ ? total_mass() : 0;
    target_ = top_p_ ? mass_target(constants_.probability, total) : 0;
    while (!find_bin()) all_ = true;  // the budget ended beyond the candidates
    mark();
    finish_bin();
    __syncthreads();
    if (tid_ == 0 && share != nullptr)
      *share = total == 0 ? 1.0f
                          : static_cast<float>(static_cast<double>(s_.covered) / static_cast<double>(total));
    return row_.num_blocks - (row_.residual_end - row_.residual_begin) + static_cast<int>(s_.taken);
  }

 private:
  __device__ __forceinline__ bool residual(int block) const {
    return block >= row_.residual_begin && block < row_.residual_end;
  }
  __device__ __forceinline__ uint32_t mass(uint32_t key) const {
    return largest_key_ == order_key(bits_float(0xff800000u))
               ? 0u
               : mass_of(score_of_key(key), score_of_key(largest_key_), constants_.scale);
  }

  // Visits (key, block) of every candidate.
  template <typename Visit>
  __device__ __forceinline__ void each_candidate(const Visit& visit) {
    if (!all_) {
      for (int i = tid_; i < num_candidates_; i += kSelectThreads)
        visit(s_.candidates.key[i], s_.candidates.block[i]);
      return;
    }
#pragma unroll 4
    for (int block = row_.residual_begin + tid_; block < row_.residual_end; block += kSelectThreads)
      visit(order_key(canonical_score(scores_[block])), block);
  }

  // The largest residual score, and the candidates.
  __device__ __forceinline__ void find_candidates(FirstScores& first) {
    const float minus_infinity = bits_float(0xff800000u);
    const int tiles = (row_.num_blocks + kSelectTile - 1) / kSelectTile;
    // The largest scores of the thread's blocks, by i % 4; NaN scores are ignored, as -infinity would be.
    float best[4] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile > 0) load_tile(first, tile);
#pragma unroll
      for (int i = 0; i < kSelectItems; ++i)
        if (residual(tile * kSelectTile + i * kSelectThreads + tid_))
          best[i % 4] = fmaxf(best[i % 4], first.score[i]);
    }
    const int supposed = top_p_ ? min(row_.max_residual, 3 * kSelectThreads / 2) : row_.max_residual;
    if (supposed <= 3 * kSelectThreads / 4) {  // one a thread suffices
      best[0] = fmaxf(fmaxf(best[0], best[1]), fmaxf(best[2], best[3]));
      best[1] = best[2] = best[3] = minus_infinity;
    }
    uint32_t high = 0, low = 0xffffffffu;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = order_key(best[i] + 0.0f);
      high = max(high, key);
      if (best[i] != minus_infinity) low = min(low, key);
    }
    high = ptx::reduce_max(high);
    low = ptx::reduce_min(low);
    if (lane_ == 0) s_.warp_a[0][warp_] = high, s_.warp_b[warp_] = low;
    if (tid_ == 0) {
      s_.base_mass = s_.covered = 0;
      s_.base_count = s_.num_few = s_.num_candidates = s_.taken = 0;
    }
    clear_bins();
    __syncthreads();
    largest_key_ = ptx::reduce_max(s_.warp_a[0][lane_ % kSelectWarps]);
    low = ptx::reduce_min(s_.warp_b[lane_ % kSelectWarps]);
    all_ = true;
    if (supposed == 0 || supposed > 5 * kSelectThreads / 2 || low == 0xffffffffu) return;

    // Halve [bound, above) while far more than `supposed` of the largest reach bound.
    float bound = score_of_key(low), above = score_of_key(largest_key_);
    const int enough = supposed + supposed / 8 + 16;
    int reached = count_largest(best, bound, 1);
    if (reached < supposed) return;
    for (int step = 0; step < 12 && reached > enough; ++step) {
      const float middle = bound + 0.5f * (above - bound);
      if (!(middle > bound && middle < above)) break;
      const int count = count_largest(best, middle, step % 2);
      if (count >= supposed) {
        bound = middle;
        reached = count;
      } else {
        above = middle;
      }
    }
    // List what reaches the bound.
    for (int tile = 0; tile < tiles; ++tile) {
      if (tiles > 1) load_tile(first, tile);
      uint32_t mask = 0;
#pragma unroll
      for (int i = 0; i < kSelectItems; ++i)
        if (first.score[i] >= bound && residual(tile * kSelectTile + i * kSelectThreads + tid_))
          mask |= 1u << i;
      const uint32_t own = __popc(mask), before = warp_inclusive_sum(own, lane_);
      uint32_t at = 0;
      if (lane_ == 31 && before != 0) at = atomicAdd(&s_.num_candidates, before);
      at = __shfl_sync(kAllLanes, at, 31) + before - own;
      for (; mask != 0; mask &= mask - 1, ++at) {
        const int block = tile * kSelectTile + (__ffs(static_cast<int>(mask)) - 1) * kSelectThreads + tid_;
        if (at >= kSelectCandidates) break;
        s_.candidates.key[at] = order_key(canonical_score(scores_[block]));
        s_.candidates.block[at] = block;
      }
    }
    __syncthreads();
    num_candidates_ = static_cast<int>(s_.num_candidates);
    all_ = num_candidates_ > kSelectCandidates;
    bound_ = bound;
  }
  __device__ __forceinline__ void load_tile(FirstScores& first, int tile) {
#pragma unroll
    for (int i = 0; i < kSelectItems; ++i) {
      const int block = tile * kSelectTile + i * kSelectThreads + tid_;
      first.score[i] = scores_[min(block, row_.num_blocks - 1)];
    }
  }
  // How many of the threads' largest reach `bound`. Calls in a row alternate `buffer`.
  __device__ __forceinline__ int count_largest(const float (&best)[4], float bound, int buffer) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) count += __popc(__ballot_sync(kAllLanes, best[i] >= bound));
    if (lane_ == 0) s_.warp_a[buffer][warp_] = count;
    __syncthreads();
    return static_cast<int>(
        __reduce_add_sync(kAllLanes, lane_ < kSelectWarps ? s_.warp_a[buffer][lane_] : 0u));
  }

  // Mass of all residual blocks, to every thread.
  __device__ __forceinline__ unsigned long long total_mass() {
    unsigned long long sum = 0;
#pragma unroll 4
    for (int block = row_.residual_begin + tid_; block < row_.residual_end; block += kSelectThreads)
      sum += mass(order_key(canonical_score(scores_[block])));
    const auto warp_sum = [](unsigned long long value) {  // value < 2^48
      const unsigned long long low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value & 0xffffff));
      return low + (static_cast<unsigned long long>(
                        __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value >> 24)))
                    << 24);
    };
    sum = warp_sum(sum);
    if (lane_ == 0) s_.warp_mass[warp_] = sum;
    __syncthreads();
    sum = warp_sum(lane_ < kSelectWarps ? s_.warp_mass[lane_] : 0ull);
    __syncthreads();
    return sum;
  }

  __device__ __forceinline__ void clear_bins() {
    for (int i = tid_; i < kSelectBins; i += kSelectThreads)
      s_.count[i] = s_.mass_low[i] = s_.mass_high[i] = 0;
  }

  // Finds the bin in which the budget ends, with at most kSelectFew members unless all are equal: s_.bin,
  // s_.bin_count, s_.base_count and s_.base_mass of what lies above it. False if the candidates end first.
  // s_.bin is kSelectBins when nothing residual is selected. Bins are clear when it begins.
  __device__ __forceinline__ bool find_bin() {
    const float largest = score_of_key(largest_key_), minus_infinity = bits_float(0xff800000u);
    bins_ = Bins{};
    bins_.smallest = all_ ? smallest_score() : bound_;
    bins_.factor =
        largest == minus_infinity ? 0.0f : static_cast<float>(kSelectBins - 1) / (largest - bins_.smallest);
    equal_ties_ = false;
    for (;;) {
      each_candidate([&](uint32_t key, int) {
        const int bin = bins_(key);
        if (bin < 0 || bin >= kSelectBins) return;
        atomicAdd(&s_.count[bin], 1u);
        if (with_mass_) {
          const uint32_t m = mass(key), low = m & ((1u << kMassSplit) - 1), high = m >> kMassSplit;
          if (low != 0) atomicAdd(&s_.mass_low[bin], low);
          if (high != 0) atomicAdd(&s_.mass_high[bin], high);
        }
      });
      __syncthreads();
      if (!scan_bins()) return false;
      if (s_.bin_count <= kSelectFew) return true;
      if (bins_.by_key && bins_.low == bins_.high) {
        equal_ties_ = true;
        all_ = true;  // the ties' bitmap lies over the candidates, and takes them from all blocks
        return true;
      }
      split_bin();
    }
  }
  // The smallest residual score above -infinity (any number if there is none).
  __device__ __forceinline__ float smallest_score() {
    uint32_t low = 0xffffffffu;
    const uint32_t minus_infinity = order_key(bits_float(0xff800000u));
    each_candidate([&](uint32_t key, int) { low = key != minus_infinity ? min(low, key) : low; });
    low = ptx::reduce_min(low);
    if (lane_ == 0) s_.warp_b[warp_] = low;
    __syncthreads();
    low = ptx::reduce_min(s_.warp_b[lane_ % kSelectWarps]);
    __syncthreads();
    return low == 0xffffffffu ? 0.0f : score_of_key(low);
  }
  // Sums from the top bin down; thread t owns bins kSelectBins - 1 - 2t and the one below. Clears the bins.
  __device__ __forceinline__ bool scan_bins() {
    const int top = kSelectBins - 1 - 2 * tid_;
    uint32_t counts[2];
    unsigned long long masses[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      counts[i] = s_.count[top - i];
      masses[i] =
          (static_cast<unsigned long long>(s_.mass_high[top - i]) << kMassSplit) + s_.mass_low[top - i];
      s_.count[top - i] = s_.mass_high[top - i] = s_.mass_low[top - i] = 0;
    }
    const uint32_t count_sum = counts[0] + counts[1];
    const unsigned long long mass_sum = masses[0] + masses[1];
    uint32_t position = warp_inclusive_sum(count_sum, lane_);
    unsigned long long before = mass_sum;
    if (with_mass_) {
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned long long other = __shfl_up_sync(kAllLanes, before, offset);
        if (lane_ >= offset) before += other;
      }
    }
    if (lane_ == 31) s_.warp_a[0][warp_] = position, s_.warp_mass[warp_] = before;
    position += s_.base_count - count_sum;
    before += s_.base_mass - mass_sum;
    if (tid_ == 0) s_.bin = kSelectBins, s_.bin_count = 0;
    __syncthreads();
    position += __reduce_add_sync(kAllLanes, lane_ < warp_ ? s_.warp_a[0][lane_] : 0u);
    if (with_mass_)
      for (int w = 0; w < warp_; ++w) before += s_.warp_mass[w];
    // The bin of the last selected block: its first block is within the budget, the next bin's first is not.
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t position_after = position + counts[i];
      const unsigned long long mass_after = before + masses[i];
      const bool after_within = within_budget(row_, top_p_, target_, mass_after, position_after);
      if (counts[i] != 0 && within_budget(row_, top_p_, target_, before, position) && !after_within) {
        s_.bin = static_cast<uint32_t>(top - i);
        s_.bin_count = counts[i];
        s_.base_count = position;
        s_.base_mass = before;
      }
      beyond = after_within;
      position = position_after;
      before = mass_after;
    }
    if (tid_ == kSelectThreads - 1) s_.warp_b[0] = beyond ? 1 : 0;
    __syncthreads();
    return s_.warp_b[0] == 0;
  }
  // The bin's members become the range of the next pass, by the keys they really have.
  __device__ __forceinline__ void split_bin() {
    uint32_t low = 0xffffffffu, high = 0;
    each_candidate([&](uint32_t key, int) {
      if (bins_(key) != static_cast<int>(s_.bin)) return;
      low = min(low, key);
      high = max(high, key);
    });
    low = ptx::reduce_min(low);
    high = ptx::reduce_max(high);
    if (lane_ == 0) s_.warp_a[0][warp_] = high, s_.warp_b[warp_] = low;
    __syncthreads();
    bins_.by_key = true;
    bins_.high = ptx::reduce_max(s_.warp_a[0][lane_ % kSelectWarps]);
    bins_.low = ptx::reduce_min(s_.warp_b[lane_ % kSelectWarps]);
    const int width =
        32 - __clz(static_cast<int>(bins_.high - bins_.low));  // bits of the range; 0 when equal
    bins_.shift = width > 10 ? width - 10 : 0;
    __syncthreads();
  }

  // The bitmap of reserved blocks and of the bins above; the bin's own members apart, in `few` or in `ties`.
  __device__ __forceinline__ void mark() {
    const int chosen = static_cast<int>(s_.bin);
    const auto keep_few = [&](uint32_t key, int block) {
      const uint32_t at = atomicAdd(&s_.num_few, 1u);
      s_.few.key[at] = key;
      s_.few.mass[at] = with_mass_ ? mass(key) : 0;
      s_.few.block[at] = block;
    };
    if (!all_) {
      for (int w = tid_; w < words_; w += kSelectThreads) {
        const int first = w * 32;
        uint32_t word = 0;  // reserved blocks of the word
        if (first < row_.residual_begin || first + 32 > row_.residual_end) {
          const int begin = min(max(row_.residual_begin - first, 0), 32),
                    end = min(max(row_.residual_end - first, 0), 32);
          const int stop = min(row_.num_blocks - first, 32);
          word = bits_below(begin) | (bits_below(stop) & ~bits_below(end));
        }
        s_.bitmap[w] = word;
      }
      __syncthreads();
      each_candidate([&](uint32_t key, int block) {
        const int bin = bins_(key);
        if (bin > chosen) atomicOr(&s_.bitmap[block / 32], 1u << (block % 32));
        if (bin == chosen) keep_few(key, block);
      });
      __syncthreads();
      return;
    }
    for (int base = 0; base < words_ * 32; base += kSelectThreads) {
      const int block = base + tid_;
      const bool is_residual = residual(block);
      const uint32_t key = is_residual ? order_key(canonical_score(scores_[block])) : 0;
      const int bin = is_residual ? bins_(key) : -1;
      const uint32_t above = __ballot_sync(kAllLanes, is_residual ? bin > chosen : block < row_.num_blocks);
      const uint32_t inside = __ballot_sync(kAllLanes, is_residual && bin == chosen);
      const int w = base / 32 + warp_;
      if (lane_ == 0 && w < words_) {
        s_.bitmap[w] = above;
        s_.ties[w] = inside;
      }
      if (is_residual && bin == chosen && !equal_ties_) keep_few(key, block);
    }
    __syncthreads();
  }
  static __device__ __forceinline__ uint32_t bits_below(int n) {
    return n >= 32 ? kAllLanes : (1u << n) - 1;
  }

  // Selects within the bin.
  __device__ __forceinline__ void finish_bin() {
    if (equal_ties_) {
      take_ties();
      return;
    }
    const int members = static_cast<int>(s_.num_few);
    if (tid_ < members) {
      const uint32_t key = s_.few.key[tid_];
      const int block = s_.few.block[tid_];
      uint32_t position = s_.base_count;
      unsigned long long before = s_.base_mass;
      for (int other = 0; other < members; ++other) {
        const uint32_t other_key = s_.few.key[other];
        if (other_key > key || (other_key == key && s_.few.block[other] < block)) {
          ++position;
          before += s_.few.mass[other];
        }
      }
      if (within_budget(row_, top_p_, target_, before, position)) {
        atomicOr(&s_.bitmap[block / 32], 1u << (block % 32));
        atomicAdd(&s_.taken, 1u);
        if (with_mass_) atomicAdd(&s_.covered, static_cast<unsigned long long>(s_.few.mass[tid_]));
      }
    }
    __syncthreads();
    if (tid_ == 0) {
      s_.taken += s_.base_count;
      s_.covered += s_.base_mass;
    }
  }
  // All members have one score: the lowest indices, from the bitmap of ties.
  __device__ __forceinline__ void take_ties() {
    const uint32_t each = with_mass_ ? mass(bins_.low) : 0;
    unsigned long long nucleus = 0;
    if (top_p_ && each != 0 && s_.base_mass < target_) nucleus = (target_ - s_.base_mass + each - 1) / each;
    unsigned long long position = s_.base_count + nucleus;
    position = max(position, static_cast<unsigned long long>(row_.min_residual));
    position = min(position, static_cast<unsigned long long>(row_.max_residual));
    const uint32_t taken = min(static_cast<uint32_t>(position - s_.base_count), s_.bin_count);
    uint32_t carried = 0;
    for (int base = 0; base < words_; base += kSelectThreads) {
      const int w = base + tid_;
      uint32_t word = w < words_ ? s_.ties[w] : 0;
      const uint32_t own = __popc(word);
      uint32_t before = warp_inclusive_sum(own, lane_);
      if (lane_ == 31) s_.warp_a[0][warp_] = before;
      before += carried - own;
      __syncthreads();
      for (int v = 0; v < kSelectWarps; ++v) {
        if (v < warp_) before += s_.warp_a[0][v];
        carried += s_.warp_a[0][v];
      }
      if (w < words_ && before < taken) {
        uint32_t keep = taken - before, kept = 0;
        for (; keep > 0 && word != 0; --keep) {
          kept |= word & (~word + 1);
          word &= word - 1;
        }
        s_.bitmap[w] |= kept;
      }
      __syncthreads();
    }
    if (tid_ == 0) {
      s_.taken = s_.base_count + taken;
      s_.covered = s_.base_mass + static_cast<unsigned long long>(taken) * each;
    }
  }

  const float* scores_;
  const SelectRow& row_;
  const SelectConstants& constants_;
  SelectShared& s_;
  const int tid_, lane_, warp_, words_;
  const bool top_p_;
  bool with_mass_ = false, all_ = true, equal_ties_ = false;
  int num_candidates_ = 0;
  uint32_t largest_key_ = 0;
  float bound_ = 0.0f;
  unsigned long long target_ = 0;
  Bins bins_ = {};
};

// Lists the bitmap's blocks in ascending order: `write(position, block)` for each, positions from 0, called
// by whichever thread holds the word. Ends with __syncthreads().
template <typename Write>
__device__ __forceinline__ void list_bitmap(SelectShared& s, int num_blocks, const Write& write) {
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, words = (num_blocks + 31) / 32;
  uint32_t total = 0;
  for (int base = 0; base < words; base += kSelectThreads) {
    const int w = base + tid;
    uint32_t word = w < words ? s.bitmap[w] : 0;
    const uint32_t own = __popc(word);
    uint32_t before = warp_inclusive_sum(own, lane);
    if (lane == 31) s.warp_a[0][warp] = before;
    before += total - own;
    __syncthreads();
    const uint32_t sums = lane < kSelectWarps ? s.warp_a[0][lane] : 0u;
    before += __reduce_add_sync(kAllLanes, lane < warp ? sums : 0u);
    total += __reduce_add_sync(kAllLanes, sums);
    for (; word != 0; word &= word - 1)
      write(static_cast<int>(before++), w * 32 + __ffs(static_cast<int>(word)) - 1);
    __syncthreads();
  }
}

}  // namespace spot::kernels
