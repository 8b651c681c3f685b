#include "attention/tile_prefill.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "kernels/query_tiles.h"
#include "ops/prefill/prefill.h"

namespace spot {
namespace {

constexpr int64_t kPage = kernels::kPageTokens;

// Tiles [first, end) of the whole list: their rows of the batch and the blocks that they see.
struct Piece {
  int64_t first, end, first_row, rows, blocks;
};

std::vector<Piece> pieces_of(const at::Tensor& tiles, int64_t per_strip, int64_t groups, int64_t most_bytes) {
  const auto tile = tiles.accessor<const int32_t, 2>();
  std::vector<Piece> pieces;
  for (int64_t strip = 0; strip < tiles.size(0); strip += per_strip) {
    Piece next = {strip, strip + per_strip, -1, 0, 0};
    for (int64_t i = strip; i < next.end; ++i) {
      if (tile[i][2] == 0) continue;
      if (next.first_row < 0) next.first_row = tile[i][1];
      next.rows += tile[i][2];
      next.blocks = (tile[i][3] + tile[i][2] + kPage - 1) / kPage;
    }
    const int64_t blocks = pieces.empty() ? 0 : std::max(pieces.back().blocks, next.blocks);
    // A float of scores and an index for each tile, group and block.
    if (!pieces.empty() && (next.end - pieces.back().first) * groups * blocks * 8 <= most_bytes)
      pieces.back().end = next.end, pieces.back().rows += next.rows, pieces.back().blocks = blocks;
    else
      pieces.push_back(next);
  }
  return pieces;
}

// Pools that the kernels can read, and the pages of each sequence in them.
struct ReadablePools {
  at::Tensor keys, values, page_table;
};

// Codes become numbers in pages of their own, the sequences' one after the other.
ReadablePools readable(const TilePrefill& a) {
  if (!a.pools.keys.has_codes()) return {a.pools.keys.stored, a.pools.values.stored, a.page_table};
  const int64_t width = a.page_table.size(1);
  std::vector<at::Tensor> pages;
  std::vector<int32_t> first;
  int64_t count = 0;
  for (size_t i = 0; i < a.starts.size(); ++i) {
    const int64_t own = a.counts[i] > 0 ? (a.starts[i] + a.counts[i] + kPage - 1) / kPage : 0;
    pages.push_back(a.page_table.select(0, static_cast<int64_t>(i)).narrow(0, 0, own));
    first.push_back(static_cast<int32_t>(count));
    count += own;
  }
  const at::Tensor all = at::cat(pages), begin = at::tensor(first, at::kInt).to(all.device()).unsqueeze(1);
  // What lies past a sequence's own pages is not read; it names a page that is there.
  const at::Tensor table =
      (begin + at::arange(width, all.options())).clamp_max(static_cast<int32_t>(count - 1));
  return {gather_pages(a.pools.keys, all), gather_pages(a.pools.values, all), table.contiguous()};
}

}  // namespace

at::Tensor query_tiles(const std::vector<int64_t>& starts, const std::vector<int64_t>& counts,
                       int64_t tile_queries) {
  if (tile_queries != 16 && tile_queries != 32 && tile_queries != 64)
    fail("sparse prefill: a tile has {} queries; it must have 16, 32 or 64", tile_queries);
  std::vector<int32_t> tiles;
  int64_t row = 0;
  for (size_t sequence = 0; sequence < starts.size(); ++sequence) {
    const int64_t start = starts[sequence], end = start + counts[sequence];
    for (int64_t tile = start / kernels::kStripQueries * kernels::kStripQueries;
         counts[sequence] > 0 && (tile < end || tile % kernels::kStripQueries != 0); tile += tile_queries) {
      const int64_t from = std::max(tile, start), to = std::min(tile + tile_queries, end);
      for (const int64_t value : {static_cast<int64_t>(sequence), row + from - start, to - from, from})
        tiles.push_back(from < to ? static_cast<int32_t>(value) : 0);
    }
    row += counts[sequence];
  }
  return at::tensor(tiles, at::kInt).view({-1, 4});
}

Selection rows_of_tiles(const Selection& tiles, const at::Tensor& tile_of_row, const at::Tensor& visible) {
  const auto rows = [&](const at::Tensor& x) { return x.index_select(0, tile_of_row); };
  at::Tensor indices = rows(tiles.indices);
  indices = indices.masked_fill(indices * kPage >= visible.view({-1, 1, 1}), -1);
  const at::Tensor own_block = (visible + (kPage - 1)).bitwise_and(~static_cast<int32_t>(kPage - 1));
  return {indices, indices.ge(0).sum(-1, false, at::kInt), rows(tiles.predicted_mass),
          at::minimum(rows(tiles.lengths), own_block)};
}

at::Tensor count_tile_tokens(const at::Tensor& tiles, const Selection& selection, int64_t floor) {
  const at::Tensor on_device = tiles.to(selection.counts.device()).to(at::kDouble);
  const at::Tensor start = on_device.select(1, 3), end = start + on_device.select(1, 2);
  const at::Tensor queries = (end - start.clamp_min(static_cast<double>(floor))).clamp_min(0);
  const at::Tensor listed = selection.counts.to(at::kDouble).mean(1) * kPage,
                   past_end = at::ceil(end / kPage) * kPage - end, unseen = queries * (queries - 1) / 2;
  const at::Tensor mass = at::nan_to_num(selection.predicted_mass.to(at::kDouble).mean(1));
  return at::stack({queries.sum(), (queries * (listed - past_end) - unseen).sum(),
                    (queries * end - unseen).sum(), (queries * mass).sum()});
}

at::Tensor prefill_in_tiles(const TilePrefill& a, const TileObserver& observer, const TileClock& clock) {
  const auto begin = [&](TileStage stage) {
    if (clock) clock(stage);
  };
  begin(TileStage::stage_keys);
  const at::Tensor tiles = query_tiles(a.starts, a.counts, a.tile_queries);
  const at::Device device = a.query.device();
  at::Tensor output = at::empty(a.query.sizes(), a.query.options());
  if (tiles.size(0) == 0) return output;

  std::vector<int32_t> lengths, begins;
  int64_t tokens = 0;
  for (size_t i = 0; i < a.starts.size(); ++i) {
    begins.push_back(static_cast<int32_t>(tokens));
    lengths.push_back(a.counts[i] > 0 ? static_cast<int32_t>(a.starts[i] + a.counts[i]) : 0);
    tokens += lengths.back();
  }
  const at::Tensor key_begins = at::tensor(begins, at::kInt).to(device);
  const at::Tensor keys =
      ops::selector_key_stage({a.selector_pool, a.page_table, at::tensor(lengths, at::kInt).to(device),
                               key_begins, tokens, a.format, a.global_scale});
  const ReadablePools pools = readable(a);
  SelectionRule rule = a.rule;
  rule.recency = std::max(rule.recency, static_cast<int32_t>(a.tile_queries));

  const int64_t per_strip = kernels::kStripQueries / a.tile_queries, groups = a.selector_weight.size(1);
  for (const Piece& piece : pieces_of(tiles, per_strip, groups, a.most_bytes)) {
    begin(TileStage::score);
    // Rows count from the piece's first.
    const at::Tensor own = tiles.slice(0, piece.first, piece.end).clone(), filled = own.select(1, 2) > 0;
    own.select(1, 1).sub_(piece.first_row).mul_(filled);
    const at::Tensor here = own.to(device), ends = (own.select(1, 2) + own.select(1, 3)).to(device);
    const auto rows = [&](const at::Tensor& x) { return x.narrow(0, piece.first_row, piece.rows); };
    const at::Tensor scores = ops::score_tiles({rows(a.selector_query), rows(a.selector_weight), keys,
                                                key_begins, here, a.tile_queries, piece.blocks});
    begin(TileStage::select);
    const Selection selection = select_blocks(scores, ends, rule);
    begin(TileStage::attend);
    rows(output).copy_(ops::attend_tiles({rows(a.query), pools.keys, pools.values, pools.page_table, here,
                                          a.tile_queries, selection.indices, selection.counts, a.scale}));
    begin(TileStage::none);
    if (observer) observer(tiles.slice(0, piece.first, piece.end), selection);
  }
  return output;
}

}  // namespace spot
