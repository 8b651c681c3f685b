// The student of distillation: the selector's score distribution over a strip's keys, its divergence from the
// teacher, and the gradient with respect to the scores, as what the remaining matrix products need.
#pragma once

#include "kernels/query_strip.h"

namespace spot::kernels {

inline constexpr int kKlChunk = 512;  // columns a block; sums are kept for each chunk of them apart
inline constexpr int kKlSums = 8;

// score[r, c] = sum_h weight[r, h] ReLU(query[r, h] . key[c, h]), one key for all heads where key_heads is 1;
// student[r, .] = softmax of the scores over the keys that row r sees.
struct SelectorKlParams {
  QueryStrip strip;
  int32_t key_heads = 1;  // 1 or 4
  // bf16, by token: strides in elements, multiples of 8; pointers aligned to 16 bytes; dims contiguous.
  const void* query = nullptr;    // [num_tokens, 4, 128]
  const void* key = nullptr;      // [num_tokens, key_heads, 128]
  const float* weight = nullptr;  // [num_tokens, 4], contiguous, aligned to 16 bytes
  int64_t query_token_stride = 0, query_head_stride = 0, key_token_stride = 0, key_head_stride = 0;
  // [rows, width], contiguous: the teacher, whose distribution is mass over its sum on the keys that count.
  float* mass = nullptr;
  const float* total = nullptr;  // [rows]: that sum; of the dense loss alone
  // Positive: the sparse loss. Of each row only the k_train keys with the highest scores count, ties to the
  // lower column; teacher and student are renormalised over them. `mass` is then overwritten (see
  // top_members.h), and these two are needed: [rows, width] and, in nats, [rows], the teacher's entropy over
  // all keys seen.
  int32_t k_train = 0;
  float* scores = nullptr;
  float* entropy = nullptr;
  // [rows, chunks], chunks = ceil(width / kKlChunk): log2 of the chunk's sum of e^score; -inf: no key seen.
  float* chunk_logsumexp = nullptr;
  // [rows, chunks, kKlSums], over the chunk's keys that count; t is the teacher's distribution, log natural.
  // All of a row are 0 where its teacher has no mass (below kSmallestMass), and so is dots_grad.
  //   0 sum t (log t - log student)   1 sum t log t   2 sum t   3 unused (0)
  //   4 + h: sum (student - t) ReLU(query_h . key_h), the gradient of the row's loss with respect to weight
  //   h.
  float* sums = nullptr;
  // bf16: the gradient of the row's loss with respect to query_h . key_h, 0 where a key does not count.
  // Element (r, h, c) at r * row_stride + h * head_stride + c, strides multiples of 8. Null: not wanted.
  void* dots_grad = nullptr;
  int64_t dots_grad_row_stride = 0, dots_grad_head_stride = 0;
};

cudaError_t selector_kl(const SelectorKlParams& params, cudaStream_t stream);

}  // namespace spot::kernels
