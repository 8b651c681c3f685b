// Dense attention that distils on the way: each full-attention layer's loss is taken, and its gradient
// accumulated in that layer's selector, while the frozen forward pass stands at that layer.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "distill/data.h"
#include "distill/layer_loss.h"
#include "model/attention.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot {

class DistillAttention : public AttentionBackend {
 public:
  // The selector outlives this object.
  DistillAttention(const Selector& selector, LayerLossOptions options);

  // Settings of the next forward passes. gradient_weight multiplies the gradient of each layer's loss; 0 only
  // measures. query_rows as in LayerLossInputs, undefined for all.
  void begin(double gradient_weight, at::Tensor query_rows);

  // The batch's sequences (each from position 0) are attended causally and apart; no cache is used and
  // nothing is kept beyond the layer.
  at::Tensor forward(const AttentionInputs& inputs) override;

  // Sums over the forward passes since the last call, one row a selector layer: loss, teacher entropy, then
  // the covered mass and its oracle at each budget. [layers, 2 + 2 * budgets] float64 on the selector's
  // device.
  at::Tensor take_sums();

 private:
  const Selector& selector_;
  LayerLossOptions options_;
  double gradient_weight_ = 0.0;
  at::Tensor query_rows_;
  std::vector<at::Tensor> sums_;  // by selector layer
};

// One forward pass of a sequence whose parts (see TokenSequence; or documents) do not see each other.
void forward_sequence(const Backbone& backbone, AttentionBackend& attention,
                      const std::vector<int32_t>& tokens, const std::vector<int64_t>& part_starts);

}  // namespace spot
