#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <optional>

#include "attention/decode_mass.h"
#include "attention/policies/oracle.h"
#include "attention/policies/quest.h"
#include "attention/policies/spot.h"
#include "attention/sparse.h"
#include "benchmark/decode_methods.h"
#include "benchmark/decode_record.h"
#include "cache/batch_builder.h"
#include "core/error.h"
#include "core/files.h"
#include "model/model_cache.h"
#include "ops/baselines/baselines.h"
#include "text/tokenizer.h"

using namespace spot;

namespace {

constexpr int64_t kLength = 1024, kBatch = 2;

struct Recorded {
  Backbone backbone = Backbone::load("models/tiny-qwen3", at::kCPU);
  Selector selector = Selector::load("spot", "models/tiny-qwen3", backbone.config(), at::kCPU);
  std::vector<int32_t> text =
      Tokenizer::load("models/tiny-qwen3")
          .encode(read_file("docs/method.md") + read_file("docs/results/tiny-qwen3.md"));
  DecodeScene scene = record_decode(backbone, selector, text, kLength, kBatch, 300);

  Recorded() {  // read when a rule is fitted
    for (size_t layer = 0; layer < selector.layers().size(); ++layer)
      selector.selection().residual_mass.push_back(0.1 + 0.1 * static_cast<double>(layer));
  }
};

const Recorded& recorded() {
  static const Recorded instance;
  return instance;
}

// The same stretches run through SparseAttention itself, then the last tokens' step again and again.
class OwnRun {
 public:
  // `make` gives the policy, whose stores lie in the cache's pools.
  explicit OwnRun(const std::function<std::unique_ptr<SelectionPolicy>(PagePools&)>& make)
      : cache_(recorded().backbone.config(), kBatch * kLength / 16 + 5, at::kFloat, at::kCPU, kBatch),
        policy_(make(cache_.pools())) {
    SparseAttention prefill(cache_, *policy_);
    for (int64_t i = 0; i < kBatch; ++i) {
      sequences_.push_back(cache_.open_sequence());
      const auto begin = recorded().text.begin() + i * kLength;
      recorded().backbone.forward(make_batch(cache_, {sequences_[i]}, {{begin, begin + kLength - 1}}),
                                  prefill, cache_.states());
      last_.push_back({begin[kLength - 1]});
      marks_.push_back(cache_.mark(sequences_[i]));
    }
  }
  PagedCache& cache() { return cache_; }
  int64_t sequence(int64_t i) const { return sequences_[i]; }

  // Counters and captured mass of the step with this layer alone sparse, which leaves the layers before it as
  // they were recorded.
  std::pair<SparseAttention::Counters, double> step(const SelectionRule& rule, int64_t sparse_layer) {
    policy_->set_rule(rule);
    double captured = 0;
    int64_t rows = 0;
    SparseOptions options;
    for (int64_t layer : recorded().selector.layers())
      if (layer != sparse_layer) options.dense_layers.insert(layer);
    options.observer = [&](const SelectionEvent& event) {
      for (int64_t row = 0; row < event.selection.rows(); ++row, ++rows)
        captured += captured_by_row(event, row);
    };
    SparseAttention attention(cache_, *policy_, options);
    for (int64_t i = 0; i < kBatch; ++i) cache_.rollback(sequences_[i], marks_[i]);
    recorded().backbone.forward(make_batch(cache_, sequences_, last_), attention, cache_.states());
    EXPECT_EQ(rows, kBatch);
    return {attention.counters().at(sparse_layer), captured / static_cast<double>(rows)};
  }

 private:
  ModelCache cache_;
  std::unique_ptr<SelectionPolicy> policy_;
  std::vector<int64_t> sequences_;
  std::vector<std::vector<int32_t>> last_;
  std::vector<PagedCache::Mark> marks_;
};

SelectionRule top_k(int64_t tokens) {
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = tokens;
  return rule;
}

SelectionRule top_p(double p) {
  SelectionRule rule;
  rule.p = p;
  return rule;
}

void expect_same(OwnRun& run, const SelectionRule& rule, const DecodeMethod& method) {
  const auto& layers = recorded().selector.layers();
  ASSERT_EQ(method.set_tokens.size(), layers.size());
  for (const size_t i : {size_t{0}, size_t{3}, layers.size() - 1}) {
    const auto [counters, mass] = run.step(rule, layers[i]);
    EXPECT_EQ(counters.rows, kBatch);
    EXPECT_DOUBLE_EQ(method.set_tokens[i], counters.tokens_attended / kBatch)
        << method.setting << " in layer " << layers[i];
    EXPECT_NEAR(method.set_mass[i], mass, 1e-5) << method.setting << " in layer " << layers[i];
  }
}

}  // namespace

TEST(DecodeRecord, HoldsWhatTheStepReads) {
  const DecodeScene& scene = recorded().scene;
  OwnRun run([](PagePools& pools) { return std::make_unique<OraclePolicy>(pools, top_k(512)); });
  ASSERT_EQ(scene.sets(), static_cast<int64_t>(recorded().selector.layers().size()));
  for (int64_t i = 0; i < scene.sets(); ++i) {
    const int64_t layer = recorded().selector.layers()[i];
    run.step(top_k(512), layer);
    const DecodeSet& set = scene.set(i);
    EXPECT_TRUE(at::equal(set.lengths, at::full({kBatch}, kLength, at::kInt)));
    for (int64_t row = 0; row < kBatch; ++row) {
      const at::Tensor pages = set.page_table[row].to(at::kLong);
      for (const bool values : {false, true}) {
        const at::Tensor own =
            gather_tokens(run.cache().pools().get(values ? "values" : "keys", layer),
                          at::tensor(run.cache().pages(run.sequence(row)), at::kInt), kLength);
        const at::Tensor taken = (values ? set.values : set.keys).index_select(1, pages).flatten(1, 2);
        EXPECT_LT((own - taken).abs().max().item<double>(), 2e-3) << layer;
      }
      EXPECT_EQ(set.slots[row].item<int64_t>(), pages[kLength / 16 - 1].item<int64_t>() * 16 + 15);
    }
    EXPECT_NEAR(scene.covered_mass(at::ones({1, kLength}, at::kBool), i), 1, 1e-5);
    EXPECT_GT(scene.tokens_holding(0.9, i), 0);
    EXPECT_LT(scene.tokens_holding(0.9, i), 0.9);
  }
}

TEST(DecodeRecord, QuestsBoundsBoundEveryTokenOfAPage) {
  const DecodeScene& scene = recorded().scene;
  for (int64_t i = 0; i < scene.sets(); ++i) {
    const DecodeSet& s = scene.set(i);
    const at::Tensor bound = ops::quest_score(
        {s.query, s.bounds, s.page_table, s.lengths, scene.scale(), true});  // [B, Hkv, blocks]
    for (int64_t row = 0; row < kBatch; ++row) {
      const at::Tensor keys =
          s.keys.index_select(1, s.page_table[row].to(at::kLong));  // [Hkv, blocks, 16, d]
      const at::Tensor query =
          s.query[row].view({scene.shape().num_kv_heads, -1, 1, scene.shape().head_dim, 1});
      const at::Tensor best = at::matmul(keys.unsqueeze(1), query).squeeze(-1).amax({1, 3}) * scene.scale();
      EXPECT_GE((bound[row] - best).min().item<double>(), -1e-4);
      EXPECT_GT((bound[row] - best).max().item<double>(), 0);
    }
  }
}

TEST(DecodeRecord, SpotAgreesWithSparseAttentionsOwnCounters) {
  const Recorded& r = recorded();
  std::optional<SelectorCache> keys;
  OwnRun run([&](PagePools& pools) {
    keys.emplace(r.selector.config(), r.selector.layers(), pools, KeyFormat::int4);
    return std::make_unique<SpotPolicy>(r.selector, *keys, top_p(0.9));
  });
  const int64_t key_heads = r.selector.config().key_heads;
  EXPECT_TRUE(r.scene.has_selector(key_heads));
  EXPECT_FALSE(r.scene.has_selector(5 - key_heads));
  for (const double p : {0.7, 0.9})
    expect_same(run, top_p(p), spot_method(r.scene, key_heads, top_p_rule(p, r.scene.tiers())));
  expect_same(run, top_k(640), spot_method(r.scene, key_heads, top_k_rule(640, r.scene.tiers())));
  SelectionRule share = top_p_rule(0.9, r.scene.tiers());
  share.mode = SelectionMode::threshold;
  share.threshold = 1e-3;
  expect_same(run, share, spot_method(r.scene, key_heads, share));
}

TEST(DecodeRecord, QuestAgreesWithSparseAttentionsOwnCounters) {
  const Recorded& r = recorded();
  OwnRun run([&](PagePools& pools) {
    return std::make_unique<QuestPolicy>(r.backbone.config(), pools, top_k(640));
  });
  expect_same(run, top_k(640), quest_method(r.scene, top_k_rule(640, r.scene.tiers())));
}

// Appending the newest keys, as the benchmark does before it scores, changes nothing that a method then
// chooses.
TEST(DecodeRecord, StagesRunAndLeaveTheSceneAsItWas) {
  const Recorded& r = recorded();
  const int64_t key_heads = r.selector.config().key_heads;
  StageTimer timer(at::kCPU, r.scene.sets(), 1);
  const auto make = [&] {
    return std::vector<DecodeMethod>{spot_method(r.scene, key_heads, top_p_rule(0.7, r.scene.tiers())),
                                     quest_method(r.scene, top_k_rule(512)),
                                     twilight_method(r.scene, top_k_rule(768), 0.9), dense_ours(r.scene),
                                     dense_torch(r.scene, "sdpa")};
  };
  const std::vector<DecodeMethod> before = make();
  for (const DecodeMethod& method : before)
    for (const DecodeStage& stage : method.stages) timer.add(method.name + "/" + stage.name, stage.work);
  for (const auto& [name, us] : timer.measure()) EXPECT_GT(us, 0) << name;
  const std::vector<DecodeMethod> after = make();
  for (size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(before[i].set_tokens, after[i].set_tokens) << before[i].name;
    EXPECT_EQ(before[i].set_mass, after[i].set_mass) << before[i].name;
  }
  // The mean over layers is what the method reports.
  const std::vector<double>& tokens = before[0].set_tokens;
  EXPECT_DOUBLE_EQ(before[0].tokens,
                   std::accumulate(tokens.begin(), tokens.end(), 0.0) / static_cast<double>(tokens.size()));
}

// The other kinds of selector: a key a head, a block set a KV head; heads in groups of three; a hybrid's few
// attention layers.
TEST(DecodeRecord, TakesAnySelectorAndHeads) {
  ModelConfig model = ModelConfig::load("models/tiny-qwen3.5");
  model.num_heads = 9;
  model.num_kv_heads = 3;
  const Backbone backbone = Backbone::random(model, at::kCPU, at::kFloat, 5);
  SelectorConfig config = SelectorConfig::from_preset("paper");
  config.scope = SelectorScope::kv_group;
  config.selection.rule.sinks = 64;
  config.selection.rule.floor = 400;
  const Selector selector(config, model, at::kCPU);
  const DecodeScene scene = record_decode(backbone, selector, recorded().text, 768, 1);
  ASSERT_EQ(scene.sets(), static_cast<int64_t>(selector.layers().size()));
  EXPECT_TRUE(scene.has_selector(4));
  EXPECT_FALSE(scene.has_selector(1));
  EXPECT_EQ(scene.tiers().sinks, 64);
  EXPECT_EQ(scene.tiers().floor, 400);
  const DecodeMethod method = spot_method(scene, 4, top_k_rule(512, scene.tiers()));
  for (int64_t i = 0; i < scene.sets(); ++i) {
    const DecodeSet& s = scene.set(i);
    EXPECT_EQ(s.selector_weight.sizes(), (std::vector<int64_t>{1, 3, 4}));
    EXPECT_EQ(method.set_tokens[i], 512);
    // Each KV head's heads are held by its own set.
    const at::Tensor scores = ops::score_blocks(
        {s.selector_query, s.selector_weight, s.selector_keys[1], s.page_table, s.lengths, KeyFormat::int4});
    SelectionRule rule = top_k(512);
    rule.sinks = 64;
    rule.floor = 400;
    const Selection chosen = select_blocks(scores, s.lengths, rule);
    const at::Tensor keys = s.keys.index_select(1, s.page_table[0].to(at::kLong)).flatten(1, 2);
    const at::Tensor mass = attention_mass(s.query, keys, scene.scale(), 767, 3);
    EXPECT_NEAR(captured_mass(mass, chosen, rule).total.mean().item<double>(), method.set_mass[i], 1e-5);
    for (const DecodeStage& stage : method.stages) stage.work(i);
  }
}

TEST(DecodeRecord, RefusesWhatTheTextOrTheModelCannotGive) {
  const Recorded& r = recorded();
  const auto refuses = [&](int64_t length, int64_t batch, const std::string& words) {
    try {
      record_decode(r.backbone, r.selector, r.text, length, batch);
      ADD_FAILURE() << length << " x " << batch;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  };
  refuses(1000, 1, "multiple of 16");
  refuses(1024, 1000, "sequences of 1024 need 1024000");
  refuses(r.backbone.config().max_position_embeddings + 16, 1, "limit of 131072 positions");
}
