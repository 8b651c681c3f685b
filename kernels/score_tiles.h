// The selector's score of every 16-token block under tiles of queries: what a sparse prefill selects by.
#pragma once

#include "kernels/query_tiles.h"
#include "kernels/types.h"

namespace spot::kernels {

struct ScoreTilesParams {
  int32_t num_tiles = 0;             // a multiple of kStripQueries / tile_queries
  int32_t tile_queries = 32;         // T: 16, 32 or 64
  const QueryTile* tiles = nullptr;  // [num_tiles], strip by strip (query_tiles.h), on the device
  int32_t key_heads = 1;             // 1 (shared) or kSelectorHeads
  int32_t groups = 1;                // G, 1 .. kMaxScoreGroups: mixings, each with scores of its own
  // [rows, 4, 128] bf16 after RoPE; element stride a multiple of 8, the rest contiguous, 16-byte aligned.
  const void* queries = nullptr;
  int64_t query_row_stride = 0;
  const float* weights = nullptr;  // [rows, G, 4] float32, contiguous, 16-byte aligned, every scale folded in
  // [key_heads, key_tokens, 128] bf16, as stage_keys leaves them, 16-byte aligned: the token at position t of a
  // sequence is row key_begins[sequence] + t of a head.
  const void* keys = nullptr;
  int64_t key_tokens = 0;
  const int32_t* key_begins = nullptr;  // [sequences], on the device
  int64_t longest = 0;                  // at least the position of every tile's last query + 1
  float* scores = nullptr;              // out [num_tiles, G, score_stride] float32
  int64_t score_stride = 0;             // >= ceil(longest / 16)
  bool portable = false;                // the portable kernel on every device
};

// scores[i, g, b] = max over the queries q of tile i and the tokens t of block b that q sees (t up to its position)
// of sum_h weights[q,g,h] ReLU(q_h . k_t[h]), h = 0..3 (the same key for all h when key_heads is 1), for the blocks
// up to that of the tile's last query; the rest of a row is left alone. Dot products in float32 on tensor cores. A
// score depends on its own queries and keys alone: equal bits in any batch, and whatever chunk brings the tile.
cudaError_t score_tiles(const ScoreTilesParams& params, cudaStream_t stream);

struct StageKeysParams {
  KeyFormat format = KeyFormat::int4;
  int32_t key_heads = 1;           // 1 or kSelectorHeads
  const uint8_t* pages = nullptr;  // pool [num_pages, key_heads, page_head_bytes(format)], 16-byte aligned
  float global_scale = 1.0f;       // nvfp4 only
  int32_t sequences = 0;
  const int32_t* page_table = nullptr;  // [sequences, page_table_stride], on the device
  int64_t page_table_stride = 0;
  const int32_t* lengths = nullptr;     // [sequences] tokens, on the device
  int64_t longest = 0;                  // at least every length
  const int32_t* key_begins = nullptr;  // [sequences], on the device
  void* keys = nullptr;                 // out [key_heads, key_tokens, 128] bf16, 16-byte aligned
  int64_t key_tokens = 0;
};

// The keys of whole sequences, decoded and rounded to bf16, side by side (mxfp4 and nvfp4 with a global scale of a
// power of two are exact): 256 bytes a token and key head, for one layer at a time.
cudaError_t stage_keys(const StageKeysParams& params, cudaStream_t stream);

}  // namespace spot::kernels
