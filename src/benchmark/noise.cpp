#include "benchmark/noise.h"

#include "cache/batch_builder.h"

namespace spot {

void fill_with_noise(const Backbone& backbone, AttentionStack& stack, int64_t sequence, int64_t count) {
  const ModelConfig& config = backbone.config();
  PagedCache& cache = stack.cache();
  SelectionPolicy* policy = stack.policy(0);
  const Batch batch = make_batch(cache, {sequence}, {std::vector<int32_t>(static_cast<size_t>(count), 0)});
  const auto options = at::TensorOptions().device(backbone.device()).dtype(backbone.dtype());
  for (const int64_t layer : config.full_attention_layers()) {
    const AttentionInputs inputs{layer,
                                 at::randn({count, config.hidden_size}, options),
                                 at::Tensor(),
                                 at::randn({count, config.num_kv_heads, config.head_dim}, options),
                                 at::randn({count, config.num_kv_heads, config.head_dim}, options),
                                 1.0,
                                 batch};
    write_tokens(kv_pools(cache.pools(), layer), batch.slots, inputs.key, inputs.value);
    if (policy && policy->covers(layer)) policy->append(inputs);
  }
}

}  // namespace spot
