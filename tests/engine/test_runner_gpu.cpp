// The runner on a GPU: steps captured in CUDA graphs against eager ones, padded buckets, hybrids, and the engine that
// stands on it. Needs a CUDA build of torch and a GPU.
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "engine/engine.h"
#include "engine/runner.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

namespace spot {
namespace {

const at::Device kGpu(at::kCUDA, 0);

// A backend that asks for nothing beforehand.
class Unprepared : public AttentionBackend {
 public:
  explicit Unprepared(AttentionBackend& inner) : inner_(inner) {}
  at::Tensor forward(const AttentionInputs& inputs) override { return inner_.forward(inputs); }

 private:
  AttentionBackend& inner_;
};

ModelConfig config_of(bool hybrid, int64_t head_dim) {
  ModelConfig config = hybrid ? testing::small_qwen3_5() : testing::small_qwen3();
  config.hidden_size = 256;
  config.intermediate_size = 384;
  config.head_dim = head_dim;
  config.num_heads = 8;
  config.num_kv_heads = 2;
  config.rope.rotary_dim = hybrid ? head_dim / 4 : head_dim;
  config.max_position_embeddings = 4096;
  if (hybrid) config.linear.key_head_dim = config.linear.value_head_dim = 128;
  return config;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = b.cpu().to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

// Everything is chosen: no near-equal blocks that swap places.
MethodSpec everything(const std::string& word) {
  MethodSettings settings;
  settings.budget = 1 << 20;
  return make_spec(word, settings, nullptr);
}

class GpuRunner : public ::testing::TestWithParam<std::tuple<bool, int64_t, std::string>> {};

// Unprepared, prepared, captured, captured with one projection for both; three sequences, so that a row of four is
// padding. The attended tokens of captured and eager steps are equal.
TEST_P(GpuRunner, CapturedEqualsEager) {
  const c10::InferenceMode inference;
  const uint64_t seed = test::fresh_seed();
  const auto& [hybrid, head_dim, named] = GetParam();
  const bool fp8 = named.ends_with(" fp8");
  const std::string word = fp8 ? named.substr(0, named.size() - 4) : named;
  const ModelConfig config = config_of(hybrid, head_dim);
  const Backbone backbone = Backbone::random(config, kGpu, at::kBFloat16, seed);
  const auto scales = kv_scales(fp8 ? KvCacheDtype::fp8 : KvCacheDtype::automatic, backbone);
  Selector selector(SelectorConfig{}, config, kGpu, at::kBFloat16, seed);
  const int64_t room = 1200;
  std::vector<std::vector<at::Tensor>> logits(4);
  std::vector<std::vector<at::Tensor>> attended(4);
  for (size_t way = 0; way < 4; ++way) {
    if (way == 3) selector.join(backbone);
    AttentionStack stack(backbone, &selector, {everything(word)},
                         {.num_pages = 3 * room / 16, .num_sequences = 3, .kv_scales = scales});
    Unprepared plain(stack);
    Runner runner(backbone, stack, {.graphs = way >= 2, .max_sequences = 3, .max_tokens = room});
    EXPECT_EQ(runner.captures(0), way >= 2);
    std::vector<StepEntry> entries(3);
    for (size_t i = 0; i < 3; ++i) {
      entries[i].tokens.sequence = stack.cache().open_sequence();
      entries[i].tokens.tokens.assign(i == 0 ? 700 : 33 * i, static_cast<int32_t>(3 + i));
      entries[i].tokens.decode = false;
    }
    runner.run(entries);
    for (int32_t step = 0; step < 40; ++step) {
      std::vector<BatchEntry> batch_entries;
      for (size_t i = 0; i < 3; ++i) {
        entries[i].tokens.tokens = {static_cast<int32_t>((7 + step * (static_cast<int32_t>(i) + 1)) % 90)};
        entries[i].tokens.decode = true;
        batch_entries.push_back(entries[i].tokens);
      }
      if (way == 0) {
        const Batch batch = build_batch(stack.cache(), batch_entries);
        stack.begin_pass(batch);
        logits[way].push_back(backbone.logits(backbone.forward(batch, plain, stack.cache().states())));
        continue;
      }
      const StepResult result = runner.run(entries);
      logits[way].push_back(result.logits.clone());
      if (!result.attended.empty()) attended[way].push_back(result.attended[0].sums.narrow(1, 0, 3).clone());
    }
  }
  for (size_t i = 0; i < logits[0].size(); ++i) {
    ASSERT_EQ(logits[2][i].sizes(), logits[1][i].sizes());
    EXPECT_LT(difference(logits[1][i], logits[0][i]), 0.03) << "step " << i;
    EXPECT_LT(difference(logits[2][i], logits[1][i]), 0.01) << "captured step " << i;
    EXPECT_LT(difference(logits[3][i], logits[1][i]), 0.03) << "joined step " << i;
    if (word != "dense" && word != "twilight") {
      EXPECT_TRUE(at::equal(attended[2][i], attended[1][i])) << "step " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, GpuRunner,
                         ::testing::Combine(::testing::Bool(), ::testing::Values(64, 128, 256),
                                            ::testing::Values("dense", "spot", "quest", "twilight",
                                                              "dense fp8", "spot fp8")));

// Sequences that come and go change the bucket; each one's text is as alone, with graphs and without, and so it is for two
// methods in one engine. In float32, where nothing is captured, to rounding; in bfloat16 up to the first choice between
// tokens that are likely alike.
class GpuEngine : public ::testing::TestWithParam<at::ScalarType> {};

TEST_P(GpuEngine, BucketsAndMethodsDoNotChangeTheText) {
  const uint64_t seed = test::fresh_seed();
  const bool whole = GetParam() == at::kFloat;
  for (bool hybrid : {false, true}) {
    const ModelConfig config = config_of(hybrid, 64);
    const Backbone backbone = Backbone::random(config, kGpu, GetParam(), seed);
    std::vector<Request> requests;
    for (int i = 0; i < 9; ++i) {
      Request request;
      const at::Tensor prompt = at::randint(config.vocab_size, {20 + 40 * i}, at::kInt);
      request.prompt.assign(prompt.data_ptr<int32_t>(), prompt.data_ptr<int32_t>() + prompt.numel());
      request.max_new_tokens = 3 + 5 * i;
      request.method = i % 2;
      request.sampling.logprobs = 2;
      requests.push_back(request);
    }
    std::vector<std::vector<GeneratedAnswer>> answers[3];
    for (int way = 0; way < 3; ++way) {  // alone and eager; together and eager; together and captured
      const int64_t sequences = way == 0 ? 1 : 6;
      AttentionStack stack(backbone, nullptr, {MethodSpec{}, everything(whole ? "dense" : "quest")},
                           {.num_pages = 200, .num_sequences = sequences, .num_snapshots = 2});
      Engine engine(backbone, stack,
                    {.max_sequences = sequences, .prefix_cache = way > 0, .graphs = way == 2});
      answers[way] = generate(engine, requests);
      EXPECT_EQ(stack.cache().num_free_pages(), 200);
    }
    for (size_t r = 0; r < requests.size(); ++r) {
      const GeneratedAnswer& alone = answers[0][r][0];
      for (int way : {1, 2}) {
        const std::vector<int32_t>& tokens = answers[way][r][0].tokens;
        ASSERT_EQ(tokens.size(), alone.tokens.size());
        for (size_t i = 0; i < tokens.size(); ++i) {
          if (tokens[i] == alone.tokens[i]) continue;
          // From a near tie on, rounding may lead elsewhere.
          EXPECT_LT(alone.sampled[i].top[0].logprob - alone.sampled[i].top[1].logprob, whole ? 1e-3 : 0.05)
              << "way " << way << " request " << r << " token " << i;
          break;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, GpuEngine, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace spot
