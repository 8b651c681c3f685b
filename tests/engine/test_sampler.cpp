// The batched sampler: against the one-row sampler, against frequencies, and for what it promises about
// batches. tests/engine/test_sampler_oracle.py compares its probabilities with transformers.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <limits>
#include <random>

#include "core/error.h"
#include "engine/sampler.h"
#include "tests/engine/row_sampler.h"

namespace spot {
namespace {

uint64_t fresh_seed() {
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  at::manual_seed(seed);
  return seed;
}

SamplingOptions random_options(std::mt19937_64& random, int64_t vocab) {
  const auto share = [&] { return std::uniform_real_distribution<>(0, 1)(random); };
  SamplingOptions options;
  options.temperature = random() % 4 ? 0.2 + 2 * share() : 0;
  if (random() % 2) options.top_k = 1 + static_cast<int64_t>(random() % static_cast<uint64_t>(2 * vocab));
  if (random() % 2) options.top_p = 0.05 + 0.95 * share();
  if (random() % 2) options.min_p = share() / 4;
  if (random() % 2) options.repetition_penalty = 0.5 + share();
  if (random() % 2) options.presence_penalty = 4 * share() - 2;
  if (random() % 2) options.frequency_penalty = 4 * share() - 2;
  if (random() % 2)
    for (int i = 0; i < 5; ++i)
      options.logit_bias.emplace_back(static_cast<int32_t>(random() % static_cast<uint64_t>(vocab)),
                                      6 * share() - 3);
  options.seed = random();
  options.logprobs = static_cast<int64_t>(random() % 5) - 1;
  return options;
}

// Draws of `options` from one row of logits, by token.
std::vector<int64_t> draws(const at::Tensor& logits, SamplingOptions options, int64_t count) {
  const int64_t vocab = logits.size(0), rows = 500;
  std::vector<int64_t> seen(static_cast<size_t>(vocab), 0);
  Sampler sampler(vocab, at::kCPU);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < rows; ++i, ++options.seed) sampler.add(i, options, {}), ids.push_back(i);
  for (int64_t i = 0; i < count; i += rows)
    for (const SampledToken& s : sampler.sample(logits.expand({rows, vocab}), ids)) ++seen[s.token];
  return seen;
}

// Chi-square of counts against probabilities, and its degrees of freedom: tokens with few expected draws are
// taken together.
std::pair<double, double> chi_square(const std::vector<int64_t>& seen, const at::Tensor& probabilities) {
  const at::Tensor p = probabilities.to(at::kDouble).contiguous();
  double total = 0, sum = 0, cells = 0, rare_expected = 0, rare_seen = 0;
  for (int64_t n : seen) total += static_cast<double>(n);
  const auto add = [&](double expected, double n) {
    sum += (n - expected) * (n - expected) / expected, cells += 1;
  };
  for (size_t i = 0; i < seen.size(); ++i) {
    const double expected = p.const_data_ptr<double>()[i] * total;
    if (expected < 10)
      rare_expected += expected, rare_seen += static_cast<double>(seen[i]);
    else
      add(expected, static_cast<double>(seen[i]));
  }
  if (rare_expected >= 10)
    add(rare_expected, rare_seen);
  else
    EXPECT_LE(rare_seen, 60);
  return {sum, cells - 1};
}

TEST(RowSampler, GreedyTakesTheFirstOfEqualMaxima) {
  at::Tensor logits = at::zeros({50});
  logits[7] = 3, logits[31] = 3;
  EXPECT_EQ(RowSampler(SamplingOptions{}).sample(logits), 7);
}

TEST(RowSampler, RefusesNanAndBadOptions) {
  at::Tensor logits = at::zeros({5});
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(RowSampler(SamplingOptions{}).sample(logits), Error);
  EXPECT_THROW(RowSampler({.temperature = -1}), Error);
}

TEST(Sampler, GreedyEqualsTheRowSamplerAndTiesGoToTheLowerId) {
  fresh_seed();
  for (int64_t vocab : {1, 2, 7, 300, 5000}) {
    // Few values, so that most rows have equal maxima; zeros of both signs are equal.
    const at::Tensor logits = at::randint(-3, 1, {9, vocab}).to(at::kFloat) * at::tensor(-0.0f).sub(1).abs();
    logits[0] = 0.0, logits[0][vocab / 2] = -0.0;
    Sampler sampler(vocab, at::kCPU);
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < 9; ++i)
      sampler.add(i, {.temperature = i % 2 ? 1.0 : 0.0, .top_k = i % 2}, {}),
          ids.push_back(i);  // two ways to be greedy
    const auto sampled = sampler.sample(logits, ids);
    for (int64_t i = 0; i < 9; ++i)
      EXPECT_EQ(sampled[i].token, RowSampler(SamplingOptions{}).sample(logits[i])) << "row " << i;
  }
}

// The fixed seeds make the statistic fixed: it is compared with its mean plus five standard deviations.
TEST(Sampler, DrawsFollowTheRowSamplersDistribution) {
  at::manual_seed(5);
  for (const SamplingOptions& options :
       {SamplingOptions{.temperature = 1}, SamplingOptions{.temperature = 0.6, .top_k = 20, .top_p = 0.95},
        SamplingOptions{.temperature = 1.7, .top_p = 0.6}, SamplingOptions{.temperature = 0.9, .top_k = 3}}) {
    const at::Tensor logits = 2 * at::randn({80});
    RowSampler rows(options);
    constexpr int64_t kDraws = 40000;
    std::vector<int64_t> of_rows(80, 0);
    for (int64_t i = 0; i < kDraws; ++i) ++of_rows[rows.sample(logits)];
    Sampler sampler(80, at::kCPU);
    sampler.add(0, options, {});
    const at::Tensor expected = sampler.probabilities(logits.unsqueeze(0), {0})[0];
    for (const auto& seen : {draws(logits, options, kDraws), of_rows}) {
      const auto [statistic, freedom] = chi_square(seen, expected);
      EXPECT_LT(statistic, freedom + 5 * std::sqrt(2 * freedom));
      for (int64_t i = 0; i < 80; ++i)
        if (expected[i].item<double>() == 0) EXPECT_EQ(seen[i], 0) << "token " << i << " is no candidate";
    }
  }
}

TEST(Sampler, ChiSquareWouldSeeAnotherDistribution) {
  at::manual_seed(6);
  const at::Tensor logits = 2 * at::randn({80});
  const auto [statistic, freedom] =
      chi_square(draws(logits, {.temperature = 1}, 40000), at::softmax(logits / 1.05, 0));
  EXPECT_GT(statistic, freedom + 5 * std::sqrt(2 * freedom));
}

// Bit-equal tokens and log-probabilities whatever shares the batch, in any order, with penalties in progress.
TEST(Sampler, ARowDoesNotDependOnWhatSharesTheBatch) {
  std::mt19937_64 random(fresh_seed());
  for (int round = 0; round < 6; ++round) {
    const int64_t vocab = round % 2 ? 97 : 3001, count = 12;
    std::vector<SamplingOptions> options;
    std::vector<std::vector<int32_t>> prompts;
    Sampler together(vocab, at::kCPU);
    std::vector<Sampler> alone;
    for (int64_t i = 0; i < count; ++i) {
      options.push_back(random_options(random, vocab));
      auto& prompt = prompts.emplace_back();
      for (int j = 0; j < 30; ++j)
        prompt.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(vocab)));
      together.add(i, options.back(), prompt);
      alone.emplace_back(vocab, at::kCPU).add(0, options.back(), prompt);
    }
    for (int step = 0; step < 8; ++step) {
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < count; ++i)
        if (random() % 3) ids.push_back(i);
      std::shuffle(ids.begin(), ids.end(), random);
      const at::Tensor logits = 3 * at::randn({static_cast<int64_t>(ids.size()), vocab});
      const at::Tensor before = logits.clone();
      const auto sampled = together.sample(logits, ids);
      EXPECT_TRUE(at::equal(logits, before));
      for (size_t i = 0; i < ids.size(); ++i) {
        const auto one = alone[ids[i]].sample(logits.narrow(0, static_cast<int64_t>(i), 1), {0})[0];
        EXPECT_EQ(sampled[i].token, one.token);
        EXPECT_EQ(sampled[i].logprob, one.logprob);
        ASSERT_EQ(sampled[i].top.size(), one.top.size());
        EXPECT_EQ(static_cast<int64_t>(one.top.size()), std::max<int64_t>(options[ids[i]].logprobs, 0));
        for (size_t j = 0; j < one.top.size(); ++j) {
          EXPECT_EQ(sampled[i].top[j].token, one.top[j].token);
          EXPECT_EQ(sampled[i].top[j].logprob, one.top[j].logprob);
        }
      }
    }
  }
}

TEST(Sampler, LogprobsAreTheModelsOwn) {
  fresh_seed();
  const at::Tensor logits = at::randn({1, 50});
  Sampler sampler(50, at::kCPU);
  sampler.add(4, {.temperature = 2, .logit_bias = {{3, 50.0}}, .logprobs = 6}, {});
  const SampledToken sampled = sampler.sample(logits, {4})[0];
  EXPECT_EQ(sampled.token, 3);
  const at::Tensor expected = at::log_softmax(logits[0].to(at::kDouble), 0);
  EXPECT_NEAR(sampled.logprob, expected[3].item<double>(), 1e-5);
  const auto [values, tokens] = expected.topk(6);
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_EQ(sampled.top[i].token, tokens[i].item<int64_t>());
    EXPECT_NEAR(sampled.top[i].logprob, values[i].item<double>(), 1e-5);
  }
}

// A masked row draws as one whose forbidden tokens have no probability; other rows and all log-probabilities are as without.
TEST(Sampler, MaskedRowsDrawWhatIsAllowed) {
  std::mt19937_64 random(fresh_seed());
  for (const int64_t vocab : {31, 32, 33, 1000}) {
    const int64_t count = 7, words = (vocab + 31) / 32;
    Sampler masked(vocab, at::kCPU), other(vocab, at::kCPU);
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < count; ++i) {
      SamplingOptions options = random_options(random, vocab);
      options.logprobs = 2;
      masked.add(i, options, {}), other.add(i, options, {});
      ids.push_back(i);
    }
    for (int step = 0; step < 5; ++step) {
      const at::Tensor logits = 3 * at::randn({count, vocab});
      at::Tensor forbidden = logits.clone();
      TokenMask mask{.rows = {1, 4, 5}, .bits = at::zeros({3, words}, at::kInt)};
      for (size_t r = 0; r < mask.rows.size(); ++r) {
        const auto sure = static_cast<int64_t>(random() % static_cast<uint64_t>(vocab));
        for (int64_t token = 0; token < vocab; ++token) {
          if (token == sure || random() % 4 == 0)
            mask.bits[static_cast<int64_t>(r)].data_ptr<int32_t>()[token / 32] |=
                static_cast<int32_t>(uint32_t{1} << (token % 32));
          else
            forbidden[mask.rows[r]][token] = -std::numeric_limits<float>::infinity();
        }
      }
      const auto sampled = masked.sample(logits, ids, mask), expected = other.sample(forbidden, ids);
      for (size_t i = 0; i < ids.size(); ++i) {
        EXPECT_EQ(sampled[i].token, expected[i].token) << "row " << i << " of " << vocab;
        EXPECT_GT(forbidden[static_cast<int64_t>(i)][sampled[i].token].item<float>(), -1e30);
        EXPECT_NEAR(sampled[i].logprob,
                    at::log_softmax(logits[static_cast<int64_t>(i)], 0)[sampled[i].token].item<float>(),
                    1e-5);
      }
    }
  }
}

TEST(Sampler, NanIsTheRowsOwnAndSparesTheOthers) {
  fresh_seed();
  at::Tensor logits = at::randn({4, 30});
  logits[1][29] = std::numeric_limits<float>::quiet_NaN();
  logits[3] = -std::numeric_limits<float>::infinity();
  Sampler sampler(30, at::kCPU), healthy(30, at::kCPU);
  for (int64_t id : {70, 71, 72, 73})
    sampler.add(id, {.temperature = id % 2 ? 1.0 : 0.5, .repetition_penalty = 1.2, .logprobs = 1}, {});
  const auto sampled = sampler.sample(logits, {70, 71, 72, 73});
  EXPECT_NE(sampled[1].error.find("hold NaN"), std::string::npos) << sampled[1].error;
  EXPECT_NE(sampled[3].error.find("no finite maximum"), std::string::npos) << sampled[3].error;
  for (int64_t row : {0, 2}) {
    EXPECT_EQ(sampled[row].error, "");
    healthy.add(row, {.temperature = 0.5, .repetition_penalty = 1.2, .logprobs = 1}, {});
    EXPECT_EQ(sampled[row].token, healthy.sample(logits.narrow(0, row, 1), {row})[0].token);
  }
}

TEST(Sampler, ANewRequestKnowsNothingOfAnOldOnesHistory) {
  at::Tensor logits = at::zeros({1, 20});
  logits[0][5] = 1;
  Sampler sampler(20, at::kCPU);
  const SamplingOptions options{.presence_penalty = 100};
  const std::vector<int32_t> expected = {5, 0, 1, 2};
  for (int64_t id : {1, 2}) {
    sampler.add(id, options, {});
    for (int32_t token : expected) EXPECT_EQ(sampler.sample(logits, {id})[0].token, token);
    sampler.remove(id);
  }
}

TEST(Sampler, RefusesWhatIsOutOfRange) {
  Sampler sampler(10, at::kCPU);
  for (const SamplingOptions& bad :
       {SamplingOptions{.temperature = -1}, SamplingOptions{.temperature = NAN}, SamplingOptions{.top_k = -2},
        SamplingOptions{.top_p = 0}, SamplingOptions{.top_p = 1.01}, SamplingOptions{.min_p = -0.1},
        SamplingOptions{.repetition_penalty = 0}, SamplingOptions{.presence_penalty = INFINITY},
        SamplingOptions{.logit_bias = {{10, 1.0}}}, SamplingOptions{.logit_bias = {{1, NAN}}},
        SamplingOptions{.logprobs = 11}})
    EXPECT_THROW(sampler.add(1, bad, {}), Error);
  EXPECT_THROW(sampler.add(1, {}, std::vector<int32_t>{10}), Error);
  EXPECT_THROW(sampler.sample(at::zeros({1, 10}), {1}), Error);  // none of them was added
  sampler.add(1, {}, {});
  EXPECT_THROW(sampler.add(1, {}, {}), Error);
  EXPECT_THROW(sampler.sample(at::zeros({1, 9}), {1}), Error);
}

TEST(SamplingOptions, StartFromGenerationConfig) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "spot_generation_config";
  std::filesystem::create_directories(folder);
  const auto load = [&](const std::string& text) {
    std::ofstream(folder / "generation_config.json") << text;
    return SamplingOptions::from_generation_config(folder);
  };
  const SamplingOptions qwen = load(
      R"({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05})");
  EXPECT_EQ(qwen.temperature, 0.6);
  EXPECT_EQ(qwen.top_k, 20);
  EXPECT_EQ(qwen.top_p, 0.95);
  EXPECT_EQ(qwen.repetition_penalty, 1.05);
  EXPECT_EQ(load(R"({"do_sample": true})").temperature, 1.0);
  EXPECT_EQ(load(R"({"temperature": 0.6, "top_p": null})").temperature, 0.0);  // greedy unless it samples
  for (const char* bad : {"[]", R"({"do_sample": 1})", R"({"do_sample": true, "temperature": "hot"})",
                          R"({"do_sample": true, "top_p": 0})", R"({"do_sample": true, "top_k": 1.5})"})
    EXPECT_THROW(load(bad), Error) << bad;
  std::filesystem::remove_all(folder);
  EXPECT_EQ(SamplingOptions::from_generation_config(folder).temperature, 0.0);
}

}  // namespace
}  // namespace spot
