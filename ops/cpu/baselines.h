// The CPU implementations behind ops/baseline_ops.h; same arguments, already checked there for shape and
// dtype.
#pragma once

#include "ops/baseline_ops.h"

namespace spot::ops::cpu {

void append_key_summaries(at::Tensor bounds, at::Tensor codes, at::Tensor ranges, const at::Tensor& key_pool,
                          const at::Tensor& slots);
// Always [R, Hkv, width]; `mean` merges each KV head's query heads by their mean instead of their maximum.
at::Tensor quest_scores(const at::Tensor& query, const at::Tensor& bounds, const at::Tensor& page_table,
                        const at::Tensor& lengths, double scale, bool mean);
at::Tensor estimate_logits(const at::Tensor& query, const at::Tensor& codes, const at::Tensor& ranges,
                           const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                           const at::Tensor& counts, double scale);
PrunedTokens prune_tokens(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& counts,
                          const at::Tensor& lengths, double p, int64_t floor);
at::Tensor token_attention(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                           const at::Tensor& page_table, const at::Tensor& lengths,
                           const at::Tensor& positions, const at::Tensor& counts, double scale);

}  // namespace spot::ops::cpu
