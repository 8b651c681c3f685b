#include "distill/initialize.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "attention/dense.h"
#include "core/error.h"
#include "distill/distill_attention.h"

namespace spot {
namespace {

// Rows (selector dims) and the backbone dims whose values they take.
struct DimPairs {
  std::vector<int64_t> selector, backbone;
  void add(int64_t to, int64_t from) {
    selector.push_back(to);
    backbone.push_back(from);
  }
};

// The rotated dims of a selector head: pair (i, i + rope_dims / 2) turns as often as the backbone's pair
// i * rotary_dim / rope_dims, where that is whole.
DimPairs rotated_dims(const SelectorConfig& config, const ModelConfig& backbone) {
  DimPairs dims;
  const int64_t half = config.rope_dims / 2, rotary = backbone.rope.rotary_dim;
  for (int64_t i = 0; i < half; ++i) {
    if (i * rotary % config.rope_dims != 0) continue;
    const int64_t j = i * rotary / config.rope_dims;
    dims.add(i, j);
    dims.add(i + half, j + rotary / 2);
  }
  return dims;
}

// The dims behind them: unrotated ones first, then those that turn slowest.
DimPairs plain_dims(const SelectorConfig& config, const ModelConfig& backbone) {
  const int64_t rotary = backbone.rope.rotary_dim;
  std::vector<int64_t> candidates;
  for (int64_t d = rotary; d < backbone.head_dim; ++d) candidates.push_back(d);
  for (int64_t j = rotary / 2 - 1; j >= 0; --j) {
    candidates.push_back(j);
    candidates.push_back(j + rotary / 2);
  }
  DimPairs dims;
  for (int64_t d = config.rope_dims; d < config.head_dim; ++d) {
    const auto i = static_cast<size_t>(d - config.rope_dims);
    if (i < candidates.size()) dims.add(d, candidates[i]);
  }
  return dims;
}

// Dense attention that looks at each layer with a selector before it goes on. Sequences come one at a time.
class Observer : public AttentionBackend {
 public:
  using Look = std::function<void(const AttentionInputs&)>;
  Observer(const Selector& selector, Look look) : selector_(selector), look_(std::move(look)) {}

  at::Tensor forward(const AttentionInputs& inputs) override {
    if (selector_.has_layer(inputs.layer)) look_(inputs);
    return causal_attention(inputs.query, inputs.key.transpose(0, 1), inputs.value.transpose(0, 1), 0,
                            inputs.scale);
  }

 private:
  const Selector& selector_;
  Look look_;
};

class Initializer {
 public:
  Initializer(const Backbone& backbone, Selector& selector)
      : model_(backbone.config()), config_(selector.config()), backbone_(backbone), selector_(selector) {
    const RopeTable table = rope_table(model_.rope, model_.max_position_embeddings, backbone.device());
    unrotate_ = {table.cos, -table.sin};
    rotated_ = rotated_dims(config_, model_);
    plain_ = plain_dims(config_, model_);
  }

  void run(const std::vector<TokenSequence>& sequences, const LayerLossOptions& options, Progress* progress) {
    int64_t done = 0;
    const auto report = [&] {
      if (progress) progress->update(++done);
    };
    Observer collect(selector_, [&](const AttentionInputs& inputs) { add(inputs), report(); });
    for (const TokenSequence& sequence : sequences)
      forward_sequence(backbone_, collect, sequence.tokens, {0});
    for (int64_t layer : selector_.layers()) solve(layer);
    Observer scale(selector_, [&](const AttentionInputs& inputs) {
      choose_gain(inputs, options);
      report();
    });
    forward_sequence(backbone_, scale, sequences.front().tokens, {0});
  }

 private:
  // A run of regression targets: dims of one backbone head, and the selector dims that they become.
  struct Target {
    bool is_key;
    int64_t selector_head, backbone_head;
    const DimPairs& dims;
  };
  // Sums over tokens of one layer's regression.
  struct Sums {
    at::Tensor squares;   // hidden^T hidden
    at::Tensor products;  // hidden^T targets
    at::Tensor energy;    // targets^2
    int64_t tokens = 0;
  };

  std::vector<Target> targets() const {
    const int64_t group = model_.num_heads / model_.num_kv_heads;
    std::vector<Target> list;
    for (int64_t h = 0; h < config_.num_heads; ++h) {
      const int64_t key = config_.key_heads == 1 ? 0 : h;
      const int64_t turning = 2 * key % model_.num_kv_heads, plain = (2 * key + 1) % model_.num_kv_heads;
      if (h < config_.key_heads) {
        list.push_back({true, h, turning, rotated_});
        list.push_back({true, h, plain, plain_});
      }
      list.push_back({false, h, turning * group + h % group, rotated_});
      list.push_back({false, h, plain * group + h % group, plain_});
    }
    return list;
  }

  void add(const AttentionInputs& inputs) {
    const auto unrotated = [&](const at::Tensor& x) {
      const at::Tensor wide = x.to(at::kFloat);
      return model_.rotates(inputs.layer) ? apply_rope(wide, inputs.batch.positions, unrotate_) : wide;
    };
    const at::Tensor hidden = inputs.hidden.to(at::kFloat), key = unrotated(inputs.key),
                     query = unrotated(inputs.query);
    std::vector<at::Tensor> columns;
    for (const Target& target : targets())
      columns.push_back(
          (target.is_key ? key : query)
              .select(1, target.backbone_head)
              .index_select(1, at::tensor(target.dims.backbone, hidden.options().dtype(at::kLong))));
    columns.push_back(at::ones({hidden.size(0), 1}, hidden.options()));
    const at::Tensor wanted = at::cat(columns, 1);
    Sums& sums = sums_[inputs.layer];
    const auto accumulate = [](at::Tensor& sum, const at::Tensor& more) {
      sum = sum.defined() ? sum.add_(more) : more;
    };
    accumulate(sums.squares, at::mm(hidden.t(), hidden));
    accumulate(sums.products, at::mm(hidden.t(), wanted));
    accumulate(sums.energy, wanted.square().sum(0));
    sums.tokens += hidden.size(0);
  }

  void solve(int64_t layer) {
    const Sums sums = std::move(sums_.at(layer));
    const auto tokens = static_cast<double>(sums.tokens);
    at::Tensor system = sums.squares.to(at::kDouble) / tokens;
    if (!system.isfinite().all().item<bool>() || !sums.products.isfinite().all().item<bool>())
      fail(
          "layer {}: a hidden state, query or key of the backbone is not finite; run it in float32 or bfloat16",
          layer);
    // A thousandth of the mean variance keeps directions that the text hardly uses from deciding anything.
    system.diagonal().add_(1e-3 * system.diagonal().mean());
    const at::Tensor fitted = at::linalg_solve(system, sums.products.to(at::kDouble) / tokens)
                                  .t()
                                  .to(at::kFloat);  // [columns, hidden]

    const std::vector<at::Tensor> weights = selector_.parameters(layer);  // query, key, mix, norm
    int64_t column = 0;
    for (const Target& target : targets()) {
      const auto count = static_cast<int64_t>(target.dims.selector.size());
      if (count == 0) continue;
      const at::Tensor rows = at::tensor(target.dims.selector, fitted.options().dtype(at::kLong)) +
                              target.selector_head * config_.head_dim;
      // Heads of unlike size become alike: a unit root mean square a dim.
      const at::Tensor size = sums.energy.narrow(0, column, count).mean().div(tokens).sqrt().clamp_min(1e-12);
      at::Tensor weight = weights[target.is_key ? 1 : 0];
      weight.index_copy_(0, rows, (fitted.narrow(0, column, count) / size).to(weight.scalar_type()));
      column += count;
    }
    at::Tensor mix = weights[2];
    mix.mul_(0.1).add_(fitted[column].to(mix.scalar_type()));
  }

  void choose_gain(const AttentionInputs& inputs, LayerLossOptions options) const {
    options.gradients = false;
    options.budgets.clear();
    const int64_t tokens = inputs.hidden.size(0), rows = std::min<int64_t>(tokens, 128);
    const SelectorProjection projection =
        selector_.project(inputs.layer, inputs.hidden, inputs.batch.positions);
    LayerLossInputs loss{.query = inputs.query,
                         .key = inputs.key,
                         .scale = inputs.scale,
                         .selector_query = projection.query,
                         .selector_key = projection.key,
                         .query_rows = (at::arange(rows, at::kLong) + 1) * tokens / rows - 1};
    double best_gain = 1.0, least = std::numeric_limits<double>::infinity();
    for (const double gain : {1.0 / 32, 1.0 / 16, 1.0 / 8, 1.0 / 4, 1.0 / 2, 1.0, 2.0}) {
      loss.selector_weight = projection.weight * gain;
      const double kl = layer_loss(loss, options).loss.item<double>();
      if (kl < least) {
        least = kl;
        best_gain = gain;
      }
    }
    at::Tensor mix = selector_.parameters(inputs.layer)[2];
    mix.mul_(best_gain);
  }

  const ModelConfig& model_;
  const SelectorConfig& config_;
  const Backbone& backbone_;
  Selector& selector_;
  RopeTable unrotate_;
  DimPairs rotated_, plain_;
  std::map<int64_t, Sums> sums_;
};

}  // namespace

int64_t initialization_tokens(const ModelConfig& backbone) {
  return 8 * backbone.hidden_size;
}

int64_t initialization_steps(const Selector& selector, const std::vector<TokenSequence>& sequences) {
  return static_cast<int64_t>(selector.layers().size() * (sequences.size() + 1));
}

void initialize_from_backbone(const Backbone& backbone, Selector& selector,
                              const std::vector<TokenSequence>& sequences, const LayerLossOptions& options,
                              Progress* progress) {
  const at::NoGradGuard no_grad;
  Initializer(backbone, selector).run(sequences, options, progress);
}

}  // namespace spot
