// The two halves of the distillation loss over a strip of queries, torch.ops.spot.attention_mass and
// selector_kl. The ATen form serves every device and dtype and is the oracle of the CUDA kernels
// (kernels/teacher_mass.h, kernels/selector_kl.h), which serve what fuses_mass and fuses_kl say.
#pragma once

#include <ATen/ATen.h>

namespace spot::ops {

// A strip: query row r is token tokens[r] and sees the keys of tokens low[r] .. last[r], its document up to
// itself or a part of that. Maps have a column for each of the `width` tokens from first_key on, which must
// hold all that is seen.
struct QueryStrip {
  at::Tensor tokens, low, last;  // [R] int32 on the inputs' device, all ascending
  int64_t first_key = 0, width = 0;
};

// Probabilities averaged over the heads of each of `groups` groups of consecutive query heads. query [T,
// num_heads, head_dim], key [T, num_kv_heads, head_dim]; logsumexp [num_heads, T] float32 or float64, the
// natural logarithm of each query's sum of e^(scale q . k), over its document up to itself whatever of that
// its row sees.
struct AttentionMass {
  at::Tensor mass;   // [R, groups, width] float32 (float64 for float64 queries), 0 where a row does not see
  at::Tensor total;  // [R, groups], the rows' sums: 1 up to rounding where a row sees all, else less
};
AttentionMass attention_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                             const QueryStrip& strip, double scale, int64_t groups);
bool fuses_mass(const at::Tensor& query, const at::Tensor& key);

// KL(teacher || student) of each row, where teacher is mass over its sum on the keys the row sees, and
// student
// the softmax of sum_h weight[h] ReLU(query[h] . key[h]) over them; and the gradients of the rows' sum. With
// k_train > 0 both are renormalised on the k_train keys of highest score (ties to the lower), fewer where a
// row sees fewer. A row without mass (less than 1e-37; 1e-300 in float64) has no loss and no gradient.
struct SelectorKl {
  at::Tensor loss, entropy;  // [R]; entropy is that of the teacher on all keys, in nats
  at::Tensor grad_query;     // [R, heads, dim]
  at::Tensor grad_weight;    // [R, heads]
};
// mass [R, width] and total [R] as from attention_mass with one group; query [T, heads, dim]; key [T, heads
// or
// 1, dim]; weight [T, heads] of mass's dtype. k_train > 0 may overwrite mass. grad_key [heads or 1, T, dim]
// of mass's
// dtype: the gradient of keys is added to it; undefined: no gradients. On CUDA the scores' gradients are
// rounded to bfloat16 once, before the products that make the other two of them.
SelectorKl selector_kl(at::Tensor mass, const at::Tensor& total, const at::Tensor& query,
                       const at::Tensor& key, const at::Tensor& weight, const QueryStrip& strip,
                       int64_t k_train, at::Tensor grad_key);
bool fuses_kl(const at::Tensor& query, const at::Tensor& key);

}  // namespace spot::ops
