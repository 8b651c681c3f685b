// Exact attention over everything cached.
#pragma once

#include <ATen/ATen.h>

#include "model/attention.h"
#include "model/kv_cache.h"

namespace spot {

// The new tokens of one sequence in a batch, or a run of them.
struct QueryChunk {
  int64_t sequence;  // index in the batch, not the cache's id
  int64_t first;     // first row in the batch's [T, ...] tensors
  int64_t count;     // rows
  int64_t start;     // position of the first row; row i sees start + i + 1 tokens
};

// The whole batch as chunks of at most `most` queries, in order (0: one chunk a sequence).
std::vector<QueryChunk> query_chunks(const Batch& batch, int64_t most = 0);

// Page tables, lengths and slots of a batch on the cache's device; the same for every layer of a forward
// pass, so kept from the pass's first layer to its last.
class BatchView {
 public:
  // `layer` in increasing order within a pass; a layer not above the last one begins a new pass.
  void update(const KvCache& cache, const Batch& batch, int64_t layer);
  // From now on update() does nothing: the caller has set the tensors and refreshes their contents in place,
  // as a captured CUDA graph needs.
  void fix() { fixed_ = true; }

  at::Tensor slots;       // [T] int64
  at::Tensor page_table;  // [num_sequences, most pages] int32
  at::Tensor lengths;     // [num_sequences] int32

 private:
  int64_t last_layer_ = -1;
  bool fixed_ = false;
};

// Causal attention of query [T, num_heads, head_dim] at positions start .. start + T - 1 over key and value
// [num_kv_heads, length, head_dim], length >= start + T. Grouped-query heads are not copied; queries are
// taken in chunks, so that memory grows with length, not with its square. Returns [T, num_heads, head_dim].
// `logsumexp`, where given, becomes the logarithm of each softmax's normaliser, [num_heads, T] float32, if
// the
// implementation that serves these inputs has it at hand (flash attention; on the CPU from position 0,
// several
// queries), and is left alone otherwise.
at::Tensor causal_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            int64_t start, double scale, at::Tensor* logsumexp = nullptr);

// Page ids of a sequence's first `blocks` blocks, [blocks] int64.
at::Tensor sequence_pages(const KvCache& cache, int64_t sequence, int64_t blocks, at::Device device);

// Dense attention of the whole batch, whose keys and values are in the cache already. A decode step runs the
// sparse operator over every block: it is faster on the CPU than torch's attention, needs no host lengths,
// and sparse attention with a full budget then gives the same bits.
at::Tensor attend_dense(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view);

class DenseAttention : public AttentionBackend {
 public:
  explicit DenseAttention(KvCache& cache) : cache_(cache) {}
  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override;
  // Writes keys and values to the cache unless prepare() had it done, then attends.
  at::Tensor forward(const AttentionInputs& inputs) override;
  BatchView& view() { return view_; }

 private:
  KvCache& cache_;
  BatchView view_;
};

}  // namespace spot
