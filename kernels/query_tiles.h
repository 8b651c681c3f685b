// Tiles: runs of neighbouring queries of a sparse prefill that share block sets.
#pragma once

#include <cstdint>

namespace spot::kernels {

// Queries at positions [k T, (k + 1) T) of a sequence, those of them that the batch brings. T = tile_queries
// divides kStripQueries.
struct QueryTile {
  int32_t sequence;   // row of the page table
  int32_t first_row;  // of the query tensors: the row of the first query
  int32_t count;      // queries, 0 .. T; a tile without any is skipped
  int32_t start;      // position of the first query
};

// Scoring takes a strip of queries at once: tiles [s (64 / T), (s + 1) (64 / T)) of a list are those of
// positions [64 k, 64 (k + 1)) of one sequence, with empty tiles where the batch brings no query.
inline constexpr int kStripQueries = 64;

// Groups of mixing weights that one launch of score_tiles takes.
inline constexpr int kMaxScoreGroups = 16;

}  // namespace spot::kernels
