// The engine over an FP8 cache: what it writes is what the model writes when each key and value is rounded to E4M3 by a
// few lines here, whatever the method, the cuts of prompts, the company and the state of the cache.
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <random>

#include "core/error.h"
#include "engine/engine.h"
#include "tests/cache/e4m3.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

namespace spot {
namespace {

// Exact attention of one whole sequence in double, over keys and values as an FP8 cache keeps them (null: as they are).
class Reference : public AttentionBackend {
 public:
  explicit Reference(const KvScales* scales) : scales_(scales) {}
  at::Tensor forward(const AttentionInputs& inputs) override {
    const int64_t tokens = inputs.query.size(0), group = inputs.query.size(1) / inputs.key.size(1);
    const auto kept = [&](const at::Tensor& x, const std::map<int64_t, at::Tensor>* scale) {
      const at::Tensor rounded = scale ? test::kept_by_e4m3(x, scale->at(inputs.layer)) : x;
      return rounded.to(at::kDouble).repeat_interleave(group, 1).transpose(0, 1);  // [heads, T, dim]
    };
    const at::Tensor keys = kept(inputs.key, scales_ ? &scales_->keys : nullptr),
                     values = kept(inputs.value, scales_ ? &scales_->values : nullptr);
    at::Tensor scores =
        at::matmul(inputs.query.to(at::kDouble).transpose(0, 1), keys.transpose(1, 2)) * inputs.scale;
    scores.masked_fill_(at::ones({tokens, tokens}, at::kBool).triu(1), -INFINITY);
    return at::matmul(at::softmax(scores, -1), values).transpose(0, 1).to(inputs.query.scalar_type());
  }

 private:
  const KvScales* scales_;
};

// Log-probabilities [tokens, vocabulary] of what follows each token of a text.
at::Tensor log_probabilities(const Backbone& backbone, const std::vector<int32_t>& text,
                             const KvScales* scales) {
  Batch batch = unpaged_batch(text, {0}, at::kCPU);
  StateSlots states(1, 0, at::kCPU);
  declare_states(states, backbone.config());
  if (!states.empty()) batch.state_slots = at::zeros({1}, at::kLong);
  Reference reference(scales);
  return at::log_softmax(backbone.logits(backbone.forward(batch, reference, states)), 1);
}

// Measured scales, and harder ones: heads that saturate and heads that lie among the subnormal numbers.
std::shared_ptr<const KvScales> harder(const KvScales& measured, std::mt19937_64& random) {
  KvScales scales = measured;
  for (auto* side : {&scales.keys, &scales.values})
    for (auto& [layer, scale] : *side) {
      scale = scale.clone();
      for (int64_t head = 0; head < scale.size(0); ++head)
        scale[head] *= std::ldexp(1.0, std::array{-7, 0, 11}[random() % 3]);
    }
  return std::make_shared<const KvScales>(scales);
}

MethodSpec method(const std::string& word, int32_t budget, PrefillMode prefill = PrefillMode::dense) {
  MethodSpec spec{.name = fmt::format("{} {}", word, budget), .word = word};
  spec.rule.mode = SelectionMode::top_k;
  spec.rule.budget = budget, spec.rule.sinks = 16, spec.rule.recency = 16, spec.rule.floor = 32;
  spec.prefill = prefill;
  spec.cache_format = KeyFormat::f32;
  return spec;
}

constexpr int32_t kAll = 4096;

std::vector<Request> random_requests(const Backbone& backbone, std::mt19937_64& random, size_t methods) {
  const auto token = [&] {
    return static_cast<int32_t>(random() % static_cast<uint64_t>(backbone.config().vocab_size));
  };
  std::vector<int32_t> text;
  for (int i = 0; i < 150; ++i) text.push_back(token());
  std::vector<Request> requests;
  for (size_t i = 0; i < 2 * methods; ++i) {
    Request request;
    request.prompt.assign(text.begin(), text.begin() + 1 + static_cast<int64_t>(random() % 150));
    for (uint64_t j = random() % 20; j > 0; --j) request.prompt.push_back(token());
    if (random() % 3 == 0) request.context = static_cast<int64_t>(random() % (request.prompt.size() + 1));
    request.max_new_tokens = 1 + static_cast<int64_t>(random() % 30);
    request.method = static_cast<int64_t>(i % methods);
    request.sampling.logprobs = 2;
    request.sampling.temperature = random() % 3 ? 0 : 1;
    request.sampling.seed = random();
    requests.push_back(std::move(request));
  }
  return requests;
}

bool near_tie(const SampledToken& token) {
  return token.top.size() == 2 && token.top[0].logprob - token.top[1].logprob < 1e-3;
}

class Fp8Cache : public ::testing::TestWithParam<const char*> {
 protected:
  static ModelConfig config() {
    return std::string(GetParam()) == "qwen3_5" ? testing::small_qwen3_5() : testing::small_qwen3();
  }
};

TEST_P(Fp8Cache, AnswersAreThoseOfRoundedKeysAndValues) {
  std::mt19937_64 random(test::fresh_seed());
  at::set_num_threads(1);
  double apart = 0;  // of what numbers would give
  for (int round = 0; round < 3; ++round) {
    const Backbone backbone = Backbone::random(config(), at::kCPU, at::kFloat, random());
    const Selector selector(SelectorConfig{}, backbone.config(), at::kCPU, at::kFloat, random());
    const auto scales =
        round ? harder(measure_kv_scales(backbone), random) : kv_scales(KvCacheDtype::fp8, backbone);
    const std::vector<MethodSpec> methods = {MethodSpec{}, method("spot", kAll), method("oracle", kAll),
                                             method("streaming", kAll),
                                             method("spot", kAll, PrefillMode::sparse)};
    const std::vector<Request> requests = random_requests(backbone, random, methods.size());
    // Few pages in one round, so that sequences give way.
    AttentionStack stack(
        backbone, &selector, methods,
        {.num_pages = round == 2 ? 16 : 100, .num_sequences = 4, .num_snapshots = 3, .kv_scales = scales});
    Engine engine(backbone, stack,
                  {.max_step_tokens = 20 + static_cast<int64_t>(random() % 200), .max_sequences = 4});
    const auto answers = generate(engine, requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      const GeneratedAnswer& answer = answers[i][0];
      std::vector<int32_t> text = requests[i].prompt;
      text.insert(text.end(), answer.tokens.begin(), answer.tokens.end());
      const at::Tensor expected = log_probabilities(backbone, text, scales.get()),
                       unrounded = log_probabilities(backbone, text, nullptr);
      const auto prompt = static_cast<int64_t>(requests[i].prompt.size());
      for (size_t t = 0; t < answer.tokens.size(); ++t) {
        const at::Tensor row = expected[prompt - 1 + static_cast<int64_t>(t)];
        const SampledToken& token = answer.sampled[t];
        // Wider than float32 needs: one in a million numbers lies so near the middle of two codes that the order of a
        // sum decides between them.
        ASSERT_NEAR(token.logprob, row[token.token].item<double>(), 1e-3)
            << methods[static_cast<size_t>(requests[i].method)].name << ", token " << t;
        if (requests[i].sampling.temperature == 0 && !near_tie(token)) {
          ASSERT_EQ(token.token, row.argmax().item<int64_t>());
        }
        apart = std::max(
            apart, std::abs(token.logprob -
                            unrounded[prompt - 1 + static_cast<int64_t>(t)][token.token].item<double>()));
      }
    }
  }
  EXPECT_GT(apart, 1e-2);  // else the tolerance would hide the rounding
}

TEST_P(Fp8Cache, SparseAnswersAreAsAlone) {
  std::mt19937_64 random(test::fresh_seed());
  at::set_num_threads(1);
  for (int round = 0; round < 2; ++round) {
    const Backbone backbone = Backbone::random(config(), at::kCPU, at::kFloat, random());
    const Selector selector(SelectorConfig{}, backbone.config(), at::kCPU, at::kFloat, random());
    const auto scales = harder(measure_kv_scales(backbone), random);
    const std::vector<MethodSpec> methods = {method("spot", 48), method("oracle", 48),
                                             method("streaming", 48),
                                             method("spot", 64, PrefillMode::sparse)};
    const std::vector<Request> requests = random_requests(backbone, random, methods.size());
    const auto stack = [&](int64_t pages, int64_t sequences) {
      return AttentionStack(backbone, &selector, methods,
                            {.num_pages = pages, .num_sequences = sequences, .kv_scales = scales});
    };
    AttentionStack one = stack(40, 1), all = stack(round ? 18 : 60, 4);
    Engine alone(backbone, one, {.max_step_tokens = 400, .max_sequences = 1, .prefix_cache = false});
    Engine together(backbone, all, {.max_step_tokens = 37, .max_sequences = 4});
    const auto answers = generate(together, requests);
    for (size_t i = 0; i < requests.size(); ++i) {
      const GeneratedAnswer expected = generate(alone, {requests[i]})[0][0];
      for (size_t t = 0; t < expected.tokens.size(); ++t) {
        if (answers[i][0].tokens[t] == expected.tokens[t]) continue;
        EXPECT_TRUE(near_tie(expected.sampled[t])) << methods[i % methods.size()].name << ", token " << t;
        break;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Families, Fp8Cache, ::testing::Values("qwen3", "qwen3_5"));

TEST(KvScales, AreTheLeastPowersOfTwoWithHeadRoom) {
  std::mt19937_64 random(test::fresh_seed());
  for (int i = 0; i < 1000; ++i) {
    const double largest = std::ldexp(1 + std::ldexp(static_cast<double>(random() % 4096), -12),
                                      static_cast<int>(random() % 60) - 40),
                 scale = kv_scale(largest, at::kBFloat16);
    EXPECT_EQ(scale, std::exp2(std::round(std::log2(scale)))) << largest;
    EXPECT_GE(448 * scale, 8 * largest);
    EXPECT_LT(448 * scale / 2, 8 * largest);
  }
  EXPECT_EQ(kv_scale(448.0 / 8, at::kFloat), 1);  // just enough
  EXPECT_EQ(kv_scale(0, at::kFloat), 1);
  EXPECT_EQ(kv_scale(60000, at::kHalf), 128);  // 448 times it is a float16
  EXPECT_EQ(kv_scale(1e-9, at::kHalf), std::ldexp(1.0, -14));
  EXPECT_THROW(kv_scale(INFINITY, at::kFloat), Error);
  EXPECT_THROW(kv_scale(NAN, at::kFloat), Error);
}

// Notes the largest share of the representable range that a head's numbers take.
class Occupancy : public AttentionBackend {
 public:
  explicit Occupancy(const KvScales& scales) : scales_(scales) {}
  at::Tensor forward(const AttentionInputs& inputs) override {
    const auto add = [&](const at::Tensor& x, const at::Tensor& scale) {
      shares.push_back(x.abs().amax(at::IntArrayRef({0, 2})) / scale / 448);
    };
    add(inputs.key, scales_.keys.at(inputs.layer));
    add(inputs.value, scales_.values.at(inputs.layer));
    return at::zeros_like(inputs.query);
  }
  std::vector<at::Tensor> shares;

 private:
  const KvScales& scales_;
};

TEST(KvScales, FitOtherTexts) {
  const uint64_t seed = test::fresh_seed();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Backbone backbone = Backbone::random(testing::small_qwen3(), at::kCPU, dtype, seed);
    const KvScales scales = measure_kv_scales(backbone), again = measure_kv_scales(backbone);
    ASSERT_EQ(scales.keys.size(), 2u);
    std::vector<int32_t> text(350);
    for (int32_t& token : text) token = static_cast<int32_t>(test::random_int(0, 100));
    Occupancy occupancy(scales);
    backbone.forward(unpaged_batch(text, {0}, at::kCPU), occupancy, StateSlots());
    const at::Tensor shares = at::stack(occupancy.shares);
    EXPECT_EQ(shares.sizes(), (std::vector<int64_t>{4, 2}));
    // The measured text takes a sixteenth to an eighth; others of the same tokens not much more or less.
    EXPECT_LT(shares.max().item<double>(), 0.5);
    EXPECT_GT(shares.min().item<double>(), 1.0 / 64);
    for (const auto& [layer, scale] : scales.keys) {
      EXPECT_TRUE(at::equal(scale, again.keys.at(layer)));
      EXPECT_TRUE(at::equal(scales.values.at(layer), again.values.at(layer)));
    }
  }
}

TEST(KvScales, ACacheOfCodesIsAQuarterAndSaysWhatItDoesNotServe) {
  const Backbone backbone =
      Backbone::random(testing::small_qwen3(), at::kCPU, at::kFloat, test::fresh_seed());
  const auto scales = kv_scales(KvCacheDtype::fp8, backbone);
  EXPECT_EQ(kv_scales(KvCacheDtype::automatic, backbone), nullptr);
  AttentionStack numbers(backbone, nullptr, {MethodSpec{}}, {.num_pages = 9}),
      codes(backbone, nullptr, {MethodSpec{}}, {.num_pages = 9, .kv_scales = scales});
  EXPECT_EQ(4 * codes.cache().bytes(), numbers.cache().bytes());
  EXPECT_TRUE(codes.decodes_on_device(0));
  for (const char* word : {"quest", "twilight"}) {
    const std::string said = test::error_of(
        [&] { AttentionStack(backbone, nullptr, {make_spec(word, {}, nullptr)}, {.kv_scales = scales}); });
    EXPECT_EQ(said,
              fmt::format("attention '{}' reads keys as numbers, and an FP8 KV cache holds codes; leave out "
                          "--kv-cache-dtype fp8, or choose one of dense, spot, streaming, oracle",
                          word));
    EXPECT_EQ(test::error_of([&] { codes.add_method(make_spec(word, {}, nullptr)); }), said);
  }
}

}  // namespace
}  // namespace spot
