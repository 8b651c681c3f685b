#include <gtest/gtest.h>

#include "attention/methods.h"
#include "attention/policies/oracle.h"
#include "attention/policies/quest.h"
#include "attention/policies/spot.h"
#include "attention/policies/streaming.h"
#include "attention/policies/twilight.h"
#include "tests/attention/support.h"

using namespace spot;
using namespace spot::test;

namespace {

// Feeds a policy the way SparseAttention does.
struct Feeder {
  LayerHistory& history;
  SelectionPolicy& policy;
  void feed(const Pass& pass) {
    const AttentionInputs inputs = pass.inputs(0, history.scale());
    write_tokens(history.pools().get("keys", 0), pass.batch.slots, inputs.key);
    write_tokens(history.pools().get("values", 0), pass.batch.slots, inputs.value);
    policy.append(inputs);
  }
};

SelectionRule small_rule() {
  SelectionRule rule;
  rule.sinks = 16;
  rule.recency = 32;
  rule.floor = 64;
  rule.p = 0.5;
  return rule;
}

}  // namespace

TEST(SpotPolicy, ScoresAreBlockMaximaOfTokenScores) {
  const uint64_t seed = fresh_seed();
  for (int64_t key_heads : {1, 4})
    for (SelectorScope scope : {SelectorScope::layer, SelectorScope::kv_group}) {
      const ModelConfig model = small_model(24, 1, 6, 2, 32);
      SelectorConfig config;
      config.key_heads = key_heads;
      config.scope = scope;
      const Selector selector(config, model, at::kCPU, at::kFloat, seed);
      LayerHistory history(model, 40, at::kFloat, 2);
      SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::f32);
      SpotPolicy policy(selector, keys, small_rule());
      ASSERT_EQ(policy.groups(), scope == SelectorScope::layer ? 1 : 2);
      Feeder feeder{history, policy};
      std::vector<at::Tensor> hidden(2);
      for (const std::vector<int64_t>& counts : {std::vector<int64_t>{random_int(20, 70), random_int(17, 40)},
                                                 {random_int(2, 33), random_int(2, 40)},
                                                 {1, 1}}) {
        const Pass pass = history.next(counts);
        feeder.feed(pass);
        const AttentionInputs inputs = pass.inputs(0, history.scale());
        const at::Tensor decoded = pass.batch.is_decode() ? policy.score_decode(inputs) : at::Tensor();
        for (const QueryChunk& chunk : query_chunks(pass.batch)) {
          at::Tensor& past = hidden[chunk.sequence];
          const at::Tensor own = pass.hidden.slice(0, chunk.first, chunk.first + chunk.count);
          past = past.defined() ? at::cat({past, own}) : own;
          const at::Tensor position = at::arange(past.size(0), at::kLong);
          const SelectorProjection all = selector.project(0, past, position);
          const at::Tensor scores = policy.score_chunk(inputs, chunk);
          const int64_t blocks = (past.size(0) + 15) / 16;
          ASSERT_EQ(scores.sizes(), (std::vector<int64_t>{chunk.count, policy.groups(), blocks}));
          for (int64_t t = 0; t < chunk.count; ++t)
            for (int64_t g = 0; g < policy.groups(); ++g)
              for (int64_t b = 0; b < blocks; ++b) {
                const int64_t visible = chunk.start + t + 1;
                double best = -INFINITY;
                for (int64_t u = b * 16; u < std::min(b * 16 + 16, visible); ++u) {
                  double score = 0;
                  for (int64_t h = 0; h < 4; ++h)
                    score += all.weight[chunk.start + t][g][h].item<double>() *
                             std::max(0.0, at::dot(all.query[chunk.start + t][h],
                                                   all.key[u][key_heads == 1 ? 0 : h])
                                               .item<double>());
                  best = std::max(best, score);
                }
                const double got = scores[t][g][b].item<double>();
                ASSERT_TRUE(std::isinf(best) ? got == best : std::abs(got - best) < 1e-4)
                    << got << " for " << best;
                if (decoded.defined()) {
                  ASSERT_NEAR(decoded[chunk.sequence][g][b].item<double>(), best, 1e-4);
                }
              }
        }
      }
    }
}

TEST(SpotPolicy, TemperatureComesFromTheSelector) {
  const ModelConfig model = small_model(16, 2, 4, 2, 16);
  SelectorConfig config;
  config.selection.temperature = {0.5, 3.0};
  const Selector selector(config, model, at::kCPU);
  PagePools pools(4, 16, at::kCPU);
  SelectorCache keys(config, selector.layers(), pools, KeyFormat::bf16);
  SelectionRule rule = small_rule();
  rule.temperature = 2;
  SpotPolicy policy(selector, keys, rule);
  EXPECT_EQ(policy.rule(0).temperature, 1.0);
  EXPECT_EQ(policy.rule(1).temperature, 6.0);
  EXPECT_TRUE(policy.covers(1));
  EXPECT_FALSE(policy.covers(2));
  SelectorConfig other;
  other.key_heads = 4;
  SelectorCache wrong(other, {0, 1}, pools, KeyFormat::bf16);
  EXPECT_THROW(SpotPolicy(selector, wrong, rule), Error);
  SelectorCache lacking(config, {0}, pools, KeyFormat::bf16);
  EXPECT_THROW(SpotPolicy(selector, lacking, rule), Error);
}

TEST(Policies, SelectionsOfChunksAndDecodeAgree) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  SelectionRule rule = small_rule();
  rule.mode = SelectionMode::top_k;
  rule.budget = 96;
  for (int kind = 0; kind < 7; ++kind) {
    LayerHistory history(model, 60, at::kFloat, 3);
    SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::f32);
    const std::unique_ptr<SelectionPolicy> policy = [&]() -> std::unique_ptr<SelectionPolicy> {
      switch (kind) {
        case 0:
          return std::make_unique<SpotPolicy>(selector, keys, rule);
        case 1:
          return std::make_unique<OraclePolicy>(history.pools(), rule, 2);
        case 2:
          return std::make_unique<OraclePolicy>(history.pools(), rule, 1, BlockReduction::max);
        case 3:
          return std::make_unique<QuestPolicy>(model, history.pools(), rule, SelectorScope::layer);
        case 4:
          return std::make_unique<QuestPolicy>(model, history.pools(), rule);
        case 5:
          return std::make_unique<StreamingPolicy>(96, 16);
        default:
          return std::make_unique<TwilightPolicy>(model, history.pools(), rule, 0.8);
      }
    }();
    SCOPED_TRACE(policy->name());
    Feeder feeder{history, *policy};
    feeder.feed(history.next({random_int(100, 260), random_int(1, 30), random_int(64, 66)}));
    const Pass step = history.next({1, 1, 1});
    feeder.feed(step);
    const AttentionInputs inputs = step.inputs(0, history.scale());
    const Selection together = policy->select_decode(inputs);
    ASSERT_EQ(together.rows(), 3);
    ASSERT_EQ(together.groups(), policy->groups());
    for (const QueryChunk& chunk : query_chunks(step.batch)) {
      const Selection alone = policy->select_chunk(inputs, chunk);
      EXPECT_TRUE(at::equal(alone.counts[0], together.counts[chunk.sequence]));
      const int64_t width = alone.indices.size(2);
      EXPECT_TRUE(at::equal(alone.indices[0], together.indices[chunk.sequence].slice(1, 0, width)));
      EXPECT_EQ(alone.lengths.item<int32_t>(), chunk.start + 1);
      ASSERT_EQ(alone.tokens.defined(), policy->prunes_tokens());
      if (alone.tokens.defined()) {
        EXPECT_TRUE(at::equal(alone.tokens[0], together.tokens[chunk.sequence].slice(1, 0, width * 16)));
      }
    }
  }
}

TEST(StreamingPolicy, KeepsSinksAndTheWindow) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 4, 2, 16);
  LayerHistory history(model, 80, at::kFloat, 1);
  StreamingPolicy policy(256, 64);
  Feeder feeder{history, policy};
  feeder.feed(history.next({random_int(600, 900)}));
  const Pass step = history.next({1});
  feeder.feed(step);
  const Selection s = policy.select_decode(step.inputs(0, 1));
  const int64_t length = history.cache().length(history.id(0)), first = (length - 192) / 16,
                blocks = (length + 15) / 16;
  std::vector<int32_t> expected = {0, 1, 2, 3};
  for (int64_t b = first; b < blocks; ++b) expected.push_back(static_cast<int32_t>(b));
  ASSERT_EQ(s.counts.item<int32_t>(), static_cast<int32_t>(expected.size()));
  EXPECT_TRUE(at::equal(s.indices[0][0], at::tensor(expected, at::kInt)));
  EXPECT_THROW(StreamingPolicy(128, 128), Error);
}

TEST(OraclePolicy, CapturesTheMostMass) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  SelectionRule rule = small_rule();
  rule.mode = SelectionMode::top_k;
  rule.budget = 128;
  LayerHistory history(model, 40, at::kFloat, 1);
  OraclePolicy oracle(history.pools(), rule);
  QuestPolicy quest(model, history.pools(), rule, SelectorScope::layer);
  Feeder feeder{history, quest};
  const Pass pass = history.next({500});
  feeder.feed(pass);
  const AttentionInputs inputs = pass.inputs(0, history.scale());
  const QueryChunk chunk{0, 300, 200, 300};
  const at::Tensor mass =
      attention_mass(pass.query.slice(0, 300), history.keys(0).transpose(0, 1), history.scale(), 300);
  const at::Tensor best = captured_mass(mass, oracle.select_chunk(inputs, chunk), rule).total;
  const at::Tensor other = captured_mass(mass, quest.select_chunk(inputs, chunk), rule).total;
  EXPECT_TRUE((best >= other - 1e-5).all().item<bool>());
  EXPECT_GT((best - other).mean().item<double>(), 0.0);
  // A set a KV head, as a method of the grammar, captures no less of that head's mass.
  const MethodSpec spec = parse_method("oracle:k=128,sinks=16,recency=32,floor=0,per=kv_group", {}, nullptr);
  const Policy made = attention_method("oracle").make(spec, model, nullptr, history.pools());
  ASSERT_EQ(made.policy->groups(), 2);
  EXPECT_FALSE(
      spec.reads_as(parse_method("oracle:k=128,sinks=16,recency=32,floor=0,per=layer", {}, nullptr)));
  const at::Tensor grouped = attention_mass(pass.query.slice(0, 300), history.keys(0).transpose(0, 1),
                                            history.scale(), 300, /*groups=*/2);
  made.policy->set_rule(rule), oracle.set_rule(rule);
  const Selection own = made.policy->select_chunk(inputs, chunk);
  EXPECT_GT(captured_mass(grouped, own, rule).total.mean().item<double>(), best.mean().item<double>());
  // p of the oracle is the captured residual mass itself.
  rule.mode = SelectionMode::top_p;
  rule.floor = 0;
  for (double p : {0.3, 0.8}) {
    rule.p = p;
    oracle.set_rule(rule);
    const Selection s = oracle.select_chunk(inputs, chunk);
    const at::Tensor residual = captured_mass(mass, s, rule).residual;
    EXPECT_GE(residual.min().item<double>(), p - 1e-4);
    EXPECT_LT(largest_difference(residual, s.predicted_mass), 1e-3);
  }
}

TEST(QuestPolicy, BoundsEveryKeyAndSurvivesReusedPages) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  LayerHistory history(model, 12, at::kFloat, 3);
  QuestPolicy group(model, history.pools(), small_rule()),
      layer(model, history.pools(), small_rule(), SelectorScope::layer);
  Feeder feeder{history, group};
  auto feed = [&](const std::vector<int64_t>& counts) {
    const Pass pass = history.next(counts);
    feeder.feed(pass);
    layer.append(pass.inputs(0, history.scale()));
    return pass;
  };
  feed({100, 0, 0});
  history.cache().close_sequence(history.id(0));
  feed({0, random_int(3, 40), random_int(50, 70)});  // on pages of the closed sequence
  feed({0, random_int(2, 20), 1});
  const Pass pass = feed({0, 1, 1});
  const AttentionInputs inputs = pass.inputs(0, history.scale());
  for (int64_t row = 0; row < 2; ++row) {
    const at::Tensor key = history.keys(row + 1);
    const int64_t length = key.size(0), blocks = (length + 15) / 16;
    const QueryChunk chunk{row, row, 1, length - 1};
    const at::Tensor grouped = group.score_chunk(inputs, chunk), shared = layer.score_chunk(inputs, chunk);
    for (int64_t b = 0; b < blocks; ++b) {
      double mean = 0;
      std::vector<double> best(2, -INFINITY);
      const at::Tensor block = key.slice(0, b * 16, std::min(b * 16 + 16, length)).to(at::kDouble);
      for (int64_t h = 0; h < 6; ++h) {
        const at::Tensor q = pass.query[row][h].to(at::kDouble) * history.scale(), k = block.select(1, h / 3);
        const double bound = at::maximum(q * k.amin(0), q * k.amax(0)).sum().item<double>();
        ASSERT_GE(bound + 1e-9, at::mv(k, q).max().item<double>());
        mean += bound / 6;
        best[h / 3] = std::max(best[h / 3], bound);
      }
      EXPECT_NEAR(shared[0][0][b].item<double>(), mean, 1e-4);
      for (int64_t g = 0; g < 2; ++g) EXPECT_NEAR(grouped[0][g][b].item<double>(), best[g], 1e-4);
    }
  }
}

TEST(Policies, QueriesOfATileShareOneSet) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  LayerHistory history(model, 40, at::kFloat, 1);
  SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::f32);
  SpotPolicy policy(selector, keys, small_rule());
  Feeder feeder{history, policy};
  feeder.feed(history.next({random_int(200, 240)}));
  const Pass pass = history.next({random_int(50, 90)});
  feeder.feed(pass);
  const AttentionInputs inputs = pass.inputs(0, history.scale());
  const QueryChunk chunk = query_chunks(pass.batch)[0];
  const Selection tiled = policy.select_chunk(inputs, chunk, 16);
  const at::Tensor scores = policy.score_chunk(inputs, chunk);
  ASSERT_EQ(tiled.rows(), chunk.count);
  for (int64_t t = 0; t < chunk.count; ++t) {
    const int64_t tile = (chunk.start + t) / 16;
    const int64_t first = std::max<int64_t>(tile * 16 - chunk.start, 0),
                  last = std::min(tile * 16 + 16 - chunk.start, chunk.count);
    const Selection expected =
        select_blocks(scores.slice(0, first, last).amax(0, true),
                      at::full({1}, static_cast<int32_t>(chunk.start + last), at::kInt), policy.rule(0));
    EXPECT_EQ(tiled.lengths[t].item<int32_t>(), chunk.start + last);
    ASSERT_EQ(tiled.counts[t][0].item<int32_t>(), expected.counts.item<int32_t>());
    ASSERT_TRUE(at::equal(tiled.indices[t].slice(1, 0, expected.indices.size(2)), expected.indices[0]));
  }
}

// A copied page carries what every policy keeps of it.
TEST(Policies, PagesCanBeCopied) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(24, 2, 4, 2, 16);
  const SelectorConfig config;
  const Selector selector(config, model, at::kCPU, at::kFloat, seed);
  LayerHistory history(model, 20, at::kFloat, 2);
  SelectorCache keys(config, selector.layers(), history.pools(), KeyFormat::int4);
  SpotPolicy spot(selector, keys, small_rule());
  QuestPolicy quest(model, history.pools(), small_rule());
  TwilightPolicy twilight(model, history.pools(), small_rule(), 0.8);
  for (SelectionPolicy* policy : {static_cast<SelectionPolicy*>(&spot), static_cast<SelectionPolicy*>(&quest),
                                  static_cast<SelectionPolicy*>(&twilight)}) {
    SCOPED_TRACE(policy->name());
    Feeder feeder{history, *policy};
    const PagedCache::Mark first = history.cache().mark(history.id(0)),
                           second = history.cache().mark(history.id(1));
    feeder.feed(history.next({60, 0}));
    history.next({0, 60});
    std::vector<PageCopy> copies;
    for (size_t page = 0; page < 4; ++page)
      copies.push_back(
          {history.cache().pages(history.id(0))[page], history.cache().pages(history.id(1))[page]});
    history.pools().copy(copies);
    Pass step = history.next({1, 1});
    for (at::Tensor* x : {&step.hidden, &step.query, &step.key, &step.value}) (*x)[1] = (*x)[0];
    feeder.feed(step);
    const Selection selection = policy->select_decode(step.inputs(0, 0.25));
    EXPECT_TRUE(at::equal(selection.indices[0], selection.indices[1]));
    if (policy->prunes_tokens()) {
      EXPECT_TRUE(at::equal(selection.tokens[0], selection.tokens[1]));
    }
    const at::Tensor scores = policy->score_decode(step.inputs(0, 0.25));
    EXPECT_TRUE(at::equal(scores[0], scores[1]));
    history.cache().rollback(history.id(0), first);
    history.cache().rollback(history.id(1), second);
  }
}
