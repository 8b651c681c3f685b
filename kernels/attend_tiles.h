// Exact softmax attention of tiles of queries over lists of blocks of their paged keys and values: the
// attention of a sparse prefill.
#pragma once

#include "kernels/query_tiles.h"
#include "kernels/types.h"

namespace spot::kernels {

struct AttendTilesParams {
  DataType type = DataType::kBf16;  // of queries, keys, values, out: kBf16 or kF16
  int32_t num_tiles = 0;
  int32_t tile_queries = 32;         // T: 16, 32 or 64
  const QueryTile* tiles = nullptr;  // [num_tiles], on the device
  int32_t num_heads = 0;             // Hq
  int32_t num_kv_heads = 0;          // Hkv, divides Hq
  int32_t head_dim = 128;            // 64, 128 or 256
  float scale = 0.0f;                // of the logits, head_dim^-1/2
  // [rows, Hq, head_dim]; element strides, multiples of 8, dims contiguous, pointers 16-byte aligned.
  const void* queries = nullptr;
  int64_t query_row_stride = 0, query_head_stride = 0;
  // Pools; element strides from page to page, head to head and token to token (16 a page), dims contiguous;
  // multiples of 8, pointers 16-byte aligned. Ours are [Hkv, num_pages, 16, head_dim].
  const void* keys = nullptr;
  const void* values = nullptr;
  int32_t num_pages = 0;
  int64_t page_stride = 0, head_stride = 0, token_stride = 0;
  const int32_t* page_table = nullptr;  // [sequences, page_table_stride], on the device
  int64_t page_table_stride = 0;
  // [num_tiles * rows_per_tile, max_selected] block indices, ascending, none beyond the block of the tile's
  // last query; which keys of a block a query sees, its position decides.
  const int32_t* selected = nullptr;
  const int32_t* counts = nullptr;  // [num_tiles * rows_per_tile]
  int32_t max_selected = 0;
  int32_t rows_per_tile = 1;     // 1: one list for all heads; Hkv: one a KV head
  void* out = nullptr;           // [rows, Hq, head_dim], contiguous; 0 for a query that sees no listed key
  float* log_sum_exp = nullptr;  // [rows, Hq] natural log, -infinity where out is 0; may be null
  bool portable = false;         // the portable kernel on every device
};

// A query's result depends on its own numbers, its tile's list and the listed keys up to its position, on
// nothing else: equal bits in any batch. Keys of a listed block past the tile's last query are never read
// into a result, whatever they hold. Devices of compute capability 9.0 run a kernel of their own, whose bits
// differ from the portable one's (8.0 and later).
cudaError_t attend_tiles(const AttendTilesParams& params, cudaStream_t stream);

}  // namespace spot::kernels
