#include "attention/sparse.h"

#include <algorithm>

#include "attention/prefill.h"
#include "core/error.h"
#include "ops/attention/attention.h"
#include "ops/settled_history.h"

namespace spot {

SparseAttention::SparseAttention(const PagedCache& cache, SelectionPolicy& policy, SparseOptions options)
    : pools_(cache.pools()), policy_(policy), options_(std::move(options)) {
  if (options_.query_tile != 1 && options_.query_tile != 16 && options_.query_tile != 32 &&
      options_.query_tile != 64)
    fail("sparse attention: query_tile is {}; it must be 1, 16, 32 or 64", options_.query_tile);
  const int64_t step = std::max<int64_t>(options_.query_tile, kBlockSize);
  if (options_.prefill_chunk < step || options_.prefill_chunk % step != 0)
    fail("sparse attention: prefill_chunk is {}; it must be a multiple of {}", options_.prefill_chunk, step);
}

bool SparseAttention::selects(int64_t layer) const {
  return policy_.covers(layer) && !options_.dense_layers.count(layer);
}

AttentionPreparation SparseAttention::prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) {
  AttentionPreparation wanted;
  // With prefill chunks in the batch the selector's queries would be made for all of their rows too.
  if (selects(layer) && batch.is_decode()) wanted = policy_.prepare(layer, hidden, batch.positions);
  wanted.pools = kv_pools(pools_, layer);
  wanted.slots = batch.slots;
  return wanted;
}

at::Tensor SparseAttention::forward(const AttentionInputs& inputs) {
  if (!inputs.stored)
    write_tokens(kv_pools(pools_, inputs.layer), inputs.batch.slots, inputs.key, inputs.value);
  if (policy_.covers(inputs.layer)) policy_.append(inputs);
  return attend(inputs, options_.prefill, options_.query_tile);
}

at::Tensor SparseAttention::attend(const AttentionInputs& inputs, PrefillMode prefill, int64_t query_tile) {
  const KvPools pools = kv_pools(pools_, inputs.layer);
  const Batch& batch = inputs.batch;
  if (!selects(inputs.layer)) return attend_dense(inputs, pools);
  if (batch.is_decode()) return decode(inputs);
  if (batch.num_decodes == 0 && prefill == PrefillMode::sparse) return sparse_prefill(inputs, query_tile);
  at::Tensor output = at::empty_like(inputs.query);
  if (batch.num_decodes > 0) {
    const Batch decodes = batch.decodes();
    output.narrow(0, 0, batch.num_decodes).copy_(decode(inputs.decode_rows(decodes)));
  }
  if (prefill == PrefillMode::dense) {
    attend_prefill(inputs, pools, output);
  } else {
    const Batch prefills = batch.prefills();
    const AttentionInputs rows = inputs.prefill_rows(prefills);
    output.narrow(0, batch.num_decodes, rows.query.size(0)).copy_(sparse_prefill(rows, query_tile));
  }
  return output;
}

// On a GPU as decode rows, so long as those are few: chunks of single queries would make the selector's keys float32 and
// masks over the whole context.
at::Tensor SparseAttention::attend_queries(const AttentionInputs& inputs) {
  constexpr int64_t kMostRows = 1024;
  const bool rows = inputs.query.is_cuda() && inputs.query.size(0) <= kMostRows && selects(inputs.layer) &&
                    policy_.scores_rows() && ops::attends(inputs.query, pools_.get("keys", inputs.layer));
  if (!rows) return attend(inputs, PrefillMode::sparse, /*query_tile=*/1);
  const Batch batch = inputs.batch.rows();
  return decode(inputs.rows(batch, 0));
}

// Every row is a decode row. Rows up to the floor keep every block in the operator that attend_dense uses
// too: no case apart.
at::Tensor SparseAttention::decode(const AttentionInputs& inputs) {
  const auto [keys, values] = kv_pools(pools_, inputs.layer);
  const Batch& batch = inputs.batch;
  const SelectionRule rule = policy_.rule(inputs.layer);
  const bool observed = options_.count || options_.observer != nullptr;
  auto report = [&](const Selection& selection) {
    if (options_.recorder) options_.recorder(inputs.layer, selection, batch.lengths);
    if (options_.count) count(inputs.layer, selection, batch.lengths);
    if (options_.observer)
      options_.observer(
          {inputs.layer, inputs, keys, {-1, 0, batch.num_sequences(), 0}, policy_, rule, selection});
  };
  if (policy_.prunes_tokens()) {
    const Selection selection = policy_.select_decode(inputs, observed);
    report(selection);
    return ops::token_attention({inputs.query, keys.stored, values.stored, batch.page_table, batch.lengths,
                                 selection.token_positions, selection.token_counts, inputs.scale});
  }
  const at::Tensor scores = policy_.score_decode(inputs);
  // Scoring is a launch of its own in every policy: what this step wrote before it is settled.
  const ops::SettledHistory settled(true);
  const ops::SelectAndAttend::Result attended = ops::select_and_attend({.scores = scores,
                                                                        .query = inputs.query,
                                                                        .key_pool = keys.stored,
                                                                        .value_pool = values.stored,
                                                                        .page_table = batch.page_table,
                                                                        .lengths = batch.lengths,
                                                                        .scale = inputs.scale,
                                                                        .rule = rule,
                                                                        .with_mass = observed,
                                                                        .key_scale = keys.scale,
                                                                        .value_scale = values.scale});
  report({attended.indices, attended.counts, attended.predicted_mass, batch.lengths});
  return attended.output;
}

at::Tensor SparseAttention::sparse_prefill(const AttentionInputs& inputs, int64_t query_tile) {
  if (std::optional<at::Tensor> output = tile_prefill(inputs, query_tile)) return *std::move(output);
  const auto [keys, values] = kv_pools(pools_, inputs.layer);
  at::Tensor output = at::empty_like(inputs.query);
  const SelectionRule rule = policy_.rule(inputs.layer);
  for (const QueryChunk& whole : query_chunks(inputs.batch)) {
    QueryChunk chunk = whole;
    // Queries up to the floor see everything: no selection to make.
    const int64_t dense = std::clamp<int64_t>(rule.floor - whole.start, 0, whole.count);
    if (dense > 0) {
      const int64_t length = whole.start + dense;
      output.narrow(0, whole.first, dense)
          .copy_(causal_attention(inputs.query.narrow(0, whole.first, dense),
                                  sequence_tokens(keys, inputs.batch, whole.sequence, length),
                                  sequence_tokens(values, inputs.batch, whole.sequence, length), whole.start,
                                  inputs.scale));
    }
    for (int64_t done = dense; done < whole.count; done += chunk.count) {
      // Chunks end at multiples of the tile, so that none but the batch's own ends cuts a tile.
      const int64_t step = std::max<int64_t>(query_tile, kBlockSize);
      const int64_t start = whole.start + done, end = start / step * step + options_.prefill_chunk;
      chunk = {whole.sequence, whole.first + done, std::min(whole.count - done, end - start), start};
      const Selection selection = policy_.select_chunk(inputs, chunk, query_tile);
      const at::Tensor lengths =
          at::arange(chunk.start + 1, chunk.start + chunk.count + 1, inputs.batch.lengths.options());
      if (options_.recorder) options_.recorder(inputs.layer, selection, lengths);
      if (options_.count) count(inputs.layer, selection, lengths);
      if (options_.observer) options_.observer({inputs.layer, inputs, keys, chunk, policy_, rule, selection});
      output.narrow(0, chunk.first, chunk.count).copy_(attend_chunk(inputs, chunk, lengths, selection));
    }
  }
  return output;
}

namespace {

// The same through torch's dense attention and a mask: its cost does not fall with the selection, but per
// token it is several times cheaper than gathering.
at::Tensor masked_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const at::Tensor& mask, double scale) {
  const int64_t rows = query.size(0), kv_heads = key.size(0), group = query.size(1) / kv_heads,
                dim = query.size(2);
  const at::Tensor grouped =
      query.view({rows, kv_heads, group, dim}).permute({2, 1, 0, 3});  // [group, Hkv, rows, dim]
  std::vector<at::Tensor> members;
  for (int64_t member = 0; member < group;
       ++member)  // so that K and V are not repeated for their query heads
    members.push_back(at::scaled_dot_product_attention(grouped[member].unsqueeze(0), key.unsqueeze(0),
                                                       value.unsqueeze(0), mask.unsqueeze(0), 0.0, false,
                                                       scale)[0]);
  return at::stack(members).permute({2, 1, 0, 3}).reshape({rows, kv_heads * group, dim});
}

}  // namespace

// Every query of the chunk is a row of the decode operator, all with the sequence's page table and each with
// its own length: what comes after a query is past its length.
at::Tensor SparseAttention::attend_chunk(const AttentionInputs& inputs, const QueryChunk& chunk,
                                         const at::Tensor& lengths, const Selection& selection) {
  const at::Tensor query = inputs.query.narrow(0, chunk.first, chunk.count);
  const auto [keys, values] = kv_pools(pools_, inputs.layer);
  const int64_t length = chunk.start + chunk.count;
  // Measured on two AVX-512 cores: gathering wins while less than a quarter is selected. (A mask needs a
  // token in every row, which a rule without recent tokens may not give.) Single tokens need the mask.
  const bool mostly_selected =
      4 * selection.indices.size(2) * kBlockSize > length && policy_.rule(inputs.layer).recency > 0;
  if (mostly_selected || selection.tokens.defined()) {
    const at::Tensor positions = at::arange(length, lengths.options());
    const at::Tensor mask = token_mask(selection, length).logical_and(positions < lengths.view({-1, 1, 1}));
    return masked_attention(query, sequence_tokens(keys, inputs.batch, chunk.sequence, length),
                            sequence_tokens(values, inputs.batch, chunk.sequence, length),
                            mask.transpose(0, 1), inputs.scale);
  }
  const at::Tensor table = inputs.batch.page_table.narrow(0, chunk.sequence, 1);
  const int64_t step = ops::kMaxAttentionParts / (2 * keys.stored.size(0));  // a group has at most two tiles
  std::vector<at::Tensor> parts;
  for (int64_t done = 0; done < chunk.count; done += step) {
    const int64_t count = std::min(step, chunk.count - done);
    auto part = [&](const at::Tensor& x) { return x.narrow(0, done, count); };
    parts.push_back(ops::sparse_decode_attention(
        {part(query), keys.stored, values.stored, table.expand({count, -1}), part(lengths), inputs.scale,
         part(selection.indices), part(selection.counts), keys.scale, values.scale}));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

std::optional<at::Tensor> SparseAttention::tile_prefill(const AttentionInputs& inputs, int64_t query_tile) {
  TilePrefill prefill;
  if (query_tile == 1 || policy_.prunes_tokens() || !policy_.score_tiles(inputs, prefill))
    return std::nullopt;
  prefill.query = inputs.query;
  const KvPools pools = kv_pools(pools_, inputs.layer);
  prefill.pools = pools;
  prefill.page_table = inputs.batch.page_table;
  prefill.starts = inputs.batch.starts;
  prefill.counts = inputs.batch.query_lengths;
  prefill.scale = inputs.scale;
  prefill.tile_queries = query_tile;
  if (!options_.count && !options_.observer) return prefill_in_tiles(prefill);
  return prefill_in_tiles(prefill, [&](const at::Tensor& tiles, const Selection& selection) {
    if (options_.count) add_counts(inputs.layer, count_tile_tokens(tiles, selection, prefill.rule.floor));
    if (!options_.observer) return;
    const auto tile = tiles.accessor<const int32_t, 2>();
    for (int64_t i = 0; i < tiles.size(0); ++i) {
      if (tile[i][2] == 0) continue;
      const at::TensorOptions options = selection.counts.options();
      const Selection rows = rows_of_tiles(selection, at::full({tile[i][2]}, i, options.dtype(at::kLong)),
                                           at::arange(tile[i][3] + 1, tile[i][3] + tile[i][2] + 1, options));
      options_.observer({inputs.layer,
                         inputs,
                         pools.keys,
                         {tile[i][0], tile[i][1], tile[i][2], tile[i][3]},
                         policy_,
                         prefill.rule,
                         rows});
    }
  });
}

void SparseAttention::count(int64_t layer, const Selection& selection, const at::Tensor& lengths) {
  const auto [kept, visible] = count_tokens(selection, lengths);
  const at::Tensor rows = at::full({}, static_cast<double>(selection.rows()), kept.options());
  const at::Tensor mass = selection.predicted_mass.to(at::kDouble).mean(1).sum();
  add_counts(layer, at::stack({rows, kept, visible.to(at::kDouble), mass}));
}

void SparseAttention::add_counts(int64_t layer, const at::Tensor& addend) {
  at::Tensor& sum = sums_[layer];
  if (sum.defined())
    sum.add_(addend);  // in place, so that a replayed CUDA graph goes on counting
  else
    sum = addend;
}

std::map<int64_t, SparseAttention::Counters> SparseAttention::counters() const {
  std::map<int64_t, Counters> all;
  for (const auto& [layer, sum] : sums_) {
    const at::Tensor host = sum.cpu();
    const double* data = host.const_data_ptr<double>();
    all[layer] = {static_cast<int64_t>(data[0]), data[1], static_cast<int64_t>(data[2]), data[3]};
  }
  return all;
}

}  // namespace spot
