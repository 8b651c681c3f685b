#include "attention/policy.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "ops/selector/selector.h"
#include "ops/settled_history.h"

namespace spot {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Lengths of a chunk's queries, [count] int32: row i sees start + i + 1 tokens.
at::Tensor row_lengths(const QueryChunk& chunk, at::Device device) {
  return at::arange(chunk.start + 1, chunk.start + chunk.count + 1,
                    at::TensorOptions(device).dtype(at::kInt));
}

at::Tensor rows_of(const at::Tensor& tensor, const QueryChunk& chunk) {
  return tensor.narrow(0, chunk.first, chunk.count);
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
        surviving_tokens(inputs.layer, rows_of(inputs.query, chunk),
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

SpotPolicy::SpotPolicy(const Selector& selector, SelectorCache& cache, const SelectionRule& rule)
    : SelectionPolicy(rule), selector_(selector), keys_(cache) {
  if (cache.key_heads() != selector.config().key_heads)
    fail("the selector cache has {} key heads, the selector {}; make the cache from the selector's config",
         cache.key_heads(), selector.config().key_heads);
  for (int64_t layer : selector.layers()) cache.pool(layer);
}

SelectionRule SpotPolicy::rule(int64_t layer) const {
  SelectionRule rule = rule_;
  rule.temperature *= selector_.temperature(layer);
  return rule;
}

AttentionPreparation SpotPolicy::prepare(int64_t layer, const at::Tensor& hidden,
                                         const at::Tensor& positions) {
  return selector_.prologue(layer, hidden, positions, keys_);
}

void SpotPolicy::append(const AttentionInputs& inputs) {
  if (inputs.selector_query.defined()) return;  // prepare() has had it done
  selector_.append_keys(inputs.layer, inputs.hidden, inputs.batch.positions, inputs.batch.slots, keys_);
}

at::Tensor SpotPolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const at::Tensor hidden = rows_of(inputs.hidden, chunk), positions = rows_of(inputs.batch.positions, chunk);
  const at::Tensor query = selector_.project_query(inputs.layer, hidden, positions).to(at::kFloat);
  const at::Tensor weight = selector_.project_weight(inputs.layer, hidden);
  const int64_t length = chunk.start + chunk.count, blocks = (length + kBlockSize - 1) / kBlockSize;
  const at::Tensor key =
      keys_.gather(inputs.layer, sequence_pages(inputs.batch, chunk.sequence, length), length);
  at::Tensor scores = at::empty({chunk.count, groups(), blocks}, weight.options());
  // In parts, so that the [4, queries, tokens] products stay small.
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 24) / (4 * length));
  for (int64_t done = 0; done < chunk.count; done += step) {
    const int64_t count = std::min(step, chunk.count - done);
    at::Tensor tokens = token_scores(query.narrow(0, done, count), weight.narrow(0, done, count), key);
    const at::Tensor position =
        at::arange(chunk.start + done, chunk.start + done + count, positions.options());
    tokens.masked_fill_(at::arange(length, positions.options()).unsqueeze(0) > position.unsqueeze(1),
                        kMinusInfinity);
    scores.narrow(0, done, count).copy_(block_max(tokens).transpose(0, 1));
  }
  return scores;
}

bool SpotPolicy::score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const {
  const int64_t dim = inputs.query.size(2);
  const auto dtype = inputs.query.scalar_type();
  if (!inputs.query.is_cuda() || (dtype != at::kBFloat16 && dtype != at::kHalf) ||
      (dim != 64 && dim != 128 && dim != 256))
    return false;
  prefill.selector_query = selector_.project_query(inputs.layer, inputs.hidden, inputs.batch.positions);
  prefill.selector_weight = selector_.project_weight(inputs.layer, inputs.hidden);
  prefill.selector_pool = keys_.pool(inputs.layer);
  prefill.format = keys_.format();
  prefill.global_scale = keys_.global_scale();
  prefill.rule = rule(inputs.layer);
  return true;
}

at::Tensor SpotPolicy::score_decode(const AttentionInputs& inputs) {
  const bool prepared = inputs.selector_query.defined();
  // The kernel before has written nothing but the step's query, weight and newest key.
  const ops::SettledHistory settled(prepared);
  return ops::score_blocks(
      {prepared ? inputs.selector_query
                : selector_.project_query(inputs.layer, inputs.hidden, inputs.batch.positions),
       prepared ? inputs.selector_weight.view({-1, groups(), inputs.selector_query.size(1)})
                : selector_.project_weight(inputs.layer, inputs.hidden),
       keys_.pool(inputs.layer), inputs.batch.page_table, inputs.batch.lengths, keys_.format(),
       keys_.global_scale()});
}

namespace {

SelectionRule window_rule(int64_t budget, int64_t sinks) {
  if (sinks < 0 || budget <= sinks)
    fail("a streaming window of {} tokens cannot hold {} sink tokens and a recent one; raise the budget",
         budget, sinks);
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = 0;  // the reserved blocks and no other
  rule.sinks = sinks;
  rule.recency = budget - sinks;
  rule.floor = budget;
  return rule;
}

}  // namespace

StreamingPolicy::StreamingPolicy(int64_t budget, int64_t sinks)
    : SelectionPolicy(window_rule(budget, sinks)) {}

at::Tensor StreamingPolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const int64_t blocks = (chunk.start + chunk.count + kBlockSize - 1) / kBlockSize;
  return at::zeros({chunk.count, 1, blocks}, inputs.query.options().dtype(at::kFloat));
}

at::Tensor OraclePolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const at::Tensor key = sequence_tokens(pools_.get("keys", inputs.layer), inputs.batch, chunk.sequence,
                                         chunk.start + chunk.count);
  return attention_mass(rows_of(inputs.query, chunk), key, inputs.scale, chunk.start, groups_, reduction_)
      .to(at::kFloat)
      .log();
}

}  // namespace spot
