// The architecture of a backbone, read from a Hugging Face config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/quantization.h"

namespace spot {

enum class RopeScaling { none, yarn, llama3, linear, dynamic };

// Rotary position embedding over the first `rotary_dim` dims of each head, half-split pairing (i with i +
// rotary_dim/2). Linear scaling divides positions by `factor`; dynamic scaling changes nothing up to
// max_position_embeddings, which is as far as a model with it goes here.
struct RopeConfig {
  double theta = 10000.0;
  int64_t rotary_dim = 0;
  RopeScaling scaling = RopeScaling::none;
  double factor = 1.0;
  int64_t original_max_position_embeddings = 0;
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn
  double attention_factor = 0.0;                         // yarn; 0: 0.1 ln(factor) + 1
  bool truncate = true;                                  // yarn; the ramp's ends are rounded to whole dims
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
};

enum class LayerKind { full_attention, linear_attention };

// Shape of a Gated DeltaNet layer (Qwen3.5).
struct LinearAttentionConfig {
  int64_t num_key_heads = 0, num_value_heads = 0, key_head_dim = 0, value_head_dim = 0, conv_kernel = 0;
};

struct ModelConfig {
  std::string architecture;  // as published, such as "Qwen3ForCausalLM"
  std::string model_type;    // as published, such as "qwen3"
  int64_t hidden_size = 0, num_layers = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0,
          intermediate_size = 0;
  int64_t vocab_size = 0;
  // Under YaRN at least factor * original_max_position_embeddings; with a sliding window at most that.
  int64_t max_position_embeddings = 0;
  // Where layers attend to so many tokens only (Mistral 7B v0.1), else 0. Within it they see everything, so
  // the model runs exactly, but no further.
  int64_t sliding_window = 0;
  double rms_norm_eps = 1e-6;
  bool tie_word_embeddings = false, mlp_bias = false;
  bool qkv_bias = false, attention_output_bias = false;
  bool qk_norm = false;            // RMSNorm per head on q and k before RoPE (Qwen3, Qwen3.5)
  bool zero_centred_norm = false;  // RMSNorm multiplies by 1 + weight (Qwen3.5)
  bool attention_output_gate =
      false;  // q_proj also yields a gate; sigmoid(gate) multiplies the output (Qwen3.5)
  RopeConfig rope;
  std::vector<LayerKind> layer_kinds;  // [num_layers]
  std::vector<int64_t> nope_layers;    // whose queries and keys are not rotated (SmolLM3), ascending
  LinearAttentionConfig linear;
  std::vector<int64_t> eos_token_ids;  // from generation_config.json, else config.json
  std::string torch_dtype;             // dtype of the stored weights; empty where the config does not say
  Quantization quantization;           // how the checkpoint stores its linear layers

  bool is_full_attention(int64_t layer) const { return layer_kinds.at(layer) == LayerKind::full_attention; }
  bool rotates(int64_t layer) const;  // whether the layer's queries and keys turn with their positions
  // Indices of the layers that hold a KV cache and may hold a selector, ascending.
  std::vector<int64_t> full_attention_layers() const;

  // Reads folder/config.json (and generation_config.json if there). Accepts LlamaForCausalLM,
  // MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM and Qwen3.5 (text_config of a
  // vision-language checkpoint too). RoPE's fields may stand in rope_scaling, rope_parameters or at the top;
  // absent fields have transformers' defaults. Throws Error on another architecture, on a missing or
  // impossible field, and on settings not supported (mixture of experts, unknown rope types and quantisations).
  static ModelConfig load(const std::filesystem::path& folder);
  static ModelConfig from_json(const nlohmann::json& config, const std::string& source);

  // Turns on YaRN by `factor` (1 turns scaling off) over the positions the model was trained on, and raises
  // max_position_embeddings to factor * original. `original` 0: the config's own, where it has scaling, else
  // max_position_embeddings (for Qwen3 pass 32768: its 40960 hold room for the answer). Throws Error for a
  // model with a sliding window or linear scaling.
  void set_yarn(double factor, int64_t original = 0);
};

}  // namespace spot
