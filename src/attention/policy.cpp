#include "attention/policy.h"

#include <algorithm>
#include <limits>

namespace spot {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Lengths of a chunk's queries, [count] int32: row i sees start + i + 1 tokens.
at::Tensor row_lengths(const QueryChunk& chunk, at::Device device) {
  return at::arange(chunk.start + 1, chunk.start + chunk.count + 1,
                    at::TensorOptions(device).dtype(at::kInt));
}

}  // namespace

void SelectionPolicy::set_rule(const SelectionRule& rule) {
  validate(rule);
  rule_ = rule;
}

at::Tensor SelectionPolicy::score_decode(const AttentionInputs& inputs) {
  const auto options = inputs.query.options().dtype(at::kFloat);
  at::Tensor scores = at::full({inputs.batch.num_sequences(), groups(), inputs.batch.page_table.size(1)},
                               kMinusInfinity, options);
  for (const QueryChunk& chunk : query_chunks(inputs.batch)) {
    if (inputs.batch.sequences[chunk.sequence] < 0) continue;  // a padded row
    const at::Tensor row = score_chunk(inputs, chunk);
    scores[chunk.sequence].narrow(1, 0, row.size(2)).copy_(row[0]);
  }
  return scores;
}

namespace {

void add_tokens(Selection& selection, ops::PrunedTokens kept, bool flags) {
  selection.token_positions = std::move(kept.positions);
  selection.token_counts = std::move(kept.counts);
  if (flags) selection.tokens = token_flags(selection);
}

}  // namespace

Selection SelectionPolicy::select_decode(const AttentionInputs& inputs, bool flags) {
  const Batch& batch = inputs.batch;
  Selection selection = select_blocks(score_decode(inputs), batch.lengths, rule(inputs.layer));
  if (prunes_tokens())
    add_tokens(selection,
               surviving_tokens(inputs.layer, inputs.query, batch.page_table, batch.lengths, inputs.scale,
                                selection),
               flags);
  return selection;
}

Selection SelectionPolicy::select_chunk(const AttentionInputs& inputs, const QueryChunk& chunk,
                                        int64_t query_tile) {
  const at::Tensor lengths = row_lengths(chunk, inputs.query.device());
  at::Tensor scores = score_chunk(inputs, chunk);
  auto pruned = [&](Selection selection) {
    if (!prunes_tokens()) return selection;
    const at::Tensor table = sequence_pages(inputs.batch, chunk.sequence, chunk.start + chunk.count);
    add_tokens(
        selection,
        surviving_tokens(inputs.layer, chunk_rows(inputs.query, chunk),
                         table.unsqueeze(0).expand({chunk.count, -1}), lengths, inputs.scale, selection),
        true);
    return selection;
  };
  if (query_tile == 1) return pruned(select_blocks(scores, lengths, rule(inputs.layer)));

  // Tiles lie at multiples of query_tile; those at the chunk's ends may be partial.
  const int64_t before = chunk.start % query_tile;
  const int64_t tiles = (before + chunk.count + query_tile - 1) / query_tile;
  const int64_t after = tiles * query_tile - before - chunk.count;
  scores = at::constant_pad_nd(scores, {0, 0, 0, 0, before, after}, kMinusInfinity)
               .view({tiles, query_tile, scores.size(1), scores.size(2)})
               .amax(1);
  const at::Tensor tile_of_row = at::div(
      at::arange(before, before + chunk.count, lengths.options().dtype(at::kLong)), query_tile, "floor");
  const at::Tensor last =
      ((at::arange(1, tiles + 1, lengths.options()) + chunk.start / query_tile) * query_tile)
          .clamp_max(chunk.start + chunk.count);
  SelectionRule tile_rule = rule(inputs.layer);
  if (query_tile > kBlockSize)  // every query's own block
    tile_rule.recency = std::max(tile_rule.recency, static_cast<int32_t>(query_tile));
  return pruned(rows_of_tiles(select_blocks(scores, last, tile_rule), tile_of_row, lengths));
}

}  // namespace spot
