// The definition of the operators of sparse prefill, made of torch's own: the CPU's form, and the oracle of the CUDA one.
#include <limits>
#include <vector>

#include "kernels/query_tiles.h"
#include "ops/checks.h"
#include "ops/prefill/prefill.h"
#include "ops/selector/selector.h"

namespace spot::ops::aten {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Row i of `tiles`, whose rows, positions and sequence lie within what there is.
kernels::QueryTile tile_at(const char* op, const at::Tensor& tiles, int64_t i, int64_t tile_queries,
                           int64_t rows, int64_t sequences) {
  const int32_t* row = tiles.const_data_ptr<int32_t>() + 4 * i;
  const kernels::QueryTile tile = {row[0], row[1], row[2], row[3]};
  TORCH_CHECK(tile.count == 0 || (tile.sequence >= 0 && tile.sequence < sequences && tile.count > 0 &&
                                  tile.first_row >= 0 && tile.first_row + int64_t{tile.count} <= rows &&
                                  tile.start >= 0 && tile.start % tile_queries + tile.count <= tile_queries),
              op, ": tile ", i, " is (", tile.sequence, ", ", tile.first_row, ", ", tile.count, ", ",
              tile.start, "); for ", sequences, " sequences, ", rows, " queries and tiles of ", tile_queries,
              " it cannot be");
  return tile;
}

}  // namespace

at::Tensor selector_key_stage(const SelectorKeyStage& a) {
  at::Tensor keys =
      at::zeros({a.pool.size(1), a.tokens, kernels::kKeyDim}, a.pool.options().dtype(at::kBFloat16));
  for (int64_t s = 0; s < a.lengths.size(0); ++s) {
    const int64_t length = a.lengths[s].item<int32_t>(), begin = a.key_begins[s].item<int32_t>();
    TORCH_CHECK(length >= 0 && begin >= 0 && begin + length <= a.tokens,
                "spot::selector_key_stage: sequence ", s, " has ", length, " tokens from row ", begin,
                ", but there are ", a.tokens, " rows");
    const at::Tensor decoded =
        selector_key_gather(SelectorKeyGather{a.pool, a.page_table[s], length, a.format, a.global_scale});
    keys.narrow(1, begin, length).copy_(decoded.transpose(0, 1));
  }
  return keys;
}

at::Tensor score_tiles(const ScoreTiles& a) {
  const char* op = "spot::score_tiles";
  at::Tensor scores =
      at::full({a.tiles.size(0), a.weight.size(1), a.blocks}, kMinusInfinity, a.weight.options());
  for (int64_t i = 0; i < a.tiles.size(0); ++i) {
    const kernels::QueryTile tile =
        tile_at(op, a.tiles, i, a.tile_queries, a.query.size(0), a.key_begins.size(0));
    if (tile.count == 0) continue;
    const int64_t length = tile.start + tile.count, begin = a.key_begins[tile.sequence].item<int32_t>(),
                  blocks = (length + kPageTokens - 1) / kPageTokens;
    TORCH_CHECK(begin >= 0 && begin + length <= a.keys.size(1) && blocks <= a.blocks, op, ": tile ", i,
                " ends at ", length, " tokens, but there are ", a.keys.size(1) - begin, " keys and ",
                a.blocks, " blocks");
    const at::Tensor query =
        a.query.narrow(0, tile.first_row, tile.count).to(at::kBFloat16).to(at::kFloat).transpose(0, 1);
    const at::Tensor key = a.keys.narrow(1, begin, length).to(at::kFloat);
    const at::Tensor dots = at::matmul(query, key.transpose(1, 2)).relu();  // [4, count, length]
    at::Tensor mixed = at::matmul(a.weight.narrow(0, tile.first_row, tile.count),
                                  dots.transpose(0, 1));  // [count, groups, length]
    const at::Tensor position = at::arange(length, a.tiles.options());
    mixed = mixed.masked_fill((position > position.slice(0, tile.start).unsqueeze(1)).unsqueeze(1),
                              kMinusInfinity);
    scores[i]
        .narrow(1, 0, blocks)
        .copy_(at::constant_pad_nd(mixed.amax(0), {0, blocks * kPageTokens - length}, kMinusInfinity)
                   .unflatten(1, {blocks, kPageTokens})
                   .amax(2));
  }
  return scores;
}

at::Tensor attend_tiles(const AttendTiles& a) {
  const char* op = "spot::attend_tiles";
  at::Tensor output = at::zeros(a.query.sizes(), a.query.options());
  const int64_t kv_heads = a.key_pool.size(0), group = a.query.size(1) / kv_heads, groups = a.counts.size(1);
  const at::Tensor offsets = at::arange(kPageTokens, at::kLong);
  for (int64_t i = 0; i < a.tiles.size(0); ++i) {
    const kernels::QueryTile tile =
        tile_at(op, a.tiles, i, a.tile_queries, a.query.size(0), a.page_table.size(0));
    if (tile.count == 0) continue;
    const int64_t length = tile.start + tile.count;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t count = a.counts[i][g].item<int32_t>();
      TORCH_CHECK(count >= 0 && count <= a.indices.size(2), op, ": count ", count, " of tile ", i,
                  " exceeds ", a.indices.size(2), " indices");
      if (count == 0) continue;
      const at::Tensor blocks = a.indices[i][g].narrow(0, 0, count).to(at::kLong);
      const int64_t first = blocks.min().item<int64_t>(), last = blocks.max().item<int64_t>();
      TORCH_CHECK(first >= 0 && last * kPageTokens < length && last < a.page_table.size(1), op, ": tile ", i,
                  " lists a block past its ", length, " tokens or its ", a.page_table.size(1), " pages");
      const at::Tensor pages = a.page_table[tile.sequence].index_select(0, blocks).to(at::kLong);
      TORCH_CHECK(pages.min().item<int64_t>() >= 0 && pages.max().item<int64_t>() < a.key_pool.size(1), op,
                  ": the page table of tile ", i, " names a page that the pools' ", a.key_pool.size(1),
                  " do not have");
      at::Tensor position = (blocks.unsqueeze(1) * kPageTokens + offsets).flatten();
      const at::Tensor seen =
          (position < length).nonzero().flatten();  // what lies past the tile may be anything
      position = position.index_select(0, seen);
      const int64_t first_head = groups == 1 ? 0 : g, heads = groups == 1 ? kv_heads : 1;
      const auto listed = [&](const at::Tensor& pool) {  // [heads, tokens, dim]
        return pool.narrow(0, first_head, heads)
            .index_select(1, pages)
            .flatten(1, 2)
            .index_select(1, seen)
            .to(at::kFloat);
      };
      const auto rows = [&](at::Tensor x) {  // [count, heads * group, dim] of this tile and these heads
        return x.narrow(0, tile.first_row, tile.count).narrow(1, first_head * group, heads * group);
      };
      const at::Tensor query = rows(a.query)
                                   .to(at::kFloat)
                                   .unflatten(1, {heads, group})
                                   .permute({1, 2, 0, 3});  // [heads, group, count, dim]
      at::Tensor logits = at::matmul(query, listed(a.key_pool).transpose(1, 2).unsqueeze(1)) * a.scale;
      const at::Tensor own = at::arange(tile.start, length, at::kLong).unsqueeze(1);
      logits = logits.masked_fill(position > own, kMinusInfinity);
      // A query that sees none of them: 0.
      const at::Tensor weights = logits.softmax(-1).masked_fill(position > own, 0.0);
      rows(output).copy_(
          at::matmul(weights, listed(a.value_pool).unsqueeze(1)).permute({2, 0, 1, 3}).flatten(1, 2));
    }
  }
  return output;
}

}  // namespace spot::ops::aten
