// Attention of prefill chunks over pages.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "cache/batch.h"
#include "model/attention.h"

namespace spot {

// Prefill chunks of a batch: chunk i is rows query_starts[i] .. query_starts[i + 1] - 1 of the batch's
// tensors, and its last row sees lengths[i] tokens of its sequence, which lie on the pages of page_table[i].
// On the device for a kernel: page_table [chunks, most pages], lengths [chunks], query_starts [chunks + 1],
// all int32. The same on the host: chunks, and the first page of each where its pages are consecutive, else
// -1.
struct PagedChunks {
  at::Tensor page_table, lengths, query_starts;
  std::vector<QueryChunk> chunks;
  std::vector<int64_t> first_pages;
};

// `chunks` are consecutive whole sequences of the batch.
PagedChunks paged_chunks(const Batch& batch, const std::vector<QueryChunk>& chunks);

// Causal attention of query [T, num_heads, head_dim] over the pools; writes the chunks' rows of output [T, num_heads,
// head_dim] and no other. A sequence is read in place where its pages are consecutive and hold numbers, and gathered
// elsewhere: an FP8 cache's own new tokens too, as stored, so that a prompt's cuts do not change what a query sees.
void paged_prefill_attention(const at::Tensor& query, const KvPools& pools, const PagedChunks& chunks,
                             double scale, const at::Tensor& output);

// The batch's prefill chunks, into their rows of `output`.
void attend_prefill(const AttentionInputs& inputs, const KvPools& pools, const at::Tensor& output);

}  // namespace spot
