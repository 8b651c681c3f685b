// selector.json against a small model; the weights are not reached.
#include "fuzz.h"
#include "selector/selector.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const spot::ModelConfig model = [] {
    spot::ModelConfig config;
    config.architecture = "Qwen3ForCausalLM", config.model_type = "qwen3";
    config.hidden_size = 16, config.num_layers = 2, config.num_heads = 2, config.num_kv_heads = 1;
    config.head_dim = 8, config.intermediate_size = 16, config.vocab_size = 32;
    config.max_position_embeddings = 64, config.rope.rotary_dim = 8;
    config.layer_kinds.assign(2, spot::LayerKind::full_attention);
    return config;
  }();
  const auto& folder = spot::fuzz::folder();
  folder.write("selector.json", data, size);
  return spot::fuzz::expect_nothing_but_errors(
      [&] { spot::Selector::read_config(folder.path().string(), "", model); });
}
