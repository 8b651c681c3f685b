#include "selector/selector.h"

#include <ATen/core/grad_mode.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "selector/wide_linear.h"

namespace spot {
namespace {

uint64_t mix_bits(uint64_t x) {  // the finaliser of splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Uniform on [-a, a) with variance 1 / columns. Made of integers and one rounding each, so that no vector
// width, libm or device can change a bit.
at::Tensor initial_weight(int64_t rows, int64_t columns, uint64_t seed, int64_t layer, uint64_t which) {
  at::Tensor weight = at::empty({rows, columns}, at::kFloat);
  float* data = weight.mutable_data_ptr<float>();
  const uint64_t stream = mix_bits(seed ^ mix_bits(static_cast<uint64_t>(layer) * 4 + which));
  const float bound = static_cast<float>(std::sqrt(3.0 / static_cast<double>(columns)));
  for (int64_t i = 0; i < rows * columns; ++i) {
    const auto bits = static_cast<int32_t>(mix_bits(stream + static_cast<uint64_t>(i)) >> 40);  // 24 bits
    data[i] = static_cast<float>(bits - (1 << 23)) * (1.0f / (1 << 23)) * bound;
  }
  return weight;
}

at::Tensor accumulation(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
}

}  // namespace

void Selector::bind(const SelectorConfig& config, const ModelConfig& backbone, at::Device device) {
  config.validate("selector config");
  config_ = config;
  backbone_ = backbone;
  groups_ = config.scope == SelectorScope::layer ? 1 : backbone.num_kv_heads;
  layers_.clear();
  const auto& dense = config.selection.dense_layers;
  for (int64_t layer : dense)
    if (layer >= backbone.num_layers)
      fail("selection.dense_layers names layer {}, but the {} backbone has {} layers", layer,
           backbone.model_type, backbone.num_layers);
  for (int64_t layer : backbone.full_attention_layers())
    if (std::find(dense.begin(), dense.end(), layer) == dense.end()) layers_.push_back(layer);
  if (layers_.empty())
    fail("selection.dense_layers leaves no full-attention layer of the {} backbone for a selector",
         backbone.model_type);
  const auto& temperature = config.selection.temperature;
  if (!temperature.empty() && temperature.size() != layers_.size())
    fail("selection.temperature has {} values, but the selector has {} layers", temperature.size(),
         layers_.size());
  const size_t masses = config.selection.residual_mass.size(),
               sets = layers_.size() * static_cast<size_t>(groups_);
  if (masses != 0 && masses != sets)
    fail("selection.residual_mass has {} values, but the selector has {} layers of {} sets", masses,
         layers_.size(), groups_);
  if (masses != 0 && groups_ > kernels::kMostSets)
    fail("selection.residual_mass is given for {} sets a layer; at most {} are supported, leave it out",
         groups_, kernels::kMostSets);
  if (config.rope_dims > 0)
    rope_ = rope_table(backbone.rope, backbone.max_position_embeddings, device, config.rope_dims);
}

Selector::Selector(const SelectorConfig& config, const ModelConfig& backbone, at::Device device,
                   at::ScalarType dtype, uint64_t seed) {
  bind(config, backbone, device);
  const auto options = at::TensorOptions(device).dtype(dtype), fine = options.dtype(fine_type(dtype));
  for (int64_t layer : layers_) {
    LayerWeights& weights = weights_[layer];
    auto fresh = [&](int64_t rows, uint64_t which) {
      return initial_weight(rows, backbone.hidden_size, seed, layer, which);
    };
    weights.query = fresh(config.num_heads * config.head_dim, 0).to(options);
    weights.key = fresh(config.key_heads * config.head_dim, 1).to(options);
    stack(weights);
    weights.mix = fresh(groups_ * config.num_heads, 2).to(fine);
    if (config.key_norm != KeyNorm::none) weights.norm_weight = at::ones({config.head_dim}, fine);
    if (config.key_norm == KeyNorm::layernorm) weights.norm_bias = at::zeros({config.head_dim}, fine);
  }
}

// What is small and sensitive stays in float32 whatever the dtype of the large weights.
at::ScalarType Selector::fine_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

void Selector::stack(LayerWeights& weights, const Backbone::Projection& projection) {
  const at::NoGradGuard no_grad;
  const int64_t columns = weights.query.size(1);
  std::vector<at::Tensor> parts = {weights.query, weights.key};
  if (projection.weight.defined()) parts.insert(parts.begin(), projection.weight);
  const at::Tensor all = at::cat(parts);
  // set_ makes no view: a trainer makes each parameter a leaf of its own and changes it in place.
  const auto place = [&](const at::Tensor& part, int64_t first_row, int64_t rows) {
    part.set_(all.storage(), first_row * columns, {rows, columns}, {columns, 1});
  };
  int64_t row = 0;
  for (const at::Tensor& part : parts) {
    const int64_t rows = part.size(0);
    place(part, row, rows);
    row += rows;
  }
  if (!weights.query_key.defined()) weights.query_key = at::empty({0}, all.options());
  const int64_t own = weights.query.size(0) + weights.key.size(0);
  place(weights.query_key, row - own, own);
  if (projection.bias.defined()) {
    const at::Tensor bias = at::cat({projection.bias, projection.bias.new_zeros({own})});
    projection.bias.set_(bias.storage(), 0, projection.bias.sizes(), {1});
  }
}

void Selector::join(const Backbone& backbone) {
  for (auto& [layer, weights] : weights_) {
    const Backbone::Projection projection = backbone.projection(layer);
    if (projection.weight.defined() && projection.weight.scalar_type() == weights.query.scalar_type() &&
        projection.weight.device() == weights.query.device())
      stack(weights, projection);
  }
}

const Selector::LayerWeights& Selector::layer_weights(int64_t layer) const {
  auto found = weights_.find(layer);
  if (found == weights_.end()) fail("layer {} has no selector; it must attend densely", layer);
  return found->second;
}

SelectionRule Selector::fitted(int64_t layer, SelectionRule rule) const {
  auto found = std::find(layers_.begin(), layers_.end(), layer);
  if (found == layers_.end()) fail("layer {} has no selector, hence no rule", layer);
  const auto place = static_cast<size_t>(found - layers_.begin());
  const std::vector<double>&temperature = config_.selection.temperature,
        &residual_mass = config_.selection.residual_mass;
  if (!temperature.empty()) rule.temperature *= temperature.at(place);
  if (residual_mass.empty() || rule.mode != SelectionMode::threshold) return rule;
  rule.thresholds.count = static_cast<int32_t>(groups_);
  for (size_t set = 0; set < static_cast<size_t>(groups_); ++set)
    rule.thresholds.of[set] = rule.threshold / residual_mass.at(place * static_cast<size_t>(groups_) + set);
  return rule;
}

at::Tensor Selector::project_query(int64_t layer, const at::Tensor& hidden,
                                   const at::Tensor& positions) const {
  const at::Tensor weight = layer_weights(layer).query.to(hidden.scalar_type());
  const at::Tensor query =
      at::linear(hidden, weight).view({hidden.size(0), config_.num_heads, config_.head_dim});
  return config_.rope_dims > 0 ? apply_rope(query, positions, rope_) : query;
}

at::Tensor Selector::project_key(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) const {
  const LayerWeights& weights = layer_weights(layer);
  at::Tensor key = at::linear(hidden, weights.key.to(hidden.scalar_type()))
                       .view({hidden.size(0), config_.key_heads, config_.head_dim});
  if (config_.key_norm != KeyNorm::none) {
    at::Tensor x = accumulation(key);
    const at::Tensor weight = weights.norm_weight.to(x.scalar_type());
    if (x.is_cuda() && config_.key_norm == KeyNorm::layernorm) {
      // The same, with its gradient, in a few passes over memory instead of thirty.
      x = at::layer_norm(x, {config_.head_dim}, weight, weights.norm_bias.to(x.scalar_type()),
                         config_.norm_eps);
    } else {
      if (config_.key_norm == KeyNorm::layernorm) x = x - x.mean(-1, true);
      x = x * at::rsqrt(x.square().mean(-1, true) + config_.norm_eps);
      x = x * weight;
      if (weights.norm_bias.defined()) x = x + weights.norm_bias.to(x.scalar_type());
    }
    key = x.to(hidden.scalar_type());
  }
  return config_.rope_dims > 0 ? apply_rope(key, positions, rope_) : key;
}

ops::KeyPreparation Selector::key_preparation(int64_t layer, const at::Tensor& positions) const {
  const LayerWeights& weights = layer_weights(layer);
  ops::KeyPreparation preparation;
  preparation.norm = config_.key_norm;
  if (weights.norm_weight.defined()) preparation.norm_weight = weights.norm_weight.to(at::kFloat);
  if (weights.norm_bias.defined()) preparation.norm_bias = weights.norm_bias.to(at::kFloat);
  preparation.norm_eps = config_.norm_eps;
  if (config_.rope_dims != 0) {
    preparation.cos = rope_.cos;
    preparation.sin = rope_.sin;
    preparation.positions = positions;
  }
  return preparation;
}

void Selector::append_keys(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions,
                           const at::Tensor& slots, SelectorCache& cache) const {
  if (config_.rope_dims != 0 && config_.rope_dims != 64)  // the kernel rotates 64 dims or none
    return cache.append(layer, slots, project_key(layer, hidden, positions));
  cache.append(layer, slots,
               at::linear(hidden, layer_weights(layer).key.to(hidden.scalar_type()))
                   .view({hidden.size(0), config_.key_heads, config_.head_dim}),
               key_preparation(layer, positions));
}

double Selector::mix_scale() const {
  return 1.0 / std::sqrt(static_cast<double>(config_.num_heads * config_.head_dim));
}

at::Tensor Selector::project_weight(int64_t layer, const at::Tensor& hidden) const {
  const at::Tensor& mix = layer_weights(layer).mix;
  at::Tensor weight;
  if (hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16 && mix.scalar_type() == at::kFloat) {
    weight = wide_linear(hidden, mix);
  } else {
    const at::Tensor x = accumulation(hidden);
    weight = at::linear(x, mix.to(x.scalar_type()));
  }
  return weight.view({hidden.size(0), groups_, config_.num_heads}) * mix_scale();
}

AttentionPreparation Selector::prologue(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions,
                                        SelectorCache& cache) const {
  const LayerWeights& weights = layer_weights(layer);
  if (weights.query_key.scalar_type() != hidden.scalar_type() || weights.mix.scalar_type() != at::kFloat ||
      (config_.rope_dims != 0 && config_.rope_dims != 64))
    return {};
  return {.selector = ops::SelectorPrologue{.hidden = hidden,
                                            .mix = weights.mix,
                                            .mix_scale = mix_scale(),
                                            .preparation = key_preparation(layer, positions),
                                            .pool = cache.pool(layer),
                                            .format = cache.format(),
                                            .global_scale = cache.global_scale()},
          .selector_projection = weights.query_key};
}

SelectorProjection Selector::project(int64_t layer, const at::Tensor& hidden,
                                     const at::Tensor& positions) const {
  if (hidden.dim() != 2 || hidden.size(1) != backbone_.hidden_size)
    fail("selector of layer {}: hidden states are {}; they must be [tokens, {}]", layer,
         fmt::join(hidden.sizes(), "x"), backbone_.hidden_size);
  return {project_query(layer, hidden, positions), project_key(layer, hidden, positions),
          project_weight(layer, hidden)};
}

std::vector<std::pair<std::string, at::Tensor>> Selector::named_parameters() const {
  std::vector<std::pair<std::string, at::Tensor>> named;
  for (int64_t layer : layers_) {
    const LayerWeights& weights = layer_weights(layer);
    const std::string prefix = fmt::format("layers.{}.", layer);
    named.emplace_back(prefix + "query.weight", weights.query);
    named.emplace_back(prefix + "key.weight", weights.key);
    named.emplace_back(prefix + "mix.weight", weights.mix);
    if (weights.norm_weight.defined()) named.emplace_back(prefix + "key_norm.weight", weights.norm_weight);
    if (weights.norm_bias.defined()) named.emplace_back(prefix + "key_norm.bias", weights.norm_bias);
  }
  return named;
}

std::vector<at::Tensor> Selector::parameters() const {
  std::vector<at::Tensor> all;
  for (auto& [name, tensor] : named_parameters()) all.push_back(tensor);
  return all;
}

std::vector<at::Tensor> Selector::parameters(int64_t layer) const {
  const LayerWeights& weights = layer_weights(layer);
  std::vector<at::Tensor> some = {weights.query, weights.key, weights.mix};
  for (const at::Tensor& tensor : {weights.norm_weight, weights.norm_bias})
    if (tensor.defined()) some.push_back(tensor);
  return some;
}

int64_t Selector::num_parameters() const {
  int64_t count = 0;
  for (const at::Tensor& tensor : parameters()) count += tensor.numel();
  return count;
}

at::Tensor token_scores(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& key) {
  const int64_t heads = query.size(1), key_heads = key.size(1);
  if (query.dim() != 3 || key.dim() != 3 || weight.dim() != 3 || query.size(2) != key.size(2) ||
      weight.size(0) != query.size(0) || weight.size(2) != heads || (key_heads != 1 && key_heads != heads))
    fail(
        "token_scores: query {}, weight {} and key {} do not fit [Tq, heads, dim], [Tq, groups, heads] and "
        "[Tk, 1 or heads, dim]",
        fmt::join(query.sizes(), "x"), fmt::join(weight.sizes(), "x"), fmt::join(key.sizes(), "x"));
  const int64_t queries = query.size(0), tokens = key.size(0);
  const auto dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  // [Tq, heads, Tk]. A shared key is one plain product over all (query, head) rows.
  const at::Tensor dots = key_heads == 1
                              ? at::matmul(query.reshape({queries * heads, -1}), key.select(1, 0).t())
                                    .view({queries, heads, tokens})
                              : at::matmul(query.transpose(0, 1), key.permute({1, 2, 0})).transpose(0, 1);
  return at::matmul(weight.to(dtype), at::relu(dots.to(dtype))).transpose(0, 1);
}

}  // namespace spot
