#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <random>

#include "core/error.h"
#include "engine/attention_choice.h"
#include "engine/generator.h"
#include "tests/model/configs.h"

namespace spot {
namespace {

ModelConfig small_config() {
  ModelConfig config;
  config.architecture = "LlamaForCausalLM", config.model_type = "llama";
  config.hidden_size = 48, config.num_layers = 3, config.num_heads = 6, config.num_kv_heads = 2,
  config.head_dim = 16;
  config.intermediate_size = 64, config.vocab_size = 101, config.max_position_embeddings = 4096;
  config.rope.rotary_dim = 16;
  config.layer_kinds.assign(3, LayerKind::full_attention);
  return config;
}

std::vector<int32_t> random_tokens(int64_t n, int64_t vocab) {
  const at::Tensor ids = at::randint(vocab, {n}, at::kInt);
  return {ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + n};
}

TEST(Generate, BatchedAndChunkedRunsEqualSingleOnes) {
  const Backbone backbone = Backbone::random(small_config(), at::kCPU, at::kFloat, 11);
  const std::vector<std::vector<int32_t>> prompts = {random_tokens(37, 101), random_tokens(5, 101),
                                                     random_tokens(90, 101)};
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
  const auto expected =
      generate(backbone, dense.backend(), dense.cache(), {prompt}, options).sequences[0].tokens;
  for (AttentionKind kind :
       {AttentionKind::spot, AttentionKind::streaming, AttentionKind::oracle, AttentionKind::quest}) {
    AttentionSpec spec;
    spec.kind = kind;
    spec.rule.mode = SelectionMode::top_k;
    spec.rule.budget = 4096;
    spec.cache_format = KeyFormat::f32;
    AttentionRun run(spec, backbone, &selector, 800);
    EXPECT_EQ(generate(backbone, run.backend(), run.cache(), {prompt}, options).sequences[0].tokens, expected)
        << to_string(kind);
    const auto counters = run.sparse()->counters();
    ASSERT_EQ(counters.size(), 3u);
    for (const auto& [layer, c] : counters)
      EXPECT_EQ(c.tokens_attended, static_cast<double>(c.tokens_visible));
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

// A backend that has nothing prepared: it stores keys and values, and its policy projects, after the fact.
class Unprepared : public AttentionBackend {
 public:
  explicit Unprepared(AttentionBackend& inner) : inner_(inner) {}
  at::Tensor forward(const AttentionInputs& inputs) override { return inner_.forward(inputs); }

 private:
  AttentionBackend& inner_;
};

TEST(Decode, PreparedAndJoinedEqualUnprepared) {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  for (const ModelConfig& config :
       {testing::small_qwen3(), testing::small_qwen3_5(), testing::small_qwen2(), testing::small_smollm3()}) {
    SCOPED_TRACE(config.architecture);
    const Backbone backbone = Backbone::random(config, at::kCPU, at::kFloat, seed);
    Selector selector(SelectorConfig{}, config, at::kCPU, at::kFloat, seed);
    const int64_t layer = config.full_attention_layers().front();
    std::vector<at::Tensor> before;
    for (const at::Tensor& parameter : selector.parameters()) before.push_back(parameter.clone());
    const Backbone::Projection projection = backbone.projection(layer);
    const at::Tensor weight = projection.weight.clone();
    EXPECT_EQ(projection.bias.defined(), config.qkv_bias);
    const at::Tensor bias = config.qkv_bias ? projection.bias.clone() : at::Tensor();
    for (AttentionKind kind : {AttentionKind::dense, AttentionKind::spot}) {
      AttentionSpec spec;
      spec.kind = kind;
      spec.rule.mode = SelectionMode::top_k;
      spec.rule.budget = 64, spec.rule.sinks = 16, spec.rule.recency = 16, spec.rule.floor = 32;
      spec.cache_format = KeyFormat::f32;
      std::vector<at::Tensor> hidden;
      for (int way = 0; way < 3; ++way) {
        if (way == 2) selector.join(backbone);
        AttentionRun run(spec, backbone, &selector, 600, 2);
        Unprepared plain(run.backend());
        AttentionBackend& backend = way == 0 ? static_cast<AttentionBackend&>(plain) : run.backend();
        const std::vector<int64_t> ids = {run.cache().open_sequence(), run.cache().open_sequence()};
        std::vector<std::vector<int32_t>> tokens(2);
        for (int32_t i = 0; i < 200; ++i) tokens[i % 3 == 0].push_back(i * 31 % 97);
        at::Tensor all =
            backbone.forward(make_batch(run.cache(), ids, tokens), backend, run.cache().states());
        for (int32_t step = 0; step < 5; ++step)
          all = at::cat({all, backbone.forward(make_batch(run.cache(), ids, {{step}, {90 - step}}), backend,
                                               run.cache().states())});
        hidden.push_back(all);
      }
      for (int way : {1, 2})
        EXPECT_LT(((hidden[way] - hidden[0]).norm() / hidden[0].norm()).item<double>(), 1e-4)
            << "way " << way;
    }
    // Only the memory has moved.
    const std::vector<at::Tensor> after = selector.parameters();
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(at::equal(after[i], before[i]));
    EXPECT_TRUE(at::equal(backbone.projection(layer).weight, weight));
    EXPECT_TRUE(backbone.projection(layer).weight.is_alias_of(after.front()));
    if (config.qkv_bias) EXPECT_TRUE(at::equal(backbone.projection(layer).bias, bias));
  }
}

}  // namespace
}  // namespace spot
