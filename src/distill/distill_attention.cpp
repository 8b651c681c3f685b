#include "distill/distill_attention.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>

#include "attention/dense.h"
#include "core/error.h"
#include "model/model_cache.h"

namespace spot {

DistillAttention::DistillAttention(const Selector& selector, LayerLossOptions options)
    : selector_(selector), options_(std::move(options)), sums_(selector.layers().size()) {}

void DistillAttention::begin(double gradient_weight, at::Tensor query_rows) {
  gradient_weight_ = gradient_weight;
  query_rows_ = std::move(query_rows);
}

at::Tensor DistillAttention::forward(const AttentionInputs& inputs) {
  const at::NoGradGuard no_grad;
  const Batch& batch = inputs.batch;
  const bool distilled = selector_.has_layer(inputs.layer);
  at::Tensor output;
  // The loss needs attention's normalisers again; without them it finds them for itself.
  at::Tensor logsumexp;
  bool have_logsumexp = distilled;
  std::vector<int64_t> starts;
  int64_t first = 0;
  for (size_t i = 0; i < batch.query_lengths.size(); ++i) {
    const int64_t count = batch.query_lengths[i];
    if (batch.starts[i] != 0)
      fail("distillation: a sequence continues at position {}, it must begin at 0", batch.starts[i]);
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, count).transpose(0, 1); };
    at::Tensor sums;
    at::Tensor attended = causal_attention(inputs.query.narrow(0, first, count), part(inputs.key),
                                           part(inputs.value), 0, inputs.scale, distilled ? &sums : nullptr);
    have_logsumexp = have_logsumexp && sums.defined();
    if (count == inputs.query.size(0)) {  // of a batch of one nothing needs to be put together
      output = std::move(attended);
      logsumexp = std::move(sums);
      starts.push_back(first);
      break;
    }
    if (!output.defined()) output = at::empty_like(inputs.query);
    output.narrow(0, first, count).copy_(attended);
    if (have_logsumexp) {
      if (!logsumexp.defined())
        logsumexp = at::empty({inputs.query.size(1), inputs.query.size(0)}, sums.options());
      logsumexp.narrow(1, first, count).copy_(sums);
    }
    starts.push_back(first);
    first += count;
  }
  if (!distilled) return output;

  SelectorProjection projection;
  {
    const at::AutoGradMode with_grad(gradient_weight_ != 0.0);
    projection = selector_.project(inputs.layer, inputs.hidden.detach(), batch.positions);
  }
  LayerLossInputs loss_inputs{.query = inputs.query,
                              .key = inputs.key,
                              .scale = inputs.scale,
                              .logsumexp = have_logsumexp ? logsumexp : at::Tensor(),
                              .selector_query = projection.query.detach(),
                              .selector_key = projection.key.detach(),
                              .selector_weight = projection.weight.detach(),
                              .document_starts = std::move(starts),
                              .query_rows = query_rows_};
  options_.gradients = gradient_weight_ != 0.0;
  options_.gradient_weight = gradient_weight_;
  options_.gradients_rounded = true;
  const LayerLoss loss = layer_loss(loss_inputs, options_);
  if (options_.gradients)
    torch::autograd::backward({projection.query, projection.key, projection.weight},
                              {loss.grad_query, loss.grad_key, loss.grad_weight});
  const at::Tensor row =
      at::cat({loss.loss.view(1), loss.teacher_entropy.view(1), loss.covered, loss.covered_oracle});
  const auto& layers = selector_.layers();
  at::Tensor& sum =
      sums_[static_cast<size_t>(std::find(layers.begin(), layers.end(), inputs.layer) - layers.begin())];
  sum = sum.defined() ? sum + row : row;
  return output;
}

at::Tensor DistillAttention::take_sums() {
  const auto width = 2 + 2 * static_cast<int64_t>(options_.budgets.size());
  for (at::Tensor& sum : sums_)
    if (!sum.defined())
      sum = at::zeros({width},
                      selector_.parameters().front().options().dtype(at::kDouble).requires_grad(false));
  at::Tensor all = at::stack(sums_);
  sums_.assign(sums_.size(), {});
  return all;
}

void forward_sequence(const Backbone& backbone, AttentionBackend& attention,
                      const std::vector<int32_t>& tokens, const std::vector<int64_t>& part_starts) {
  Batch batch = unpaged_batch(tokens, part_starts, backbone.device());
  // A fresh state a part, for linear-attention layers.
  const int64_t parts = batch.num_sequences();
  StateSlots states(parts, 0, backbone.device());
  declare_states(states, backbone.config());
  if (!states.empty()) batch.state_slots = at::arange(parts, batch.positions.options());
  backbone.forward(batch, attention, states);
}

}  // namespace spot
