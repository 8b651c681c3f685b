#include <gtest/gtest.h>

#include <ATen/ATen.h>

#include <limits>
#include <cmath>
#include <map>
#include <random>

#include "core/error.h"
#include "engine/attention_choice.h"
#include "engine/generator.h"

namespace spot {
namespace {

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM", config.model_type = "llama";
  config.hidden_size = 48, config.num_layers = 3, config.num_heads = 6, config.num_kv_heads = 2, config.head_dim = 16;
  config.intermediate_size = 64, config.vocab_size = 101, config.max_position_embeddings = 4096;
  config.rope.rotary_dim = 16;
  config.layer_kinds.assign(3, LayerKind::full_attention);
  return config;
}

std::vector<int32_t> random_tokens(int64_t n, int64_t vocab) {
  const at::Tensor ids = at::randint(vocab, {n}, at::kInt);
  return {ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + n};
}

TEST(Sampler, GreedyTakesTheFirstOfEqualMaxima) {
  at::Tensor logits = at::zeros({50});
  logits[7] = 3, logits[31] = 3;
  EXPECT_EQ(Sampler(SamplingOptions{}).sample(logits), 7);
}

TEST(Sampler, FrequenciesFollowTheSoftmaxInsideTheNucleus) {
  const at::Tensor logits = at::log(at::tensor({0.5, 0.3, 0.15, 0.05})).to(at::kFloat);
  Sampler sampler({.temperature = 1.0, .top_p = 0.7, .seed = static_cast<uint64_t>(std::random_device{}())});
  std::map<int32_t, int> seen;
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) seen[sampler.sample(logits)]++;
  // The nucleus of 0.7 is {0.5, 0.3}: shares 5/8 and 3/8, here within five standard deviations.
  EXPECT_EQ(seen.size(), 2u);
  EXPECT_NEAR(static_cast<double>(seen[0]) / kDraws, 0.625, 5 * std::sqrt(0.625 * 0.375 / kDraws));
  Sampler two({.temperature = 0.5, .top_k = 1, .seed = 3});
  for (int i = 0; i < 20; ++i) EXPECT_EQ(two.sample(logits), 0);
}

TEST(Sampler, RefusesNanAndBadOptions) {
  at::Tensor logits = at::zeros({5});
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(Sampler(SamplingOptions{}).sample(logits), Error);
  EXPECT_THROW(Sampler({.temperature = -1}), Error);
  EXPECT_THROW(Sampler({.temperature = 1, .top_p = 0}), Error);
  EXPECT_THROW(Sampler({.top_k = -2}), Error);
}

TEST(Generate, BatchedAndChunkedRunsEqualSingleOnes) {
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 11);
  const std::vector<std::vector<int32_t>> prompts = {random_tokens(37, 101), random_tokens(5, 101), random_tokens(90, 101)};
  GenerateOptions options;
  options.max_new_tokens = 9;
  options.prefill_chunk = 16;
  AttentionRun together(AttentionSpec{}, backbone, nullptr, 600, 3);
  const GenerateResult batched = generate(backbone, together.backend(), together.cache(), prompts, options);
  for (size_t i = 0; i < prompts.size(); ++i) {
    GenerateOptions whole = options;
    whole.prefill_chunk = 1000;
    AttentionRun alone(AttentionSpec{}, backbone, nullptr, 600);
    EXPECT_EQ(generate(backbone, alone.backend(), alone.cache(), {prompts[i]}, whole).sequences[0].tokens,
              batched.sequences[i].tokens);
  }
  EXPECT_EQ(together.cache().num_free_pages(), together.cache().num_pages());
}

TEST(Generate, EverySparseAttentionWithTheWholeContextEqualsDense) {
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 12);
  const SelectorConfig config = SelectorConfig::from_preset("spot");
  const Selector selector(config, backbone.config(), at::kCPU);
  const std::vector<int32_t> prompt = random_tokens(700, 101);
  GenerateOptions options;
  options.max_new_tokens = 6;
  AttentionRun dense(AttentionSpec{}, backbone, nullptr, 800);
  const auto expected = generate(backbone, dense.backend(), dense.cache(), {prompt}, options).sequences[0].tokens;
  for (AttentionKind kind : {AttentionKind::spot, AttentionKind::streaming, AttentionKind::oracle, AttentionKind::quest}) {
    AttentionSpec spec;
    spec.kind = kind;
    spec.rule.mode = SelectionMode::top_k;
    spec.rule.budget = 4096;
    spec.cache_format = CacheFormat::f32;
    AttentionRun run(spec, backbone, &selector, 800);
    EXPECT_EQ(generate(backbone, run.backend(), run.cache(), {prompt}, options).sequences[0].tokens, expected) << to_string(kind);
    const auto counters = run.sparse()->counters();
    ASSERT_EQ(counters.size(), 3u);
    for (const auto& [layer, c] : counters) EXPECT_EQ(c.tokens_attended, static_cast<double>(c.tokens_visible));
  }
}

TEST(Generate, StopsAtAStopIdAndRefusesWhatDoesNotFit) {
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 13);
  const std::vector<int32_t> prompt = random_tokens(20, 101);
  GenerateOptions options;
  options.max_new_tokens = 8;
  AttentionRun run(AttentionSpec{}, backbone, nullptr, 100);
  const auto free_run = generate(backbone, run.backend(), run.cache(), {prompt}, options).sequences[0];
  EXPECT_EQ(free_run.finish, FinishReason::length);
  options.stop_ids = {free_run.tokens[2]};
  const auto stopped = generate(backbone, run.backend(), run.cache(), {prompt}, options).sequences[0];
  EXPECT_EQ(stopped.finish, FinishReason::stop);
  EXPECT_LE(stopped.tokens.size(), 2u);
  options.max_new_tokens = 5000;
  EXPECT_THROW(generate(backbone, run.backend(), run.cache(), {prompt}, options), Error);
  options.max_new_tokens = 4;
  EXPECT_THROW(generate(backbone, run.backend(), run.cache(), {{}}, options), Error);
  EXPECT_THROW(generate(backbone, run.backend(), run.cache(), {random_tokens(300, 101)}, options), Error);
  EXPECT_EQ(run.cache().num_free_pages(), run.cache().num_pages());
}

TEST(AttentionChoice, NamesAreExactAndSpotNeedsASelector) {
  EXPECT_EQ(attention_kind_from_string("oracle"), AttentionKind::oracle);
  EXPECT_THROW(attention_kind_from_string("Dense"), Error);
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 14);
  AttentionSpec spec;
  spec.kind = AttentionKind::spot;
  EXPECT_THROW(AttentionRun(spec, backbone, nullptr, 100), Error);
}

}  // namespace
}  // namespace spot
