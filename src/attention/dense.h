// Exact attention over everything cached.
#pragma once

#include <ATen/ATen.h>

#include "cache/paged_cache.h"
#include "model/attention.h"

namespace spot {

// Causal attention of query [T, num_heads, head_dim] at positions start .. start + T - 1 over key and value
// [num_kv_heads, length, head_dim], length >= start + T. Grouped-query heads are not copied; queries are
// taken in chunks, so that memory grows with length, not with its square. Returns [T, num_heads, head_dim].
// `logsumexp`, where given, becomes the logarithm of each softmax's normaliser, [num_heads, T] float32, if
// the implementation that serves these inputs has it at hand (flash attention; on the CPU from position 0,
// several queries), and is left alone otherwise.
at::Tensor causal_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            int64_t start, double scale, at::Tensor* logsumexp = nullptr);

// Dense attention of the whole batch, whose keys and values are in the pools already. Decode rows run the
// sparse operator over every block: it reads pages only, is faster on the CPU than torch's attention, needs no
// host lengths, and sparse attention with a full budget then gives the same bits. Prefill chunks go through
// prefill.h.
at::Tensor attend_dense(const AttentionInputs& inputs, const KvPools& pools);
// The decode rows of it, [num_decodes, num_heads, head_dim]; every row of `inputs` is one.
at::Tensor attend_dense_decode(const AttentionInputs& inputs, const KvPools& pools);

class DenseAttention : public AttentionBackend {
 public:
  // `cache` has the pools "keys" and "values" and outlives this object.
  explicit DenseAttention(const PagedCache& cache) : pools_(cache.pools()) {}
  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override;
  // Writes keys and values to the cache unless prepare() had it done, then attends.
  at::Tensor forward(const AttentionInputs& inputs) override;

 private:
  const PagePools& pools_;
};

}  // namespace spot
