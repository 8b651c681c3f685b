#pragma once

#include <map>

#include "attention/policy.h"
#include "cache/page_pools.h"
#include "checkpoint/config.h"
#include "selector/config.h"

namespace spot {

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
  bool scores_rows() const override { return true; }
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

}  // namespace spot
