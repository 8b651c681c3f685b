// Small model shapes for the tests of this folder.
#pragma once

#include "checkpoint/config.h"

namespace spot::testing {

inline ModelConfig small_qwen3() {
  return ModelConfig::from_json({{"architectures", {"Qwen3ForCausalLM"}},
                                 {"hidden_size", 48},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"head_dim", 16},
                                 {"intermediate_size", 64},
                                 {"vocab_size", 101},
                                 {"max_position_embeddings", 400},
                                 {"tie_word_embeddings", false}},
                                "small qwen3");
}

// Six layers: linear, linear, full, linear, linear, full.
inline ModelConfig small_qwen3_5() {
  return ModelConfig::from_json({{"architectures", {"Qwen3_5ForCausalLM"}},
                                 {"hidden_size", 40},
                                 {"num_hidden_layers", 6},
                                 {"num_attention_heads", 4},
                                 {"num_key_value_heads", 2},
                                 {"head_dim", 16},
                                 {"intermediate_size", 56},
                                 {"vocab_size", 97},
                                 {"max_position_embeddings", 500},
                                 {"tie_word_embeddings", true},
                                 {"full_attention_interval", 3},
                                 {"linear_num_key_heads", 2},
                                 {"linear_num_value_heads", 6},
                                 {"linear_key_head_dim", 8},
                                 {"linear_value_head_dim", 12},
                                 {"linear_conv_kernel_dim", 4}},
                                "small qwen3.5");
}

// Biases on queries, keys and values.
inline ModelConfig small_qwen2() {
  return ModelConfig::from_json({{"architectures", {"Qwen2ForCausalLM"}},
                                 {"hidden_size", 84},
                                 {"num_hidden_layers", 2},
                                 {"num_attention_heads", 7},
                                 {"num_key_value_heads", 1},
                                 {"intermediate_size", 60},
                                 {"vocab_size", 103},
                                 {"max_position_embeddings", 450},
                                 {"tie_word_embeddings", true}},
                                "small qwen2");
}

// Layers 0 and 2 do not rotate.
inline ModelConfig small_smollm3() {
  return ModelConfig::from_json({{"architectures", {"SmolLM3ForCausalLM"}},
                                 {"hidden_size", 60},
                                 {"num_hidden_layers", 3},
                                 {"num_attention_heads", 6},
                                 {"num_key_value_heads", 2},
                                 {"head_dim", 12},
                                 {"intermediate_size", 52},
                                 {"vocab_size", 99},
                                 {"max_position_embeddings", 420},
                                 {"no_rope_layers", {0, 1, 0}}},
                                "small smollm3");
}

}  // namespace spot::testing
