#include "model/model_cache.h"

namespace spot {

void declare_states(StateSlots& states, const ModelConfig& config) {
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < config.num_layers; ++layer)
    if (!config.is_full_attention(layer)) layers.push_back(layer);
  if (layers.empty()) return;
  const LinearAttentionConfig& c = config.linear;
  const int64_t channels = 2 * c.num_key_heads * c.key_head_dim + c.num_value_heads * c.value_head_dim;
  states.add("conv", layers, {c.conv_kernel - 1, channels});
  states.add("recurrent", layers, {c.num_value_heads, c.key_head_dim, c.value_head_dim});
}

ModelCache::ModelCache(const ModelConfig& config, int64_t num_pages, at::ScalarType dtype, at::Device device,
                       int64_t num_sequences, int64_t num_snapshots, const KvScales* scales)
    : PagedCache({.num_pages = num_pages,
                  .max_tokens = config.max_position_embeddings,
                  .vocab_size = config.vocab_size,
                  .num_sequences = num_sequences,
                  .num_snapshots = num_snapshots},
                 device) {
  const PageShape shape{{config.num_kv_heads}, {page_size(), config.head_dim}};
  for (const int64_t layer : config.full_attention_layers()) {
    if (scales) {
      pools().add_codes("keys", layer, shape, scales->keys.at(layer), dtype);
      pools().add_codes("values", layer, shape, scales->values.at(layer), dtype);
    } else {
      pools().add("keys", layer, shape, dtype);
      pools().add("values", layer, shape, dtype);
    }
  }
  declare_states(states(), config);
}

}  // namespace spot
