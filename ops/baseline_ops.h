// The operators behind Quest and Twilight, the baselines: torch.ops.spot.append_key_summaries, quest_scores,
// estimate_logits, prune_tokens and token_attention. Rows, page tables, lengths and errors as in ops.h. CUDA
// serves
// bfloat16 and float16, head_dim 64, 128 and 256 and at most 16 query heads a KV head, with no wait for the
// device.
#pragma once

#include <ATen/ATen.h>

#include "ops/ops.h"

namespace spot::ops {

// After keys were written to key_pool [Hkv, pages, 16, head_dim] at slots [T] int64 (each sequence's new
// tokens in
// order): takes the bounds of every page that got tokens anew, bounds [Hkv, pages, 2, head_dim] of the pool's
// dtype,
// minimum then maximum; and, where they are defined, writes the new keys' 4-bit copy, codes [Hkv, pages * 16,
// head_dim / 2] uint8 and ranges [Hkv, pages * 16, 2] float16. kernels/key_summary_append.h defines both.
void append_key_summaries(at::Tensor bounds, at::Tensor codes, at::Tensor ranges, const at::Tensor& key_pool,
                          const at::Tensor& slots);

// Quest's bound of each page, scale * sum_i max(q_i min_i, q_i max_i): [R, Hkv, table width] float32, the
// maximum
// over each KV head's query heads, or [R, 1, table width], the mean over all heads. -inf past the length.
at::Tensor quest_scores(const at::Tensor& query, const at::Tensor& bounds, const at::Tensor& page_table,
                        const at::Tensor& lengths, double scale, bool per_kv_head);

// scale * q . key with the keys' 4-bit copy, of candidate blocks, indices [R, Hkv, M] and counts [R, Hkv] as
// from
// select_blocks: [R, num_heads, M * 16] float32; -inf past the length, unspecified behind a row's candidates.
at::Tensor estimate_logits(const at::Tensor& query, const at::Tensor& codes, const at::Tensor& ranges,
                           const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                           const at::Tensor& counts, double scale);

// Each query head keeps the fewest of its candidates' tokens that hold mass p of its logits' softmax, and a
// KV head
// their union; exactly as kernels/prune_tokens.h says. Rows of at most `floor` tokens keep all.
struct PrunedTokens {
  at::Tensor positions;  // [R, Hkv, M * 16] int32, ascending, unspecified behind the counts
  at::Tensor counts;     // [R, Hkv] int32
};
PrunedTokens prune_tokens(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& counts,
                          const at::Tensor& lengths, double p, int64_t floor);

// As sparse_decode_attention, over single tokens: positions [R, Hkv, W] and counts [R, Hkv] int32, ascending.
at::Tensor token_attention(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                           const at::Tensor& page_table, const at::Tensor& lengths,
                           const at::Tensor& positions, const at::Tensor& counts, double scale);

}  // namespace spot::ops
