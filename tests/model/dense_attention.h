// Dense attention for the tests of this folder: each sequence's keys and values gathered, then torch's own
// attention.
#pragma once

#include "cache/batch_builder.h"
#include "model/attention.h"
#include "model/model_cache.h"

namespace spot::testing {

class GatheredAttention : public AttentionBackend {
 public:
  explicit GatheredAttention(PagedCache& cache) : pools_(cache.pools()) {}

  at::Tensor forward(const AttentionInputs& inputs) override {
    const Batch& batch = inputs.batch;
    const at::Tensor keys = pools_.get("keys", inputs.layer), values = pools_.get("values", inputs.layer);
    write_tokens(keys, batch.slots, inputs.key);
    write_tokens(values, batch.slots, inputs.value);
    std::vector<at::Tensor> outs;
    for (const QueryChunk& chunk : query_chunks(batch)) {
      const int64_t length = chunk.start + chunk.count;
      const auto history = [&](const at::Tensor& pool) {
        return gather_tokens(pool, batch.page_table[chunk.sequence], length)
            .to(inputs.query.scalar_type())
            .unsqueeze(0);
      };
      const at::Tensor query = inputs.query.narrow(0, chunk.first, chunk.count).transpose(0, 1).unsqueeze(0);
      const at::Tensor visible =
          at::ones({chunk.count, length}, query.options().dtype(at::kBool)).tril(chunk.start);
      outs.push_back(at::scaled_dot_product_attention(query, history(keys), history(values), visible, 0.0,
                                                      false, inputs.scale, /*enable_gqa=*/true)
                         .squeeze(0)
                         .transpose(0, 1));
    }
    return at::cat(outs);
  }

 private:
  PagePools& pools_;
};

}  // namespace spot::testing
