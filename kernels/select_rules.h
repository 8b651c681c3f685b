// The rule of block selection, one struct from the command line to the kernels, and its arithmetic, shared word
// for word by the host (select_reference.h) and the device (select_blocks.h): which blocks are reserved, how
// scores are ordered, what a block's mass is, what the budgets are.
//
// A row is one selection: the scores of one sequence of L tokens under one query, one float a block of
// block_size tokens, n = ceil(L / block_size) blocks.
//
//   reserved  blocks [0, ceil(sinks / block_size)) and [floor((L - recency) / block_size), n), both clamped to
//             [0, n]; the rest are residual.
//   all       every block, when L <= floor or no block is residual.
//   top_k     ceil(K / block_size) blocks in all, K = budget or ceil(budget_fraction L): the reserved, then
//             residual ones by descending score.
//   top_p     the reserved, and the shortest prefix of the residual blocks in descending score whose mass
//             reaches p of the residual mass; lengthened along that order until floor / block_size (rounded
//             up) blocks are chosen in all; then cut to cap / block_size (rounded down) in all, the reserved
//             always kept.
//   threshold the reserved, and every residual block whose mass is at least `threshold` of the residual mass, or
//             what `thresholds` says for the row's set.
//             If that makes fewer than floor / block_size blocks in all, or more than cap / block_size, then
//             exactly so many, along the order.
//   order     descending score, ties to the lower index. NaN counts as -infinity, -0 as +0.
//   mass      m_b = round(2^24 exp2((s_b - s_max) log2(e) / temperature)), an integer; s_max is the largest
//             residual score. The masses and their sums are integers, so no order of summation can change a
//             result, and p is an integer too: round(p 2^20).
//
// Formula: the dual top-p rule of SpotAttention (arXiv 2606.22874, section 2.3), with the mass made exact.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/key_format.h"

namespace spot::kernels {

enum class SelectionMode : int32_t { top_k = 0, top_p = 1, threshold = 2 };

inline constexpr int32_t kMostSets = 32;

// A threshold for each set (KV head) of a sequence; none: the rule's own for all.
struct SetThresholds {
  int32_t count = 0;
  double of[kMostSets] = {};

  bool operator==(const SetThresholds&) const = default;
};

// Lengths are tokens.
struct SelectionRule {
  SelectionMode mode = SelectionMode::top_p;
  int32_t block_size = kPageTokens;
  int32_t sinks = 128;    // reserved at the start
  int32_t recency = 256;  // reserved at the end
  int32_t floor = 512;    // never fewer in all (but top_k); contexts no longer than this keep everything
  int32_t cap = 0;        // but top_k: never more in all, but for the reserved; 0: no cap
  int32_t budget = 2048;  // top_k: K
  double budget_fraction = 0.0;  // top_k: when positive, K is this share of L instead, rounded up
  double p = 0.9;                // top_p: share of the residual mass, above 0 to 1
  double threshold = 1e-3;       // threshold: share of the residual mass that a block must hold, above 0 to 1
  SetThresholds thresholds = {};
  double temperature = 1.0;  // but top_k: of the softmax over residual scores, positive

  bool operator==(const SelectionRule&) const = default;
};

inline constexpr int kMassBits = 24;         // the mass of the best residual block is 2^24
inline constexpr int kProbabilityBits = 20;  // p is a multiple of 2^-20

// log2(e) / temperature: what mass_of multiplies score differences by.
SPOT_HOST_DEVICE float mass_scale(const SelectionRule& rule) {
  return div_rn(1.44269504088896340736f, static_cast<float>(rule.temperature));
}
SPOT_HOST_DEVICE uint32_t fixed_probability(const SelectionRule& rule) {
  const float p =
      static_cast<float>(rule.p) * static_cast<float>(1 << kProbabilityBits);  // exact: a power of two
  return p <= 0.0f                                        ? 0u
         : p >= static_cast<float>(1 << kProbabilityBits) ? 1u << kProbabilityBits
                                                          : static_cast<uint32_t>(round_even(p));
}
// ceil(p * total) in integers; total < 2^44.
SPOT_HOST_DEVICE uint64_t mass_target(uint32_t probability, uint64_t total) {
  return (total * probability + ((1u << kProbabilityBits) - 1)) >> kProbabilityBits;
}

// The threshold of a set, counted from 0.
SPOT_HOST_DEVICE double threshold_of(const SelectionRule& rule, int32_t set) {
  return set < rule.thresholds.count ? rule.thresholds.of[set] : rule.threshold;
}

// The least mass of a block under a threshold; total < 2^44. One product and one rounding of float64: equal on
// host and device. At least 1, so that a block without mass is never chosen for it.
SPOT_HOST_DEVICE uint64_t mass_threshold(double threshold, uint64_t total) {
  const double least = ceil(threshold * static_cast<double>(total));
  return least > 1.0 ? static_cast<uint64_t>(least) : 1u;
}

// The budgets of one row, in blocks.
struct SelectRow {
  int32_t num_blocks;      // n
  int32_t residual_begin;  // residual blocks are [residual_begin, residual_end)
  int32_t residual_end;
  int32_t take_all;      // 1: every block is selected
  int32_t min_residual;  // top_k: exactly this many residual blocks; otherwise at least
  int32_t max_residual;  // top_k: the same; otherwise at most
};

// `capacity` is the number of blocks the output row can hold: a further cap, which the reserved blocks must
// fit (smallest_capacity).
SPOT_HOST_DEVICE SelectRow select_row(const SelectionRule& rule, int32_t length, int32_t capacity) {
  SelectRow row;
  const int32_t size = rule.block_size;
  const int32_t n = (length + size - 1) / size;
  const int32_t sinks = (rule.sinks + size - 1) / size;
  const int32_t recent = length > rule.recency ? (length - rule.recency) / size : 0;
  row.num_blocks = n;
  row.residual_begin = sinks < n ? sinks : n;
  row.residual_end = recent > row.residual_begin ? recent : row.residual_begin;
  const int32_t residual = row.residual_end - row.residual_begin;
  const int32_t reserved = n - residual;
  row.take_all = length <= rule.floor || residual == 0 ? 1 : 0;
  const int32_t room = capacity > reserved ? capacity - reserved : 0;
  int32_t least, most;
  if (rule.mode == SelectionMode::top_k) {
    const int32_t tokens =
        rule.budget_fraction > 0.0
            ? static_cast<int32_t>(ceil(rule.budget_fraction * static_cast<double>(length)))
            : rule.budget;
    const int32_t wanted = (tokens + size - 1) / size - reserved;
    least = most = wanted > 0 ? wanted : 0;
  } else {
    const int32_t floor = (rule.floor + size - 1) / size - reserved;
    const int32_t cap = rule.cap > 0 ? rule.cap / size - reserved : residual;
    least = floor > 0 ? floor : 0;
    most = cap > 0 ? cap : 0;
  }
  most = most < residual ? most : residual;
  most = most < room ? most : room;
  row.min_residual = least < most ? least : most;
  row.max_residual = most;
  return row;
}
// The fewest blocks an output row must hold so that reserved blocks and whole short rows always fit.
SPOT_HOST_DEVICE int32_t smallest_capacity(const SelectionRule& rule) {
  const int32_t size = rule.block_size;
  const int32_t reserved = (rule.sinks + size - 1) / size + (rule.recency + size - 1) / size + 1;
  const int32_t floor = (rule.floor + size - 1) / size;
  return reserved > floor ? reserved : floor;
}

// NaN to -infinity, -0 to +0.
SPOT_HOST_DEVICE float canonical_score(float score) {
  return score == score ? score + 0.0f : bits_float(0xff800000u);
}
// Unsigned integers in the order of the (canonical) scores.
SPOT_HOST_DEVICE uint32_t order_key(float score) {
  const uint32_t u = float_bits(score);
  return u ^ ((u >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
SPOT_HOST_DEVICE float score_of_key(uint32_t key) {
  return bits_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// m_b of the header; `score` and `largest` canonical, score <= largest. exp2 by a polynomial of degree 6,
// relative error below 1e-7: every step one IEEE operation, hence equal bits on host and device.
SPOT_HOST_DEVICE uint32_t mass_of(float score, float largest, float scale) {
  // Below -27 the mass rounds to zero. No branch: the device computes thousands of these at once.
  const float difference = mul_rn(sub_rn(score, largest), scale);
  const float y = difference > -27.0f ? difference : -27.0f;
  const float n = sub_rn(add_rn(y, 12582912.0f), 12582912.0f);  // y to the nearest integer
  const float f = sub_rn(y, n);
  float e = 1.5461447765119374e-4f;
  e = fma_rn(e, f, 1.3390866806730628e-3f);
  e = fma_rn(e, f, 9.618056938052177e-3f);
  e = fma_rn(e, f, 5.5503569543361664e-2f);
  e = fma_rn(e, f, 2.4022650718688965e-1f);
  e = fma_rn(e, f, 6.931471824645996e-1f);
  e = fma_rn(e, f, 1.0f);
  const float scaled =
      bits_float(float_bits(e) + (static_cast<uint32_t>(static_cast<int32_t>(n) + kMassBits) << 23));
  const uint32_t mass = static_cast<uint32_t>(round_even(scaled));
  return score == largest || mass > (1u << kMassBits) ? 1u << kMassBits : mass;  // equal infinities too
}

}  // namespace spot::kernels
