// Twilight's estimate of attention logits: queries against the 4-bit copy of the keys of candidate blocks.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

struct EstimateLogitsParams {
  DataType type = DataType::kBf16;          // of queries: kBf16 or kF16
  int32_t batch = 0;                        // R
  int32_t num_heads = 0, num_kv_heads = 0;  // their ratio is 1..16
  int32_t head_dim = 128;                   // 64, 128 or 256
  float scale = 0.0f;
  const void* queries = nullptr;   // [R, Hq, head_dim], contiguous
  const uint8_t* codes = nullptr;  // as key_summary_append writes them; 16-byte aligned
  const void* ranges = nullptr;    // 4-byte aligned
  int64_t num_pages = 0;
  const int32_t* page_table = nullptr;  // [R, page_table_stride]
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;   // [R]
  const int32_t* selected = nullptr;  // [R, Hkv, max_selected] block indices, ascending
  const int32_t* counts = nullptr;    // [R, Hkv]
  int32_t max_selected = 0;
  // out [R, Hq, max_selected * 16]: scale * q . key of the candidates' tokens in order, -infinity past the
  // length; what lies behind a row's candidates is not written.
  float* logits = nullptr;
  Overlap overlap = Overlap::kNone;
};

cudaError_t estimate_logits(const EstimateLogitsParams& params, cudaStream_t stream);

}  // namespace spot::kernels
