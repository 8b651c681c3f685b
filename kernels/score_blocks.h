// The selector's score of every 16-token block of a sequence under one query.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

struct ScoreBlocksParams {
  KeyFormat format = KeyFormat::int4;
  int32_t key_heads = 1;          // 1 (shared) or kSelectorHeads
  int32_t batch = 0;              // B
  int32_t max_blocks = 0;         // width of block_scores; at least ceil(length / 16) of every row, at most
                                  // page_table_stride
  const void* queries = nullptr;  // [B, 4, 128] of query_type, contiguous, after RoPE
  DataType query_type = DataType::kBf16;
  const float* weights = nullptr;  // [B, 4] float32, every constant scale folded in
  const uint8_t* pages =
      nullptr;                // key pool [num_pages, key_heads, page_head_bytes(format)], 16-byte aligned
  float global_scale = 1.0f;  // nvfp4 only
  const int32_t* page_table = nullptr;  // [B, page_table_stride] pages of each row, on the device
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;  // [B] tokens of each row, on the device
  float* block_scores = nullptr;     // out [B, score_stride] float32
  int64_t score_stride = 0;          // >= max_blocks
  Overlap overlap = Overlap::kNone;
};

// block_scores[b, j] = max over tokens t of block j with t < lengths[b] of sum_h weights[b,h] ReLU(q_bh .
// k_t[h]), h = 0..3, k_t[h] the decoded key (the same for all h when key_heads is 1); -infinity for j past
// the length, up to max_blocks. Dot products in float32 on tensor cores; 16-bit queries enter exactly,
// float32 ones with 22 bits (16 against bf16 keys). A block's score does not depend on the batch, the grid or
// the neighbours: equal bits run to run.
cudaError_t score_blocks(const ScoreBlocksParams& params, cudaStream_t stream);

}  // namespace spot::kernels
