// The selector: per full-attention layer, three small projections whose score estimates the layer's
// attention.
//
//   q = RoPE(x W_q)          [tokens, 4, 128]
//   k = RoPE(norm(x W_k))    [tokens, key_heads, 128]
//   w = x W_w / sqrt(4 * 128)  [tokens, groups, 4], float32, unconstrained in sign
//   score(query, token) = sum_h w_h ReLU(q_h . k_h)
//
// where x is the hidden state that enters attention, after its input norm. groups is 1, or num_kv_heads with
// per: kv_group (then each KV head mixes the same q . k its own way). Source: SpotAttention section 2.2; the
// scale, which 64 dims rotate and the key norm follow DeepSeek-V3.2's indexer.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/config.h"
#include "model/attention.h"
#include "model/backbone.h"
#include "model/rope.h"
#include "selector/cache.h"
#include "selector/config.h"

namespace spot {

struct SelectorProjection {
  at::Tensor query;   // [T, num_heads, head_dim], dtype of hidden
  at::Tensor key;     // [T, key_heads, head_dim], dtype of hidden
  at::Tensor weight;  // [T, groups, num_heads] float32 (float64 for float64 hidden), score scale folded in
};

class Selector {
 public:
  // The q and k weights are kept in `dtype`, the mixing and norm weights in float32 (float64 with float64).
  //
  // Fresh weights: uniform with variance 1/hidden_size, a pure function of seed, layer and shape, so equal
  // bit for bit on every device. `backbone` gives hidden size, KV heads, RoPE and which layers have full
  // attention; the layers in config.selection.dense_layers get none. Throws Error when that leaves no layer.
  Selector(const SelectorConfig& config, const ModelConfig& backbone, at::Device device,
           at::ScalarType dtype = at::kFloat, uint64_t seed = 42);

  // Loads a folder written by save(). `selector` is a path, or a bare NAME for model_folder/selectors/NAME.
  // Throws Error when the files are missing, misshapen or not finite, and when they were made for a backbone of another
  // architecture or shape. Whether it was for these weights is made_for().
  static Selector load(const std::string& selector, const std::filesystem::path& model_folder,
                       const ModelConfig& backbone, at::Device device, at::ScalarType dtype = at::kFloat);
  // The config alone, after the same checks of selector.json: the weights are not read.
  static SelectorConfig read_config(const std::string& selector, const std::filesystem::path& model_folder,
                                    const ModelConfig& backbone);
  // The folder load() would read.
  static std::filesystem::path resolve(const std::string& selector,
                                       const std::filesystem::path& model_folder);

  // Writes folder/selector.safetensors (float32, query and key projections in `format`; docs/distillation.md) and
  // folder/selector.json, each atomically, weights first. `notes` (an object: steps, tokens, losses, ...) is
  // kept under "notes".
  void save(const std::filesystem::path& folder, const std::string& fingerprint,
            const nlohmann::json& notes = nlohmann::json::object(),
            WeightFormat format = WeightFormat::float32) const;
  // Writes the config and `notes` into the selector.json of the folder that this selector was loaded from, atomically;
  // everything else in the folder stays as it is. Throws Error when the file is damaged by now.
  void save_config(const std::filesystem::path& folder, const nlohmann::json& notes) const;

  const SelectorConfig& config() const { return config_; }
  // Temperatures may be fitted after training; save() keeps what is set here.
  SelectionDefaults& selection() { return config_.selection; }
  const nlohmann::json& notes() const { return notes_; }
  // Of the backbone's weights that it was distilled on, as save() was told; empty: unknown.
  const std::string& fingerprint() const { return fingerprint_; }
  // Whether those may be the weights of this fingerprint. On others of the architecture, such as the model before a
  // quantisation or a fine-tuning, a selector may serve as well; engine/self_check.h finds out.
  bool made_for(const std::string& fingerprint) const;

  // Model layers that hold a selector, ascending.
  const std::vector<int64_t>& layers() const { return layers_; }
  bool has_layer(int64_t layer) const { return weights_.count(layer) > 0; }
  int64_t groups() const { return groups_; }
  // The rule for a model layer: its temperature times the fitted one, and a threshold on all attention, which is one on
  // the residual of each set for the kernels: thresholds[set] = threshold / config().selection.residual_mass.
  SelectionRule fitted(int64_t layer, SelectionRule rule) const;

  // hidden [T, hidden_size], positions [T] int64. Differentiable in the weights and in hidden. The q and k
  // products run in hidden's dtype (weights are cast), norm, RoPE and w in float32. Throws Error for a layer
  // without a selector.
  SelectorProjection project(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) const;
  at::Tensor project_query(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) const;
  at::Tensor project_key(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions) const;
  at::Tensor project_weight(int64_t layer, const at::Tensor& hidden) const;

  // project_key and SelectorCache::append in one: norm, RoPE and quantisation run in one kernel, in float32
  // throughout, so that the stored key is not first rounded to hidden's dtype. slots [T] int64.
  void append_keys(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions,
                   const at::Tensor& slots, SelectorCache& cache) const;

  // What the kernel between a layer's projections and its attention needs to do project_query, project_weight
  // and append_keys in the same launch, after one product (after join() the backbone's own). Without a
  // selector where that cannot be: the weights are of another dtype than hidden, or the rotated dims are not
  // 0 or 64.
  AttentionPreparation prologue(int64_t layer, const at::Tensor& hidden, const at::Tensor& positions,
                                SelectorCache& cache) const;

  // Moves every layer's query and key weights and the backbone's own projection into one matrix, for
  // prologue(); the backbone and all parameters keep their values and are read from there. No memory is
  // doubled unless several living selectors join one backbone. Layers of another dtype or device stay apart.
  // Not while a graph captured from the backbone is in use.
  void join(const Backbone& backbone);

  // Every weight, in a fixed order (layers ascending; query, key, mix, norm): what an optimiser takes. The
  // tensors are leaves without requires_grad; the trainer sets it.
  std::vector<at::Tensor> parameters() const;
  std::vector<at::Tensor> parameters(int64_t layer) const;
  // The same with their names, such as "layers.3.key_norm.weight".
  std::vector<std::pair<std::string, at::Tensor>> named_parameters() const;
  int64_t num_parameters() const;

 private:
  struct LayerWeights {
    at::Tensor query_key;  // [(num_heads + key_heads) * head_dim, hidden_size]: the memory of the next two
    at::Tensor query;      // [num_heads * head_dim, hidden_size]
    at::Tensor key;        // [key_heads * head_dim, hidden_size]
    at::Tensor mix;        // [groups * num_heads, hidden_size]
    at::Tensor norm_weight, norm_bias;  // [head_dim] float32; undefined where the norm has none
  };
  Selector() = default;
  // What load() takes from selector.json: a selector without weights, and the document.
  static std::pair<Selector, nlohmann::json> read_document(const std::filesystem::path& folder,
                                                           const ModelConfig& backbone, at::Device device);
  static at::ScalarType fine_type(at::ScalarType dtype);
  // Moves query and key into one matrix, below the rows of `projection` if that is defined; its bias is then
  // followed by a zero for each row of theirs.
  static void stack(LayerWeights& weights, const Backbone::Projection& projection = {});
  void bind(const SelectorConfig& config, const ModelConfig& backbone, at::Device device);
  const LayerWeights& layer_weights(int64_t layer) const;
  ops::KeyPreparation key_preparation(int64_t layer, const at::Tensor& positions) const;
  double mix_scale() const;

  SelectorConfig config_;
  ModelConfig backbone_;
  nlohmann::json notes_ = nlohmann::json::object();
  std::string fingerprint_;
  int64_t groups_ = 1;
  std::vector<int64_t> layers_;
  std::map<int64_t, LayerWeights> weights_;
  RopeTable rope_;
};

// score[g, q, t] = sum_h weight[q, g, h] * ReLU(query[q, h] . key[t, h]); with one key head all heads share
// it. query [Tq, num_heads, dim], weight [Tq, groups, num_heads], key [Tk, key_heads, dim] of query's dtype,
// in which the products run -> [groups, Tq, Tk], float32 (float64 for float64 weights). Not causal: the
// caller masks. Differentiable; holds num_heads * Tq * Tk numbers.
at::Tensor token_scores(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& key);

}  // namespace spot
