// Dense attention for the tests of this folder: each sequence's keys and values gathered, then torch's own
// attention.
#pragma once

#include "model/attention.h"
#include "model/kv_cache.h"

namespace spot::testing {

class GatheredAttention : public AttentionBackend {
 public:
  explicit GatheredAttention(KvCache& cache) : cache_(cache) {}

  at::Tensor forward(const AttentionInputs& inputs) override {
    const Batch& batch = inputs.batch;
    cache_.write(inputs.layer, cache_.slots(batch), inputs.key, inputs.value);
    std::vector<at::Tensor> outs;
    int64_t first = 0;
    for (int64_t i = 0; i < batch.num_sequences(); ++i) {
      const int64_t count = batch.query_lengths[i], length = batch.starts[i] + count;
      const auto history = [&](const at::Tensor& pool) {
        return cache_.gather(pool, batch.sequences[i], length).to(inputs.query.scalar_type()).unsqueeze(0);
      };
      const at::Tensor query = inputs.query.narrow(0, first, count).transpose(0, 1).unsqueeze(0);
      const at::Tensor visible =
          at::ones({count, length}, query.options().dtype(at::kBool)).tril(batch.starts[i]);
      outs.push_back(at::scaled_dot_product_attention(query, history(cache_.keys(inputs.layer)),
                                                      history(cache_.values(inputs.layer)), visible, 0.0,
                                                      false, inputs.scale, /*enable_gqa=*/true)
                         .squeeze(0)
                         .transpose(0, 1));
      first += count;
    }
    return at::cat(outs);
  }

 private:
  KvCache& cache_;
};

}  // namespace spot::testing
