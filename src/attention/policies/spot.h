#pragma once

#include "attention/policy.h"
#include "selector/cache.h"
#include "selector/selector.h"

namespace spot {

// SpotAttention: block max of the trained selector's token scores, over its own key cache.
class SpotPolicy : public SelectionPolicy {
 public:
  // The cache must have been made for the same selector, in the pools of the cache. Both outlive the policy.
  SpotPolicy(const Selector& selector, SelectorCache& cache, const SelectionRule& rule);

  std::string name() const override { return "spot"; }
  int64_t groups() const override { return selector_.groups(); }
  bool covers(int64_t layer) const override { return selector_.has_layer(layer); }
  // The rule with what was fitted for the layer.
  SelectionRule rule(int64_t layer) const override;
  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) override;
  void append(const AttentionInputs& inputs) override;
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;
  bool scores_rows() const override { return true; }
  at::Tensor score_decode(const AttentionInputs& inputs) override;
  // On CUDA, for the dtypes and head_dims of ops/prefill/prefill.h.
  bool score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const override;

 private:
  const Selector& selector_;
  SelectorCache& keys_;
};

}  // namespace spot
