#include "model/backbone.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "core/error.h"
#include "model/weights.h"
#include "ops/layer/layer.h"
#include "ops/linear_attention/gated_delta.h"

namespace spot {
namespace {

at::Tensor linear(const at::Tensor& x, const LinearWeights& weights) {
  return at::linear(x, weights.weight,
                    weights.bias.defined() ? std::optional<at::Tensor>(weights.bias) : std::nullopt);
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
  LinearWeights joined{weight.as_strided({rows + more, columns}, {columns, 1}), {}};
  if (first.bias.defined()) joined.bias = first.bias.as_strided({rows + more}, {1});
  const at::Tensor both = linear(x, joined);
  return {both.narrow(1, 0, rows), both.narrow(1, rows, more)};
}

// hidden += linear(x), rounded once.
void add_linear(at::Tensor& hidden, const at::Tensor& x, const LinearWeights& weights) {
  if (weights.bias.defined()) hidden.add_(weights.bias);
  hidden.addmm_(x, weights.weight.t());
}

// What every layer of one forward pass shares.
struct Pass {
  const ModelConfig& config;
  const Batch& batch;
  AttentionBackend& attention;
  KvCache& cache;
  const RopeTable &rope, &no_rotation;
  at::Tensor state_slots;  // [num_sequences], models with linear-attention layers
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
  const bool stored = wanted.slots.defined() && wanted.key_pool.scalar_type() == x.scalar_type();
  if (stored) {
    prologue.key_pool = wanted.key_pool;
    prologue.value_pool = wanted.value_pool;
    prologue.slots = wanted.slots;
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
  return ops::gated_delta_layer(
      {parts[0], parts[1], parts[2], parts[3], weights.rule, pass.cache.conv_states(layer),
       pass.cache.recurrent_states(layer), pass.state_slots},
      pass.batch.query_lengths);
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
  // On a GPU this would stop the stream, and break a graph capture; make_batch checks the host's ids instead.
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

at::Tensor Backbone::forward(const Batch& batch, AttentionBackend& attention, KvCache& cache) const {
  const at::NoGradGuard no_grad;
  const ModelConfig& config = weights_->config;
  check_batch(batch, config, device());
  const bool hybrid = config.full_attention_layers().size() != static_cast<size_t>(config.num_layers);
  Pass pass{config, batch, attention, cache, weights_->rope, weights_->no_rotation, {}};
  if (hybrid) pass.state_slots = batch.state_slots.defined() ? batch.state_slots : cache.state_slots(batch);

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

Batch make_batch(KvCache& cache, const std::vector<int64_t>& sequences,
                 const std::vector<std::vector<int32_t>>& tokens) {
  if (sequences.empty() || sequences.size() != tokens.size()) {
    fail("a batch of {} sequences was given {} token lists", sequences.size(), tokens.size());
  }
  // Everything is checked before the cache changes, so that a refused batch leaves no sequence half extended.
  const ModelConfig& config = cache.config();
  Batch batch;
  batch.sequences = sequences;
  std::vector<int64_t> ids, positions;
  int64_t pages = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (std::count(sequences.begin(), sequences.end(), sequences[i]) != 1) {
      fail("sequence {} occurs twice in a batch", sequences[i]);
    }
    if (tokens[i].empty()) fail("sequence {} has no token in a batch", sequences[i]);
    const int64_t start = cache.length(sequences[i]), count = static_cast<int64_t>(tokens[i].size());
    if (start + count > config.max_position_embeddings) {
      fail(
          "a sequence of {} tokens exceeds the model's {} positions; shorten the prompt or the answer, or "
          "extend the model with YaRN",
          start + count, config.max_position_embeddings);
    }
    pages += cache.pages_needed(sequences[i], count);
    for (int64_t j = 0; j < count; ++j) {
      const int32_t id = tokens[i][j];
      if (id < 0 || id >= config.vocab_size) {
        fail("token id {} lies outside the model's vocabulary of {}; is this the model's own tokenizer?", id,
             config.vocab_size);
      }
      ids.push_back(id);
      positions.push_back(start + j);
    }
    batch.starts.push_back(start);
    batch.query_lengths.push_back(count);
  }
  if (pages > cache.num_free_pages()) {
    fail(
        "the KV cache of {} tokens is full: the batch needs {} more pages of {} tokens, {} are free; make "
        "the cache larger or the requests shorter or fewer",
        cache.num_pages() * kPageSize, pages, kPageSize, cache.num_free_pages());
  }
  for (size_t i = 0; i < sequences.size(); ++i) cache.extend(sequences[i], batch.query_lengths[i]);
  const auto to_device = [&](std::vector<int64_t>& values) {
    return at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kLong)
        .clone()
        .to(cache.device());
  };
  batch.tokens = to_device(ids);
  batch.positions = to_device(positions);
  if (config.full_attention_layers().size() != static_cast<size_t>(config.num_layers)) {
    batch.state_slots = cache.state_slots(batch);
  }
  return batch;
}

}  // namespace spot
