// Who chooses the blocks: the trained selector, a window, the exact teacher, Quest's bound, or Twilight.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <string>
#include <vector>

#include "attention/dense.h"
#include "attention/mass.h"
#include "attention/tile_prefill.h"
#include "cache/page_pools.h"
#include "model/attention.h"
#include "ops/baselines/baselines.h"
#include "selection/selection.h"
#include "selector/cache.h"
#include "selector/selector.h"

namespace spot {

// A policy scores blocks; the rule, the same for all policies, turns scores into a selection. Subclasses give
// scores, and may prune what the rule chose. What a policy keeps of the tokens it declares in the cache's
// PagePools, so that a page carries it wherever the page goes.
class SelectionPolicy {
 public:
  explicit SelectionPolicy(const SelectionRule& rule) : rule_(rule) { validate(rule_); }
  virtual ~SelectionPolicy() = default;

  virtual std::string name() const = 0;
  // Block sets a row has: 1, or num_kv_heads.
  virtual int64_t groups() const = 0;
  // Whether the policy can choose in this layer (a selector may be absent); else the layer attends densely.
  virtual bool covers(int64_t layer) const { return true; }
  virtual SelectionRule rule(int64_t layer) const { return rule_; }
  void set_rule(const SelectionRule& rule);

  // What the kernel that makes a decode step's queries and keys can do for the policy along the way; slots
  // are not the policy's to say.
  virtual AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) {
    return {};
  }

  // Called for every covered layer of every pass, prefill and decode, after keys and values were written at
  // the batch's slots: where a policy feeds its own stores.
  virtual void append(const AttentionInputs& inputs) {}

  // Block scores [count, groups, blocks] float32 of one chunk's queries, blocks = ceil((start + count) / 16);
  // blocks past a query's position hold -inf.
  virtual at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) = 0;
  // Block scores [sequences, groups, table width] float32 of a batch of decode rows alone, -inf past each
  // length.
  virtual at::Tensor score_decode(const AttentionInputs& inputs);

  // Sparse prefill in tiles of queries: fills the selector's fields and the rule of a TilePrefill for the whole batch.
  // False where the policy has no kernel that scores tiles, or not for these inputs.
  virtual bool score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const { return false; }

  // Whether single tokens of the chosen blocks are dropped again, by surviving_tokens.
  virtual bool prunes_tokens() const { return false; }
  // Which tokens of the blocks chosen for some rows, each with its query, page table and length as the
  // operators
  // take them, are attended to.
  virtual ops::PrunedTokens surviving_tokens(int64_t layer, const at::Tensor& query,
                                             const at::Tensor& page_table, const at::Tensor& lengths,
                                             double scale, const Selection& blocks) const {
    return {};
  }

  // One row per sequence of a batch of decode rows alone. Where tokens are pruned: their lists, and with
  // `flags` Selection::tokens too.
  Selection select_decode(const AttentionInputs& inputs, bool flags = true);
  // One row per query. With query_tile 16, 32 or 64, queries whose positions share a multiple of it share one set: the
  // rule applied to the max of their scores at the last one's length; each row has the set up to its own block. (A
  // chunk that cuts a tile cuts its set too.)
  Selection select_chunk(const AttentionInputs& inputs, const QueryChunk& chunk, int64_t query_tile = 1);

 protected:
  SelectionRule rule_;
};

// SpotAttention: block max of the trained selector's token scores, over its own key cache.
class SpotPolicy : public SelectionPolicy {
 public:
  // The cache must have been made for the same selector, in the pools of the cache. Both outlive the policy.
  SpotPolicy(const Selector& selector, SelectorCache& cache, const SelectionRule& rule);

  std::string name() const override { return "spot"; }
  int64_t groups() const override { return selector_.groups(); }
  bool covers(int64_t layer) const override { return selector_.has_layer(layer); }
  // The rule with the layer's fitted temperature (times the rule's own).
  SelectionRule rule(int64_t layer) const override;
  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) override;
  void append(const AttentionInputs& inputs) override;
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;
  at::Tensor score_decode(const AttentionInputs& inputs) override;
  // On CUDA, for the dtypes and head_dims of ops/prefill/prefill.h.
  bool score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const override;

 private:
  const Selector& selector_;
  SelectorCache& keys_;
};

// StreamingLLM: the first `sinks` tokens and the latest ones, `budget` tokens in all.
class StreamingPolicy : public SelectionPolicy {
 public:
  // Throws Error when budget <= sinks.
  explicit StreamingPolicy(int64_t budget, int64_t sinks = 128);
  std::string name() const override { return "streaming"; }
  int64_t groups() const override { return 1; }
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;
};

// The exact teacher under the same rule: block score = log of the block's head-averaged probability (sum over
// its tokens, or their max). Reads every key: the ceiling of what one set per group can capture, not a fast
// method.
class OraclePolicy : public SelectionPolicy {
 public:
  // Reads the pools "keys", which outlive the policy.
  OraclePolicy(const PagePools& pools, const SelectionRule& rule, int64_t groups = 1,
               BlockReduction reduction = BlockReduction::sum)
      : SelectionPolicy(rule), pools_(pools), groups_(groups), reduction_(reduction) {}
  std::string name() const override { return "oracle"; }
  int64_t groups() const override { return groups_; }
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;

 private:
  const PagePools& pools_;
  int64_t groups_;
  BlockReduction reduction_;
};

// Quest (Tang et al. 2024): an upper bound of q . k over each page from the elementwise min and max of its
// keys, sum_i max(q_i min_i, q_i max_i), times the softmax scale. For grouped-query models the bound is
// merged over query heads: `kv_group` takes the max over each KV head's heads and keeps a set per KV head;
// `layer` takes the mean over all heads and keeps one set.
class QuestPolicy : public SelectionPolicy {
 public:
  // Declares a pool "quest_bounds" [num_kv_heads, num_pages, 2, head_dim] beside the "keys" of each layer, of
  // their dtype: a page's bounds (minimum, maximum) are among its keys' numbers. `pools` outlives the policy.
  QuestPolicy(const ModelConfig& model, PagePools& pools, const SelectionRule& rule,
              SelectorScope scope = SelectorScope::kv_group);
  std::string name() const override { return "quest"; }
  int64_t groups() const override { return scope_ == SelectorScope::layer ? 1 : num_kv_heads_; }
  void append(const AttentionInputs& inputs) override;
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;
  at::Tensor score_decode(const AttentionInputs& inputs) override;

 protected:
  // append(), and the 4-bit copy of the new keys where codes and ranges are defined.
  void append_summaries(const AttentionInputs& inputs, const at::Tensor& codes, const at::Tensor& ranges);

 private:
  const PagePools& pools_;
  int64_t num_kv_heads_;
  SelectorScope scope_;
  std::map<int64_t, at::Tensor> bounds_;  // by layer
};

// Twilight (Lin et al. 2025) on Quest: Quest, under the rule, proposes blocks with a generous budget; a 4-bit
// copy of the keys estimates the softmax over their tokens, and each query head keeps the fewest tokens whose
// estimated weights reach p. With grouped queries, Quest keeps a set per KV head (as above), each query head
// prunes that set by itself, and the KV head attends to the union, as in the paper. The copy holds, for each
// token and KV head, head_dim codes of 0..15 and float16 scale and minimum. Choices of ours: reserved tokens
// are pruned like any other; contexts up to the rule's floor are not pruned; the estimated weights are
// integers
// relative to the largest one, exact and alike on every device (kernels/prune_tokens.h), where the authors
// bisect a threshold until 1e-5.
class TwilightPolicy : public QuestPolicy {
 public:
  // `rule` is Quest's, `p` the pruner's. Declares, besides Quest's, the pools "twilight_codes" [num_kv_heads,
  // num_pages, 16, head_dim / 2], two codes a byte with the even dim in the low half, and "twilight_ranges"
  // [num_kv_heads, num_pages, 16, 2], scale and minimum. Throws Error when p is not in (0, 1] or head_dim is
  // odd.
  TwilightPolicy(const ModelConfig& model, PagePools& pools, const SelectionRule& rule, double p);
  std::string name() const override { return "twilight"; }
  void append(const AttentionInputs& inputs) override;
  bool prunes_tokens() const override { return true; }
  ops::PrunedTokens surviving_tokens(int64_t layer, const at::Tensor& query, const at::Tensor& page_table,
                                     const at::Tensor& lengths, double scale,
                                     const Selection& blocks) const override;

 private:
  double p_;
  // By layer, with pages and their tokens as one dim.
  std::map<int64_t, at::Tensor> codes_, ranges_;
};

}  // namespace spot
