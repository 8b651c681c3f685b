// Dense and sparse attention on a GPU against the CPU. Needs a CUDA build of torch and a GPU.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <memory>

#include "attention/policies/oracle.h"
#include "attention/policies/quest.h"
#include "attention/policies/spot.h"
#include "attention/policies/twilight.h"
#include "attention/sparse.h"
#include "cache/batch_builder.h"
#include "model/model_cache.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

// The same layer on one device: caches, policy and backend.
struct Side {
  at::Device device;
  ModelCache cache;
  Selector selector;
  SelectorCache keys;
  SpotPolicy policy;
  SparseAttention sparse;
  std::vector<int64_t> ids;

  Side(const ModelConfig& model, const SelectorConfig& config, const SelectionRule& rule,
       const SparseOptions& options, uint64_t seed, at::Device device_)
      : device(device_),
        cache(model, 200, at::kBFloat16, device, 2),
        selector(config, model, device, at::kBFloat16, seed),
        keys(config, selector.layers(), cache.pools(), KeyFormat::int4),
        policy(selector, keys, rule),
        sparse(cache, policy, options),
        ids{cache.open_sequence(), cache.open_sequence()} {}
};

struct Tokens {
  std::vector<int64_t> counts;
  at::Tensor hidden, query, key, value;
};

Tokens random_tokens(const ModelConfig& model, const std::vector<int64_t>& counts) {
  int64_t total = 0;
  for (int64_t n : counts) total += n;
  auto random = [&](at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); };
  return {counts, random({total, model.hidden_size}), random({total, model.num_heads, model.head_dim}),
          random({total, model.num_kv_heads, model.head_dim}),
          random({total, model.num_kv_heads, model.head_dim})};
}

// The next tokens through a backend; or, without `extend`, the last ones of each sequence once more.
at::Tensor forward(Side& side, AttentionBackend& backend, const Tokens& tokens, bool extend) {
  std::vector<BatchEntry> entries;
  for (size_t i = 0; i < tokens.counts.size(); ++i) {
    if (!extend) side.cache.rollback(side.ids[i], {side.cache.length(side.ids[i]) - tokens.counts[i], {}});
    entries.push_back({side.ids[i], std::vector<int32_t>(static_cast<size_t>(tokens.counts[i]), 0)});
  }
  const Batch batch = build_batch(side.cache, entries);
  auto here = [&](const at::Tensor& x) { return x.to(side.device); };
  return backend
      .forward(
          {0, here(tokens.hidden), here(tokens.query), here(tokens.key), here(tokens.value), 0.125, batch})
      .cpu();
}

double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b.to(at::kDouble)).norm() / b.to(at::kDouble).norm()).item<double>();
}

}  // namespace

TEST(GpuAttention, DenseAndSparseMatchTheCpu) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(64, 1, 8, 2, 64);
  const SelectorConfig config;
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.sinks = 16;
  rule.recency = 64;
  rule.floor = 128;
  for (const auto& [budget, query_tile] :
       {std::array<int64_t, 2>{1 << 20, 1}, {256, 1}, {1 << 20, 32}, {256, 32}}) {
    rule.budget = static_cast<int32_t>(budget);
    SparseOptions options;
    options.prefill_chunk = 128;
    options.query_tile = query_tile;
    Side cpu(model, config, rule, options, seed, at::kCPU),
        gpu(model, config, rule, options, seed, at::Device(at::kCUDA, 0));
    DenseAttention cpu_dense(cpu.cache), gpu_dense(gpu.cache);
    for (const std::vector<int64_t>& counts :
         {std::vector<int64_t>{random_int(400, 900), random_int(20, 300)},
          {random_int(2, 200), random_int(2, 60)},
          {1, 1},
          {1, 1}}) {
      const Tokens tokens = random_tokens(model, counts);
      const PrefillMode mode = counts[0] > 300 ? PrefillMode::dense : PrefillMode::sparse;
      cpu.sparse.set_prefill(mode);
      gpu.sparse.set_prefill(mode);
      const at::Tensor expected = forward(cpu, cpu.sparse, tokens, true),
                       got = forward(gpu, gpu.sparse, tokens, true);
      // bfloat16 hidden states round differently on the two devices, so that a few near-equal blocks may swap
      // places.
      EXPECT_LT(relative_difference(got, expected),
                budget > 1000 || mode == PrefillMode::dense ? 0.02 : 0.25);
      const at::Tensor dense = forward(gpu, gpu_dense, tokens, false);
      EXPECT_LT(relative_difference(dense, forward(cpu, cpu_dense, tokens, false)), 0.02);
      if (budget > 1000 && counts[0] == 1) {
        EXPECT_TRUE(at::equal(got, dense));
      }
    }
    const auto on_cpu = cpu.sparse.counters(), on_gpu = gpu.sparse.counters();
    ASSERT_EQ(on_cpu.size(), on_gpu.size());
    EXPECT_EQ(on_gpu.at(0).rows, on_cpu.at(0).rows);
    EXPECT_EQ(on_gpu.at(0).tokens_attended, on_cpu.at(0).tokens_attended);
    EXPECT_EQ(on_gpu.at(0).tokens_visible, on_cpu.at(0).tokens_visible);
  }
}

struct Queries : AttentionBackend {
  explicit Queries(SparseAttention& sparse_) : sparse(sparse_) {}
  at::Tensor forward(const AttentionInputs& inputs) override { return sparse.attend_queries(inputs); }
  SparseAttention& sparse;
};

// As decode rows, what single queries of a chunk choose.
TEST(GpuAttention, QueriesOfAChunkAreRows) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(64, 1, 8, 2, 64);
  const SelectorConfig config;
  SelectionRule rule{.mode = SelectionMode::top_p, .sinks = 16, .recency = 64, .floor = 128, .p = 0.6};
  SparseOptions options;
  options.query_tile = 1;
  options.prefill = PrefillMode::sparse;
  Side gpu(model, config, rule, options, seed, at::Device(at::kCUDA, 0));
  const auto context = random_tokens(model, {random_int(1200, 1500), random_int(20, 900)});
  forward(gpu, gpu.sparse, context, true);
  const Tokens question = random_tokens(model, {random_int(2, 70), random_int(2, 40)});
  const at::Tensor expected = forward(gpu, gpu.sparse, question, true);
  const auto before = gpu.sparse.counters().at(0);
  Queries queries(gpu.sparse);
  const at::Tensor rows = forward(gpu, queries, question, false);
  // Scores of both ways round differently, so that a few near-equal blocks may swap places.
  EXPECT_LT(relative_difference(rows, expected), 0.1);
  const auto after = gpu.sparse.counters().at(0);
  EXPECT_EQ(after.rows - before.rows, question.counts[0] + question.counts[1]);
  int64_t visible = 0;
  for (size_t i = 0; i < 2; ++i)
    for (int64_t n = 1; n <= question.counts[i]; ++n) visible += context.counts[i] + n;
  EXPECT_EQ(after.tokens_visible - before.tokens_visible, visible);
}

// Long enough for cuDNN, whole and as a chunk at any offset; keys past the chunk must not matter.
TEST(GpuAttention, LongChunksMatchDoublePrecision) {
  fresh_seed();
  for (const auto& [heads, kv_heads, dim] : {std::array<int64_t, 3>{8, 2, 128}, {4, 4, 64}, {4, 1, 256}})
    for (const auto& [start, tokens] : {std::array<int64_t, 2>{0, 4096},
                                        {0, random_int(4100, 6000)},
                                        {random_int(8200, 9000), 1100},
                                        {100, 5000}}) {
      const at::TensorOptions options = at::TensorOptions(at::kCUDA).dtype(at::kBFloat16);
      const int64_t length = start + tokens;
      const at::Tensor query = at::randn({tokens, heads, dim}, options);
      at::Tensor key = at::randn({kv_heads, length + 40, dim}, options), value = at::randn_like(key);
      key.slice(1, length).fill_(NAN);
      value.slice(1, length).fill_(NAN);
      const double scale = 1.2 / std::sqrt(static_cast<double>(dim));
      at::Tensor logsumexp;
      const at::Tensor got = causal_attention(query, key, value, start, scale, &logsumexp);
      ASSERT_EQ(got.sizes(), query.sizes());
      ASSERT_EQ(logsumexp.sizes(), (std::vector<int64_t>{heads, tokens}));
      // The first queries, the last ones, and some between.
      for (int64_t first : {int64_t{0}, random_int(1, tokens - 40), tokens - 30}) {
        const at::Tensor q = query.slice(0, first, first + 30).to(at::kDouble);
        const auto doubled = [&](const at::Tensor& x) {
          return x.slice(1, 0, length).to(at::kDouble).repeat_interleave(heads / kv_heads, 0);
        };
        at::Tensor logits = at::einsum("qhd,hkd->hqk", {q, doubled(key)}) * scale;
        const at::Tensor positions = at::arange(length, logits.options().dtype(at::kLong));
        logits.masked_fill_(positions > positions.slice(0, start + first, start + first + 30).unsqueeze(1),
                            -INFINITY);
        const at::Tensor expected = at::einsum("hqk,hkd->qhd", {logits.softmax(-1), doubled(value)});
        EXPECT_LT(relative_difference(got.slice(0, first, first + 30), expected), 5e-3)
            << heads << "/" << kv_heads << " of " << dim << ", " << tokens << " from " << start;
        EXPECT_LT(largest_difference(logsumexp.slice(1, first, first + 30), logits.logsumexp(-1)), 1e-4);
      }
    }
}

TEST(GpuAttention, PoliciesScoreAsOnTheCpu) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(64, 1, 8, 2, 64);
  const SelectorConfig config;
  SelectionRule rule;
  rule.floor = 0;
  Side cpu(model, config, rule, {}, seed, at::kCPU),
      gpu(model, config, rule, {}, seed, at::Device(at::kCUDA, 0));
  QuestPolicy cpu_quest(model, cpu.cache.pools(), rule), gpu_quest(model, gpu.cache.pools(), rule);
  OraclePolicy cpu_oracle(cpu.cache.pools(), rule, 2), gpu_oracle(gpu.cache.pools(), rule, 2);
  SparseAttention cpu_side(cpu.cache, cpu_quest), gpu_side(gpu.cache, gpu_quest);
  const Tokens prompt = random_tokens(model, {500, 90}), step = random_tokens(model, {1, 1});
  for (const Tokens* tokens : {&prompt, &step}) {
    std::vector<at::Tensor> quest_scores, oracle_scores;
    for (auto [side, attention, quest, oracle] : {std::tuple{&cpu, &cpu_side, &cpu_quest, &cpu_oracle},
                                                  std::tuple{&gpu, &gpu_side, &gpu_quest, &gpu_oracle}}) {
      attention->set_prefill(PrefillMode::sparse);
      attention->set_observer([&, quest = quest, oracle = oracle](const SelectionEvent& event) {
        if (event.chunk.sequence >= 0) return;
        quest_scores.push_back(quest->score_decode(event.inputs).cpu());
        oracle_scores.push_back(oracle->score_decode(event.inputs).cpu());
      });
      forward(*side, *attention, *tokens, true);
    }
    if (tokens == &prompt) continue;
    ASSERT_EQ(quest_scores.size(), 2u);
    for (const auto& scores : {quest_scores, oracle_scores}) {
      const at::Tensor seen = at::isfinite(scores[0]);
      EXPECT_TRUE(at::equal(seen, at::isfinite(scores[1])));
      EXPECT_LT(largest_difference(scores[0].masked_select(seen), scores[1].masked_select(seen)), 1e-3);
    }
  }
}

// Both sides keep the same tokens but where rounding decides, and a captured step does what an eager one
// does.
TEST(GpuAttention, QuestAndTwilightMatchTheCpu) {
  const uint64_t seed = fresh_seed();
  const ModelConfig model = small_model(64, 1, 8, 2, 64);
  const SelectorConfig config;
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = 320;
  rule.sinks = 16;
  rule.recency = 64;
  rule.floor = 128;
  Side cpu(model, config, rule, {}, seed, at::kCPU),
      gpu(model, config, rule, {}, seed, at::Device(at::kCUDA, 0));
  for (bool prune : {false, true}) {
    auto policy = [&](Side& side) -> std::unique_ptr<SelectionPolicy> {
      if (prune) return std::make_unique<TwilightPolicy>(model, side.cache.pools(), rule, 0.9);
      return std::make_unique<QuestPolicy>(model, side.cache.pools(), rule);
    };
    const auto on_cpu = policy(cpu), on_gpu = policy(gpu);
    SparseAttention cpu_side(cpu.cache, *on_cpu), gpu_side(gpu.cache, *on_gpu);
    for (const std::vector<int64_t>& counts :
         {std::vector<int64_t>{700, 90}, {1, 1}, {1, 1}, {37, 5}, {1, 1}}) {
      const Tokens tokens = random_tokens(model, counts);
      const PrefillMode mode = counts[0] == 37 ? PrefillMode::sparse : PrefillMode::dense;
      cpu_side.set_prefill(mode);
      gpu_side.set_prefill(mode);
      const at::Tensor expected = forward(cpu, cpu_side, tokens, true);
      EXPECT_LT(relative_difference(forward(gpu, gpu_side, tokens, true), expected), 0.03)
          << prune << " " << counts[0];
    }
    const auto cpu_counts = cpu_side.counters().at(0), gpu_counts = gpu_side.counters().at(0);
    EXPECT_EQ(gpu_counts.rows, cpu_counts.rows);
    EXPECT_NEAR(gpu_counts.tokens_attended / cpu_counts.tokens_attended, 1, 0.01);
    for (Side* side : {&cpu, &gpu}) {
      for (int64_t& id : side->ids) {
        side->cache.close_sequence(id);
        id = side->cache.open_sequence();
      }
    }
  }
}
