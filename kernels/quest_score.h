// Quest's block scores: an upper bound of the logits in each page from its keys' elementwise bounds.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

// For every block b < ceil(length / 16) and KV head: scale * sum_i max(q_i min_i, q_i max_i), merged over the
// KV head's query heads by their maximum or mean. -infinity for the other blocks up to max_blocks.
struct QuestScoreParams {
  DataType type = DataType::kBf16;          // of queries and bounds: kBf16 or kF16
  int32_t batch = 0;                        // R
  int32_t num_heads = 0, num_kv_heads = 0;  // their ratio is 1..16
  int32_t head_dim = 128;                   // 64, 128 or 256
  float scale = 0.0f;
  bool mean = false;
  const void* queries = nullptr;  // [R, Hq, head_dim], 16-byte aligned
  const void* bounds = nullptr;   // [Hkv, num_pages, 2, head_dim], 16-byte aligned (key_summary_append.h)
  int64_t num_pages = 0;
  const int32_t* page_table = nullptr;  // [R, page_table_stride]
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;  // [R]
  int32_t max_blocks = 0;            // >= blocks of the longest row
  float* scores = nullptr;           // out [R, Hkv, max_blocks]
  Overlap overlap = Overlap::kNone;
};

cudaError_t quest_score(const QuestScoreParams& params, cudaStream_t stream);

}  // namespace spot::kernels
