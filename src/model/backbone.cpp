#include "model/backbone.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "model/weights.h"
#include "ops/layer/layer.h"
#include "ops/linear/linear.h"
#include "ops/linear_attention/gated_delta.h"

namespace spot {
namespace {

// Whether the library's product is the one to take. Ours knows codes, and reads the weights of a single row on a GPU faster,
// beginning before its predecessor ends; with more rows a step is slower by it (kernels/NOTES.md).
bool by_library(const at::Tensor& x, const LinearWeights& weights) {
  return !weights.scales.defined() && !(x.is_cuda() && x.scalar_type() != at::kFloat && x.size(0) == 1);
}

at::Tensor linear(const at::Tensor& x, const LinearWeights& weights) {
  if (by_library(x, weights))
    return at::linear(x, weights.weight,
                      weights.bias.defined() ? std::optional<at::Tensor>(weights.bias) : std::nullopt);
  const at::Tensor y = at::empty({x.size(0), weights.weight.size(0)}, x.options());
  ops::linear({x, weights.weight, y, weights.scales, weights.bias});
  return y;
}

// Two products, or one where the second matrix follows the first in memory (and zeros its bias; see
// Backbone::projection).
std::pair<at::Tensor, at::Tensor> project_both(const at::Tensor& x, const LinearWeights& first,
                                               const at::Tensor& second) {
  const at::Tensor& weight = first.weight;
  const int64_t rows = weight.size(0), more = second.size(0), columns = weight.size(1);
  if (!weight.is_alias_of(second) || weight.scalar_type() != second.scalar_type() ||
      second.storage_offset() != weight.storage_offset() + rows * columns)
    return {linear(x, first), at::linear(x, second)};
  LinearWeights joined{weight.as_strided({rows + more, columns}, {columns, 1}), {}, {}};
  if (first.bias.defined()) joined.bias = first.bias.as_strided({rows + more}, {1});
  const at::Tensor both = linear(x, joined);
  return {both.narrow(1, 0, rows), both.narrow(1, rows, more)};
}

// hidden += linear(x), rounded once.
void add_linear(at::Tensor& hidden, const at::Tensor& x, const LinearWeights& weights) {
  if (!by_library(x, weights))
    return ops::linear({x, weights.weight, hidden, weights.scales, weights.bias, /*accumulate=*/true});
  if (weights.bias.defined()) hidden.add_(weights.bias);
  hidden.addmm_(x, weights.weight.t());
}

// What every layer of one forward pass shares.
struct Pass {
  const ModelConfig& config;
  const Batch& batch;
  AttentionBackend& attention;
  const StateSlots& states;
  const RopeTable &rope, &no_rotation;
};

// Projects, normalises, rotates, stores what the backend wants stored, lets it attend; returns the heads'
// outputs [T, num_heads * head_dim].
at::Tensor attend(const Pass& pass, int64_t layer, const at::Tensor& x, const AttentionWeights& weights) {
  const ModelConfig& c = pass.config;
  const int64_t tokens = x.size(0), dim = c.head_dim;
  const RopeTable& rope = c.rotates(layer) ? pass.rope : pass.no_rotation;
  AttentionPreparation wanted = pass.attention.prepare(layer, x, pass.batch);
  at::Tensor projected;
  if (wanted.selector) {
    std::tie(projected, wanted.selector->projected) =
        project_both(x, weights.qkv, wanted.selector_projection);
  } else {
    projected = linear(x, weights.qkv);
  }
  ops::AttentionPrologue prologue{.projected = projected,
                                  .num_heads = c.num_heads,
                                  .num_kv_heads = c.num_kv_heads,
                                  .head_dim = dim,
                                  .output_gate = c.attention_output_gate,
                                  .qk_norm = weights.qk_norm,
                                  .norm_eps = c.rms_norm_eps,
                                  .cos = rope.cos,
                                  .sin = rope.sin,
                                  .positions = pass.batch.positions};
  const auto& [keys, values] = wanted.pools;
  const bool stored =
      wanted.slots.defined() && (keys.has_codes() || keys.stored.scalar_type() == x.scalar_type());
  if (stored) {
    prologue.key_pool = keys.stored;
    prologue.value_pool = values.stored;
    prologue.slots = wanted.slots;
    prologue.key_scale = keys.scale;
    prologue.value_scale = values.scale;
  }
  if (stored && wanted.selector) prologue.selector = *wanted.selector;
  const ops::AttentionPrologue::Result made = ops::attention_prologue(prologue);
  const AttentionInputs inputs{.layer = layer,
                               .hidden = x,
                               .query = made.query,
                               .key = made.key,
                               .value = made.value,
                               .scale = 1.0 / std::sqrt(static_cast<double>(dim)),
                               .batch = pass.batch,
                               .stored = stored,
                               .selector_query = made.selector_query,
                               .selector_weight = made.selector_weight};
  at::Tensor out = pass.attention.forward(inputs);
  if (out.sizes() != inputs.query.sizes() || out.scalar_type() != x.scalar_type()) {
    fail("the attention backend returned a tensor of another shape or dtype than the query in layer {}",
         layer);
  }
  if (c.attention_output_gate) {  // each head's rows are its query, then its gate
    const at::Tensor gate = projected.narrow(1, 0, c.num_heads * 2 * dim)
                                .unflatten(1, {c.num_heads, 2 * dim})
                                .narrow(2, dim, dim);
    out = ops::gated_product({gate, out, "sigmoid"});
  }
  return out.reshape({tokens, c.num_heads * dim});
}

// A Gated DeltaNet layer up to its output projection: [T, num_value_heads * value_head_dim].
at::Tensor delta_net(const Pass& pass, int64_t layer, const at::Tensor& x, const DeltaNetWeights& weights) {
  const LinearAttentionConfig& c = pass.config.linear;
  const int64_t value_rows = c.num_value_heads * c.value_head_dim;
  const int64_t channels = 2 * c.num_key_heads * c.key_head_dim + value_rows;
  const auto parts =
      linear(x, weights.in).split_with_sizes({channels, value_rows, c.num_value_heads, c.num_value_heads}, 1);
  const at::Tensor conv = pass.states.get("conv", layer), recurrent = pass.states.get("recurrent", layer);
  const Batch& batch = pass.batch;
  const int64_t decodes = batch.num_decodes;
  const auto run = [&](int64_t row, int64_t rows, int64_t sequence, int64_t sequences) {
    const auto rows_of = [&](const at::Tensor& t) { return t.narrow(0, row, rows); };
    return ops::gated_delta_layer(
        {rows_of(parts[0]), rows_of(parts[1]), rows_of(parts[2]), rows_of(parts[3]), weights.rule, conv,
         recurrent, batch.state_slots.narrow(0, sequence, sequences)},
        {batch.query_lengths.begin() + sequence, batch.query_lengths.begin() + sequence + sequences});
  };
  if (decodes == 0 || batch.is_decode()) return run(0, x.size(0), 0, batch.num_sequences());
  return at::cat({run(0, decodes, 0, decodes),
                  run(decodes, x.size(0) - decodes, decodes, batch.num_sequences() - decodes)});
}

at::Tensor mlp_inner(const at::Tensor& x, const LinearWeights& gate_up) {
  const auto halves = linear(x, gate_up).chunk(2, 1);
  return ops::gated_product({halves[0], halves[1], "silu"});
}

void check_batch(const Batch& batch, const ModelConfig& config, at::Device device) {
  const auto sequences = batch.sequences.size();
  int64_t total = 0;
  if (batch.starts.size() != sequences || batch.query_lengths.size() != sequences) {
    fail("a batch of {} sequences has {} starts and {} lengths", sequences, batch.starts.size(),
         batch.query_lengths.size());
  }
  if (batch.num_decodes < 0 || batch.num_decodes > batch.num_sequences() ||
      std::any_of(batch.query_lengths.begin(), batch.query_lengths.begin() + batch.num_decodes,
                  [](int64_t n) { return n != 1; }))
    fail("a batch of {} sequences has {} decode rows, which are the first ones and have one token each",
         sequences, batch.num_decodes);
  for (size_t i = 0; i < sequences; ++i) {
    const int64_t end = batch.starts[i] + batch.query_lengths[i];
    if (batch.starts[i] < 0 || batch.query_lengths[i] < 1 || end > config.max_position_embeddings) {
      fail("tokens {} to {} of sequence {} do not fit the model's {} positions", batch.starts[i], end,
           batch.sequences[i], config.max_position_embeddings);
    }
    total += batch.query_lengths[i];
  }
  if (total == 0 || batch.tokens.dim() != 1 || batch.tokens.numel() != total || batch.positions.dim() != 1 ||
      batch.positions.numel() != total) {
    fail("a batch of {} tokens has tokens of shape [{}] and positions of [{}]", total, batch.tokens.numel(),
         batch.positions.numel());
  }
  if (batch.tokens.device() != device || batch.positions.device() != device) {
    fail("the batch lies on {}, the model on {}", batch.tokens.device().str(), device.str());
  }
  // On a GPU this would stop the stream, and break a graph capture; build_batch checks the host's ids
  // instead.
  if (device.is_cpu()) {
    const auto [least, greatest] = at::aminmax(batch.tokens);
    if (least.item<int64_t>() < 0 || greatest.item<int64_t>() >= config.vocab_size) {
      fail("token ids run from {} to {}, the model's vocabulary from 0 to {}", least.item<int64_t>(),
           greatest.item<int64_t>(), config.vocab_size - 1);
    }
  }
}

}  // namespace

struct Backbone::Weights : ModelWeights {};

Backbone Backbone::load(const std::filesystem::path& folder, at::Device device,
                        std::optional<at::ScalarType> dtype) {
  return load(folder, ModelConfig::load(folder), device, dtype);
}

Backbone Backbone::load(const std::filesystem::path& folder, const ModelConfig& config, at::Device device,
                        std::optional<at::ScalarType> dtype, const Shards& shards) {
  const at::NoGradGuard no_grad;
  return Backbone(
      std::make_shared<const Weights>(Weights{load_weights(folder, config, device, dtype, shards)}));
}

Backbone Backbone::random(const ModelConfig& config, at::Device device, at::ScalarType dtype, uint64_t seed) {
  const at::NoGradGuard no_grad;
  return Backbone(std::make_shared<const Weights>(Weights{random_weights(config, device, dtype, seed)}));
}

const ModelConfig& Backbone::config() const {
  return weights_->config;
}
at::Device Backbone::device() const {
  return weights_->embedding.device();
}
at::ScalarType Backbone::dtype() const {
  return weights_->dtype;
}
bool Backbone::is_sharded() const {
  return weights_->sharded.has_value();
}
std::string Backbone::fingerprint() const {
  return weights_->fingerprint;
}

at::Tensor Backbone::forward(const Batch& batch, AttentionBackend& attention,
                             const StateSlots& states) const {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = weights_->config;
  check_batch(batch, config, device());
  const bool hybrid = config.full_attention_layers().size() != static_cast<size_t>(config.num_layers);
  if (hybrid && !batch.state_slots.defined())
    fail(
        "the batch says no state slots, which this model's linear-attention layers need; make its cache for this model");
  const Pass pass{config, batch, attention, states, weights_->rope, weights_->no_rotation};

  at::Tensor hidden = at::embedding(weights_->embedding, batch.tokens);
  for (int64_t i = 0; i < config.num_layers; ++i) {
    LayerWeights layer = weights_->layers[i];  // the tensors are shared, not copied
    if (weights_->sharded) weights_->sharded->put(i, layer);
    const at::Tensor x = ops::rms_norm({hidden, layer.input_norm, config.rms_norm_eps});
    if (config.is_full_attention(i)) {
      add_linear(hidden, attend(pass, i, x, layer.attention), layer.attention.out);
    } else {
      add_linear(hidden, delta_net(pass, i, x, layer.delta), layer.delta.out);
    }
    add_linear(hidden, mlp_inner(ops::rms_norm({hidden, layer.mlp_norm, config.rms_norm_eps}), layer.gate_up),
               layer.down);
  }
  return ops::rms_norm({hidden, weights_->final_norm, config.rms_norm_eps});
}

Backbone::Projection Backbone::projection(int64_t layer) const {
  const LinearWeights& qkv = weights_->layers.at(layer).attention.qkv;
  return {qkv.weight, qkv.bias};
}

at::Tensor Backbone::logits(const at::Tensor& hidden) const {
  const at::NoGradGuard no_grad;
  if (hidden.dim() != 2 || hidden.size(1) != weights_->config.hidden_size) {
    fail("logits need hidden states of [rows, {}]", weights_->config.hidden_size);
  }
  // cuBLAS can keep its float32 sums; elsewhere they are rounded to the model's dtype.
  if (hidden.is_cuda() && hidden.scalar_type() != at::kFloat) {
    return at::mm(hidden, weights_->head.t(), at::kFloat);
  }
  return at::linear(hidden, weights_->head).to(at::kFloat);
}

}  // namespace spot
