#include "attention/prefill.h"

#include "attention/dense.h"
#include "cache/page_pools.h"

namespace spot {

PagedChunks paged_chunks(const Batch& batch, const std::vector<QueryChunk>& chunks) {
  PagedChunks paged{.chunks = chunks};
  if (chunks.empty()) return paged;
  const int64_t first = chunks.front().sequence, count = static_cast<int64_t>(chunks.size());
  paged.page_table = batch.page_table.narrow(0, first, count);
  paged.lengths = batch.lengths.narrow(0, first, count);
  paged.query_starts = batch.query_starts.narrow(0, first, count + 1);
  paged.first_pages.assign(batch.first_pages.begin() + first, batch.first_pages.begin() + first + count);
  return paged;
}

void paged_prefill_attention(const at::Tensor& query, const KvPools& pools, const PagedChunks& chunks,
                             double scale, const at::Tensor& output) {
  for (size_t i = 0; i < chunks.chunks.size(); ++i) {
    const QueryChunk& chunk = chunks.chunks[i];
    const int64_t length = chunk.start + chunk.count;
    const auto tokens = [&](const TokenPool& pool) {
      return chunks.first_pages[i] >= 0
                 ? view_tokens(pool, chunks.first_pages[i], length)
                 : gather_tokens(pool, chunks.page_table.select(0, static_cast<int64_t>(i)), length);
    };
    output.narrow(0, chunk.first, chunk.count)
        .copy_(causal_attention(query.narrow(0, chunk.first, chunk.count), tokens(pools.keys),
                                tokens(pools.values), chunk.start, scale));
  }
}

void attend_prefill(const AttentionInputs& inputs, const KvPools& pools, const at::Tensor& output) {
  paged_prefill_attention(inputs.query, pools, paged_chunks(inputs.batch, prefill_chunks(inputs.batch)),
                          inputs.scale, output);
}

}  // namespace spot
