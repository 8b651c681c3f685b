// The weights of a backbone as they lie in memory, and how they get there.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "model/rope.h"
#include "model/sharding.h"
#include "ops/linear_attention/gated_delta.h"

namespace spot {

class Checkpoint;

struct LinearWeights {
  at::Tensor weight;  // [out, in], of the model's dtype or FP8 codes
  at::Tensor bias;    // [out], or undefined
  at::Tensor scales;  // of codes, as ops::Linear takes them
};

struct AttentionWeights {
  LinearWeights qkv;  // rows: queries, (gates,) keys, values; see num_query_rows
  LinearWeights out;  // [hidden, num_heads * head_dim]
  at::Tensor
      qk_norm;  // [num_heads + num_kv_heads, head_dim] float32: the norm's factor of each query and key head
};

// A Gated DeltaNet layer. Its four input projections are one matrix, rows: queries | keys | values (the
// convolution's channels), output gate z, b, a.
struct DeltaNetWeights {
  LinearWeights in, out;  // rows of in: the convolution's channels, z, b, a
  ops::GatedDeltaWeights rule;
};

struct LayerWeights {
  at::Tensor input_norm, mlp_norm;  // [hidden]; float32 and already 1 + weight where the norm is zero-centred
  AttentionWeights attention;       // of a full-attention layer
  DeltaNetWeights delta;            // of a linear-attention layer
  LinearWeights gate_up;            // rows: gate, up
  LinearWeights down;
};

struct ModelWeights {
  ModelConfig config;
  at::ScalarType dtype;
  at::Tensor embedding;  // [vocab, hidden]
  at::Tensor head;       // [vocab, hidden]; the embedding itself when tied
  at::Tensor final_norm;
  std::vector<LayerWeights> layers;  // without their matrices where `sharded` holds those
  std::optional<ShardedLayers> sharded;
  RopeTable rope, no_rotation;  // the second, of one pair of dims, for layers that do not rotate
  std::string fingerprint;
};

// One tensor that a checkpoint of this architecture holds.
struct TensorSpec {
  enum class Init { normal, one, zero, log_uniform };  // how random weights fill it
  std::string name;                                    // without the prefix below
  std::vector<int64_t> shape;
  Init init = Init::normal;
};

// Every tensor of the text model, in loading order. Names begin after "model." (as a model with a head is
// saved), "model.language_model." (Qwen3.5 with its vision tower) or nothing (as a model without its head is,
// such as Qwen3-Embedding); "lm_head.weight" always stands without prefix.
std::vector<TensorSpec> tensor_specs(const ModelConfig& config);

// How a checkpoint names the text model's tensors, and what else it holds.
struct CheckedTensors {
  std::string prefix;
  int64_t vision = 0, multi_token = 0;  // tensors of these parts, which this project does not run

  std::string full_name(const std::string& short_name) const;
};

// Compares a checkpoint's tensors with those of tensor_specs. Throws Error naming the first that has another shape, a few
// of those that are missing, or of those that belong to nothing.
CheckedTensors check_tensors(const Checkpoint& checkpoint, const ModelConfig& config);

bool all_finite(const at::Tensor& tensor);

// See Backbone::load and Backbone::random.
ModelWeights load_weights(const std::filesystem::path& folder, const ModelConfig& config, at::Device device,
                          std::optional<at::ScalarType> dtype, const Shards& shards);
ModelWeights random_weights(const ModelConfig& config, at::Device device, at::ScalarType dtype,
                            uint64_t seed);

}  // namespace spot
