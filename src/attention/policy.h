// Who chooses the blocks. The methods lie in policies/, a file each; methods.inc lists them.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "attention/dense.h"
#include "attention/tile_prefill.h"
#include "model/attention.h"
#include "ops/baselines/baselines.h"
#include "selection/selection.h"

namespace spot {

// A chunk's rows of what has a row for each token of the batch.
inline at::Tensor chunk_rows(const at::Tensor& tensor, const QueryChunk& chunk) {
  return tensor.narrow(0, chunk.first, chunk.count);
}

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
  // Whether score_decode is fast for many rows of one sequence: kernels of its own, which read pages.
  virtual bool scores_rows() const { return false; }
  // Block scores [sequences, groups, table width] float32 of a batch of decode rows alone, -inf past each
  // length.
  virtual at::Tensor score_decode(const AttentionInputs& inputs);

  // Sparse prefill in tiles of queries: fills the selector's fields and the rule of a TilePrefill for the whole batch.
  // False where the policy has no kernel that scores tiles, or not for these inputs.
  virtual bool score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const { return false; }

  // Whether single tokens of the chosen blocks are dropped again, by surviving_tokens.
  virtual bool prunes_tokens() const { return false; }
  // Which tokens of the blocks chosen for some rows, each with its query, page table and length as the operators
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

}  // namespace spot
