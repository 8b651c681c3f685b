// Sparse prefill in tiles of queries, on the operators of ops/prefill/prefill.h: score, select and attend a piece of the
// batch at a time, so that memory stays bounded at any length.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <vector>

#include "cache/page_pools.h"
#include "ops/prefill/prefill.h"
#include "selection/selection.h"

namespace spot {

struct TilePrefill {
  at::Tensor query;                     // [T, num_heads, head_dim], sequence after sequence
  KvPools pools;                        // keys and values of the new tokens are there already
  at::Tensor page_table;                // [sequences, pages] int32
  std::vector<int64_t> starts, counts;  // of each sequence: position of its first query, its queries
  double scale = 0;
  at::Tensor selector_query;   // [T, 4, 128]
  at::Tensor selector_weight;  // [T, groups, 4] float32
  at::Tensor selector_pool;    // with the new tokens' keys
  ops::KeyFormat format = ops::KeyFormat::bf16;
  double global_scale = 1;
  SelectionRule rule;  // for a tile's last query; a tile's own blocks are always kept
  int64_t tile_queries = 32;
  int64_t most_bytes =
      int64_t{512} << 20;  // of scores and lists at a time; one strip of 64 queries may take more
};

// The tiles of a batch as [N, 4] int32 on the CPU (ops/prefill/prefill.h).
at::Tensor query_tiles(const std::vector<int64_t>& starts, const std::vector<int64_t>& counts,
                       int64_t tile_queries);

// A row for each of some queries: the choice of its tile, up to its own block. tile_of_row [rows] int64; visible [rows]
// int32, the tokens that each query sees.
Selection rows_of_tiles(const Selection& tiles, const at::Tensor& tile_of_row, const at::Tensor& visible);

// What was chosen for some tiles (rows of query_tiles' result, empty ones too), a row of the selection each.
using TileObserver = std::function<void(const at::Tensor& tiles, const Selection& selection)>;

// Of the same, [4] float64 on the selection's device, each summed over the tiles' queries: queries, tokens that they
// attend to, tokens that they see, predicted mass (the middle one and the last averaged over groups). A tile's own
// tokens are listed, and each query before its last sees one less of them than the next. Queries below position
// `floor` are left out.
at::Tensor count_tile_tokens(const at::Tensor& tiles, const Selection& selection, int64_t floor = 0);

// Called when a stage of the work begins, and with `none` after the last one: for timing.
enum class TileStage { none, stage_keys, score, select, attend };
using TileClock = std::function<void(TileStage)>;

// [T, num_heads, head_dim]. A query's result depends on its own tile and the keys before it alone: not on what shares
// the batch, nor on most_bytes, nor on where a prompt is cut into chunks if it is cut at multiples of tile_queries.
at::Tensor prefill_in_tiles(const TilePrefill& prefill, const TileObserver& observer = {},
                            const TileClock& clock = {});

}  // namespace spot
