#pragma once

#include <map>

#include "attention/policies/quest.h"

namespace spot {

// Twilight (Lin et al. 2025) on Quest: Quest, under the rule, proposes blocks with a generous budget; a 4-bit
// copy of the keys estimates the softmax over their tokens, and each query head keeps the fewest tokens whose
// estimated weights reach p. With grouped queries, Quest keeps a set per KV head (as above), each query head
// prunes that set by itself, and the KV head attends to the union, as in the paper. The copy holds, for each
// token and KV head, head_dim codes of 0..15 and float16 scale and minimum. Choices of ours: reserved tokens
// are pruned like any other; contexts up to the rule's floor are not pruned; the estimated weights are
// integers relative to the largest one, exact and alike on every device (kernels/prune_tokens.h), where the
// authors bisect a threshold until 1e-5.
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
