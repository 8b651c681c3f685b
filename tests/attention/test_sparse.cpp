#include <gtest/gtest.h>

#include "attention/policies/oracle.h"
#include "attention/policies/spot.h"
#include "attention/sparse.h"
#include "model/backbone.h"
#include "tests/attention/support.h"

using namespace spot;
using namespace spot::test;

namespace {

SelectionRule small_rule() {
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = 96;
  rule.sinks = 16;
  rule.recency = 32;
  rule.floor = 48;
  return rule;
}

// What a selection says each query of an event may see.
std::vector<std::vector<int64_t>> chosen_tokens(const Selection& selection, int64_t row, int64_t visible) {
  std::vector<std::vector<int64_t>> chosen;
  for (int64_t g = 0; g < selection.groups(); ++g)
    chosen.push_back(
        tokens_of_blocks(selection.indices[row][g], selection.counts[row][g].item<int32_t>(), visible));
  return chosen;
}

}  // namespace

class Sparse : public testing::TestWithParam<std::tuple<int64_t, at::ScalarType, SelectorScope>> {};

// Decode and sparse prefill against double precision over exactly the tokens that the observer was shown.
TEST_P(Sparse, AttendsToTheSelectionAndNothingElse) {
  const uint64_t seed = fresh_seed();
  const auto [dim, dtype, scope] = GetParam();
  const double tolerance = dtype == at::kFloat ? 1e-5 : 2e-2;
  const ModelConfig model = small_model(24, 1, 6, 2, dim);
  SelectorConfig config;
  config.scope = scope;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  for (int64_t query_tile : {1, 16, 32})
    for (int64_t budget : {96, 240}) {  // gathered and masked prefill
      LayerHistory history(model, 120, dtype, 3);
      SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::f32);
      SelectionRule rule = small_rule();
      rule.budget = budget;
      SpotPolicy policy(selector, keys, rule);
      SparseOptions options;
      options.prefill = PrefillMode::sparse;
      options.query_tile = query_tile;
      options.prefill_chunk = 64;
      SparseAttention attention(history.cache(), policy, options);
      const std::vector<std::vector<int64_t>> passes = {{random_int(500, 600), random_int(1, 40), 0},
                                                        {random_int(10, 100), 0, random_int(60, 200)},
                                                        {1, 1, 1},
                                                        {1, random_int(20, 60), 1},
                                                        {1, 1, 1}};
      for (const auto& counts : passes) {
        const Pass pass = history.next(counts);
        std::map<int64_t, std::vector<std::vector<int64_t>>> seen;  // by row of the batch
        // The plain oracle is slow: some of a prefill's rows, with its first and last.
        const int64_t tokens = pass.batch.num_tokens();
        at::Tensor sampled = at::rand({tokens}) < (pass.batch.is_decode() ? 1.0 : 0.07);
        sampled[0] = sampled[tokens - 1] = true;
        attention.set_observer([&](const SelectionEvent& event) {
          for (int64_t r = 0; r < event.selection.rows(); ++r) {
            // A prefill's rows count from the batch's first prefill chunk.
            const int64_t row = event.chunk.sequence < 0 ? r : pass.batch.num_decodes + event.chunk.first + r;
            if (!sampled[row].item<bool>()) continue;
            seen[row] = chosen_tokens(event.selection, r, pass.batch.positions[row].item<int64_t>() + 1);
          }
        });
        const at::Tensor got = attention.forward(pass.inputs(0, history.scale()));
        ASSERT_EQ(got.scalar_type(), dtype);
        int64_t row = 0;
        for (size_t i = 0; i < counts.size(); ++i)
          for (int64_t t = 0; t < counts[i]; ++t, ++row) {
            if (!sampled[row].item<bool>()) continue;
            const int64_t position = pass.batch.positions[row].item<int64_t>();
            ASSERT_TRUE(seen.count(row) || (position < rule.floor && row >= pass.batch.num_decodes)) << row;
            const at::Tensor expected = seen.count(row) ? history.attention(pass, row, i, seen[row])
                                                        : history.dense(pass, row, i, position);
            ASSERT_LT(largest_difference(got[row], expected), tolerance)
                << "sequence " << i << " position " << position;
            if (position >= 400 && budget == 96) {
              ASSERT_LE(seen[row][0].size(), 96u + 16) << "the selection is no selection";
            }
          }
      }
    }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Sparse,
                         testing::Values(std::tuple{64, at::kFloat, SelectorScope::layer},
                                         std::tuple{128, at::kFloat, SelectorScope::kv_group},
                                         std::tuple{256, at::kBFloat16, SelectorScope::layer}));

TEST(SparseAttention, FullBudgetAndShortContextsGiveTheDenseBits) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 64);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  for (bool full : {true, false}) {
    SelectionRule rule = small_rule();
    rule.budget = full ? 1 << 20 : 64;
    rule.floor = full ? 0 : 500;
    LayerHistory history(model, 60, at::kFloat, 2);
    SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::int4);
    SpotPolicy policy(selector, keys, rule);
    SparseAttention sparse(history.cache(), policy);
    DenseAttention dense(history.cache());
    for (const auto& counts :
         {std::vector<int64_t>{random_int(200, 480), random_int(1, 20)}, {1, 1}, {1, 1}}) {
      const Pass pass = history.next(counts);
      const at::Tensor got = sparse.forward(pass.inputs(0, history.scale()));
      EXPECT_TRUE(at::equal(got, dense.forward(pass.inputs(0, history.scale()))));
    }
    sparse.set_prefill(PrefillMode::sparse);
    const Pass pass = history.next({random_int(2, 19), random_int(2, 30)});
    EXPECT_LT(largest_difference(sparse.forward(pass.inputs(0, history.scale())),
                                 dense.forward(pass.inputs(0, history.scale()))),
              1e-5);
  }
}

TEST(SparseAttention, DensePrefillFeedsThePolicies) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(24, 1, 4, 2, 32);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  LayerHistory history(model, 40, at::kFloat, 1);
  SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::bf16);
  SpotPolicy policy(selector, keys, small_rule());
  SparseOptions options;
  int64_t events = 0;
  options.observer = [&](const SelectionEvent&) { ++events; };
  SparseAttention attention(history.cache(), policy, options);
  const Pass pass = history.next({300});
  const at::Tensor got = attention.forward(pass.inputs(0, history.scale()));
  EXPECT_EQ(events, 0);
  EXPECT_TRUE(attention.counters().empty());
  EXPECT_LT(largest_difference(got[299], history.dense(pass, 299, 0, 299)), 1e-5);
  const at::Tensor table = at::tensor(history.cache().pages(history.id(0))).to(at::kInt);
  const at::Tensor expected =
      selector.project_key(0, pass.hidden, pass.batch.positions).to(at::kBFloat16).to(at::kFloat);
  // The stored key skips one rounding: at most one unit in the last place of bfloat16 apart.
  const at::Tensor stored = keys.gather(0, table, 300);
  EXPECT_TRUE(at::allclose(stored, expected, 1.0 / 128, 1e-6));
  EXPECT_GT((stored == expected).to(at::kFloat).mean().item<double>(), 0.99);
}

TEST(SparseAttention, CountsTokens) {
  fresh_seed();
  const ModelConfig model = small_model(24, 2, 4, 2, 32);
  LayerHistory history(model, 60, at::kFloat, 2);
  OraclePolicy policy(history.pools(), small_rule(), 2);
  SparseOptions options;
  options.dense_layers = {0};
  SparseAttention attention(history.cache(), policy, options);
  auto run = [&](const Pass& pass) {
    for (int64_t layer : {0, 1}) attention.forward(pass.inputs(layer, history.scale()));
  };
  const int64_t first = random_int(250, 500), second = random_int(1, 30);
  run(history.next({first, second}));
  double attended = 0;
  int64_t visible = 0;
  attention.set_observer([&](const SelectionEvent& event) {
    ASSERT_EQ(event.layer, 1);
    const at::Tensor lengths = event.selection.lengths;
    for (int64_t r = 0; r < 2; ++r) {
      visible += lengths[r].item<int32_t>();
      for (const auto& tokens : chosen_tokens(event.selection, r, lengths[r].item<int32_t>()))
        attended += static_cast<double>(tokens.size()) / 2;
    }
  });
  for (int i = 0; i < 3; ++i) run(history.next({1, 1}));
  const auto counters = attention.counters();
  ASSERT_EQ(counters.size(), 1u);
  EXPECT_EQ(counters.at(1).rows, 6);
  EXPECT_EQ(counters.at(1).tokens_visible, visible);
  EXPECT_EQ(visible, 3 * first + 3 * second + 12);
  EXPECT_NEAR(counters.at(1).tokens_attended, attended, 1e-6);
  EXPECT_LT(attended, 0.9 * static_cast<double>(visible));
  EXPECT_GT(counters.at(1).predicted_mass, 3.0);
  EXPECT_LE(counters.at(1).predicted_mass, 6.0 + 1e-6);
  attention.reset_counters();
  EXPECT_TRUE(attention.counters().empty());
}

TEST(SparseAttention, RefusesOptionsItCannotHonour) {
  const ModelConfig model = small_model(24, 1, 4, 2, 32);
  ModelCache cache(model, 4, at::kFloat, at::kCPU);
  OraclePolicy policy(cache.pools(), small_rule());
  SparseOptions options;
  options.query_tile = 8;
  EXPECT_THROW(SparseAttention(cache, policy, options), Error);
  options.query_tile = 16;
  options.prefill_chunk = 40;
  EXPECT_THROW(SparseAttention(cache, policy, options), Error);
}

// A whole backbone: with every block selected, sparse logits are the dense ones, in prefill and decode.
TEST(SparseAttention, DrivesABackbone) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(48, 3, 6, 2, 32);
  const Backbone backbone = Backbone::random(model, at::kCPU, at::kFloat, seed);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  SelectionRule rule = small_rule();
  rule.budget = 1 << 20;
  std::vector<int32_t> prompt, second;
  for (int i = 0; i < 200; ++i) prompt.push_back(static_cast<int32_t>(random_int(0, 96)));
  for (int i = 0; i < 77; ++i) second.push_back(static_cast<int32_t>(random_int(0, 96)));
  auto run = [&](bool sparse, PrefillMode prefill) {
    ModelCache cache(model, 40, at::kFloat, at::kCPU);
    SelectorCache keys(config, selector.layers(), cache.pools(), KeyFormat::nvfp4);
    SpotPolicy policy(selector, keys, rule);
    SparseOptions options;
    options.prefill = prefill;
    SparseAttention sparse_attention(cache, policy, options);
    DenseAttention dense_attention(cache);
    AttentionBackend& attention = sparse ? static_cast<AttentionBackend&>(sparse_attention) : dense_attention;
    const std::vector<int64_t> ids = {cache.open_sequence(), cache.open_sequence()};
    std::vector<at::Tensor> logits = {backbone.logits(
        backbone.forward(make_batch(cache, ids, {prompt, second}), attention, cache.states()))};
    for (int32_t token = 3; token < 6; ++token)
      logits.push_back(backbone.logits(
          backbone.forward(make_batch(cache, ids, {{token}, {token}}), attention, cache.states())));
    return at::cat(logits);
  };
  const at::Tensor dense = run(false, PrefillMode::dense);
  EXPECT_TRUE(at::equal(run(true, PrefillMode::dense), dense));
  EXPECT_LT(largest_difference(run(true, PrefillMode::sparse), dense), 1e-3);
  rule.budget = 48;
  EXPECT_GT(largest_difference(run(true, PrefillMode::dense).slice(0, 277), dense.slice(0, 277)), 1e-6);
}
