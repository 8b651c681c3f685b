// The operators behind Quest and Twilight. Rows, page tables, lengths and pools as in ops/selector/selector.h and
// ops/attention/attention.h. CUDA serves bfloat16 and float16, head_dim 64, 128 and 256 and at most 16 query heads a
// KV head, with no wait for the device.
#pragma once

#include <ATen/ATen.h>

#include "ops/op.h"

namespace spot::ops {

// After keys were written to their pool: takes the bounds of every page that got tokens anew and, where they are
// given, writes the new keys' 4-bit copy. kernels/key_summary_append.h defines both. A negative slot is skipped.
struct KeySummaryAppend {
  static constexpr const char* kName = "key_summary_append";
  using Result = void;
  at::Tensor bounds;  // [num_kv_heads, pages, 2, head_dim] of the pool's dtype: minimum, maximum
  at::Tensor codes,
      ranges;           // [num_kv_heads, pages * 16, head_dim / 2] uint8 and [.., 2] float16, or undefined
  at::Tensor key_pool;  // [num_kv_heads, pages, 16, head_dim]
  at::Tensor slots;     // [T] int64, each sequence's new tokens in order

  static constexpr auto fields() {
    using S = KeySummaryAppend;
    return std::tuple(updated<&S::bounds>("bounds"), required<&S::key_pool>("key_pool"),
                      required<&S::slots>("slots"), optional_updated<&S::codes>("codes"),
                      optional_updated<&S::ranges>("ranges"));
  }
  void check() const;
};
void key_summary_append(const KeySummaryAppend& arguments);

// Quest's bound of each page, scale * sum_i max(q_i min_i, q_i max_i): [R, num_kv_heads, table width] float32, the
// maximum over each KV head's query heads, or [R, 1, table width], the mean over all heads. -inf past the length.
struct QuestScore {
  static constexpr const char* kName = "quest_score";
  using Result = at::Tensor;
  at::Tensor query;  // [R, num_heads, head_dim]
  at::Tensor bounds;
  at::Tensor page_table, lengths;
  double scale = 0.0;
  bool per_kv_head = true;

  static constexpr auto fields() {
    using S = QuestScore;
    return std::tuple(required<&S::query>("query"), required<&S::bounds>("bounds"),
                      required<&S::page_table>("page_table"), required<&S::lengths>("lengths"),
                      required<&S::scale>("scale"), optional<&S::per_kv_head>("per_kv_head"));
  }
  void check() const;
};
at::Tensor quest_score(const QuestScore& arguments);

// scale * q . key with the keys' 4-bit copy, of candidate blocks: [R, num_heads, M * 16] float32; -inf past the
// length, unspecified behind a row's candidates.
struct EstimateLogits {
  static constexpr const char* kName = "estimate_logits";
  using Result = at::Tensor;
  at::Tensor query;
  at::Tensor codes, ranges;
  at::Tensor page_table, lengths;
  at::Tensor indices,
      counts;  // of select_blocks, a set a KV head: [R, num_kv_heads, M] and [R, num_kv_heads]
  double scale = 0.0;

  static constexpr auto fields() {
    using S = EstimateLogits;
    return std::tuple(required<&S::query>("query"), required<&S::codes>("codes"),
                      required<&S::ranges>("ranges"), required<&S::page_table>("page_table"),
                      required<&S::lengths>("lengths"), required<&S::indices>("indices"),
                      required<&S::counts>("counts"), required<&S::scale>("scale"));
  }
  void check() const;
};
at::Tensor estimate_logits(const EstimateLogits& arguments);

// Tokens that pruning left, [R, num_kv_heads, M * 16] int32 positions, ascending, unspecified behind the counts.
struct PrunedTokens {
  static constexpr std::array<const char*, 2> kNames = {"positions", "counts"};
  at::Tensor positions, counts;
};

// Each query head keeps the fewest of its candidates' tokens that hold mass p of its logits' softmax, a KV head their
// union; exactly as kernels/prune_tokens.h says. Rows of at most `floor` tokens keep all.
struct PruneTokens {
  static constexpr const char* kName = "prune_tokens";
  using Result = PrunedTokens;
  at::Tensor logits;  // of estimate_logits
  at::Tensor indices, counts;
  at::Tensor lengths;
  double p = 0.9;
  int64_t floor = 0;

  static constexpr auto fields() {
    using S = PruneTokens;
    return std::tuple(required<&S::logits>("logits"), required<&S::indices>("indices"),
                      required<&S::counts>("counts"), required<&S::lengths>("lengths"), required<&S::p>("p"),
                      optional<&S::floor>("floor"));
  }
  void check() const;
};
PrunedTokens prune_tokens(const PruneTokens& arguments);

// As sparse_decode_attention, over single tokens.
struct TokenAttention {
  static constexpr const char* kName = "token_attention";
  using Result = at::Tensor;
  at::Tensor query;
  at::Tensor key_pool, value_pool;
  at::Tensor page_table, lengths;
  at::Tensor positions, counts;  // [R, num_kv_heads, W] and [R, num_kv_heads] int32, ascending
  double scale = 0.0;

  static constexpr auto fields() {
    using S = TokenAttention;
    return std::tuple(required<&S::query>("query"), required<&S::key_pool>("key_pool"),
                      required<&S::value_pool>("value_pool"), required<&S::page_table>("page_table"),
                      required<&S::lengths>("lengths"), required<&S::positions>("positions"),
                      required<&S::counts>("counts"), required<&S::scale>("scale"));
  }
  void check() const;
};
at::Tensor token_attention(const TokenAttention& arguments);

}  // namespace spot::ops
