// Exact softmax attention of one query token a sequence over a list of blocks of its paged keys and values.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

// Every (sequence, KV head) is attended in this many splits of its block list, whatever the list's length,
// the batch and the grid: split s of a list of n blocks is [s n / 16, (s + 1) n / 16), its blocks go round
// the 4 warps, warps are folded in order, then splits in order. So batch, neighbours and launch shape cannot
// change a bit of the result.
inline constexpr int kAttentionSplits = 16;

struct SparseDecodeAttentionParams {
  DataType type = DataType::kBf16;  // of queries, out and, without e4m3, keys and values: kBf16 or kF16
  bool e4m3 = false;                // keys and values are E4M3 codes, a byte each
  int32_t batch = 0;                // B
  int32_t num_heads = 0;            // Hq; Hq / Hkv in 1..16
  int32_t num_kv_heads = 0;         // Hkv
  int32_t head_dim = 128;           // 64, 128 or 256
  float scale = 0.0f;               // of the logits, head_dim^-1/2
  const void* queries = nullptr;    // [B, Hq, head_dim], contiguous
  // Pools; element strides from page to page, head to head and token to token (16 a page), dims contiguous;
  // multiples of 16 bytes, pointers 16-byte aligned. Ours are [Hkv, num_pages, 16, head_dim].
  const void* keys = nullptr;
  const void* values = nullptr;
  int64_t page_stride = 0, head_stride = 0, token_stride = 0;
  // What E4M3 codes of keys and of values are multiplied by, float32 on the device; strides from KV head to KV
  // head (0: one for all). Null: 1.
  const float* key_scales = nullptr;
  const float* value_scales = nullptr;
  int64_t key_scale_stride = 0, value_scale_stride = 0;
  const int32_t* page_table = nullptr;  // [B, page_table_stride], on the device
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;  // [B] tokens, on the device
  const int32_t* selected =
      nullptr;  // [B * rows_per_sequence, max_selected] block indices, ascending; null: all blocks
  const int32_t* counts = nullptr;  // [B * rows_per_sequence]
  int32_t max_selected = 0;
  int32_t rows_per_sequence = 1;  // 1: one list for all heads; Hkv: one a KV head
  void* out = nullptr;            // [B, Hq, head_dim], contiguous
  float* log_sum_exp =
      nullptr;  // [B, Hq] natural log, -infinity for empty lists (whose out is 0); may be null
  void* workspace =
      nullptr;  // sparse_decode_workspace_bytes, 256-byte aligned, zeroed once before its first use
  size_t workspace_bytes = 0;
  Overlap overlap = Overlap::kNone;
};

// Bytes for the given batch and heads. Calls that may run at the same time need workspaces of their own.
size_t sparse_decode_workspace_bytes(int32_t batch, int32_t num_heads, int32_t num_kv_heads,
                                     int32_t head_dim);

cudaError_t sparse_decode_attention(const SparseDecodeAttentionParams& params, cudaStream_t stream);

// The check of shapes, strides and alignments that sparse_decode_attention begins with.
cudaError_t check_attention(const SparseDecodeAttentionParams& params);

}  // namespace spot::kernels
