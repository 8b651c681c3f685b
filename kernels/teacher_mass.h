// The teacher of distillation: attention probabilities averaged over query heads.
#pragma once

#include "kernels/query_strip.h"

namespace spot::kernels {

// Columns of which the mass is summed up apart.
inline constexpr int mass_chunk(int head_dim) {
  return head_dim == 256 ? 128 : 256;
}

struct TeacherMassParams {
  DataType data_type = DataType::kBf16;  // bf16 or f16, of query and key
  QueryStrip strip;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;  // divides num_heads
  int32_t head_dim = 0;      // 64, 128 or 256
  int32_t groups = 1;  // divides num_kv_heads; group g averages num_heads / groups consecutive query heads
  float scale = 1.0f;  // of the softmax
  // Strides in elements, multiples of 8; pointers aligned to 16 bytes; dims contiguous.
  const void* query = nullptr;  // [num_tokens, num_heads, head_dim]
  const void* key = nullptr;    // [num_tokens, num_kv_heads, head_dim]
  int64_t query_token_stride = 0, query_head_stride = 0, key_token_stride = 0, key_head_stride = 0;
  // [num_heads, num_tokens], tokens contiguous: natural logarithm of each query's sum of e^(scale q . k), as
  // flash attention returns it: over its document up to itself, whatever of that the strip's row sees.
  const float* logsumexp = nullptr;
  int64_t logsumexp_head_stride = 0;
  float* mass =
      nullptr;  // [rows, groups, width], contiguous; all of it is written, 0 where a row does not see
  // [rows, groups, ceil(width / mass_chunk(head_dim))], contiguous: sums of `mass` over the chunks' columns.
  float* chunk_sums = nullptr;
};

cudaError_t teacher_mass(const TeacherMassParams& params, cudaStream_t stream);

}  // namespace spot::kernels
