#include <ATen/core/grad_mode.h>

#include <cmath>
#include <numbers>

#include "model/rope.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::fresh_seed;

// The frequency of pair i in double precision, straight from the formulas.
double frequency(const RopeConfig& config, int64_t dim, int64_t i) {
  const double plain = std::pow(config.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  const double original = static_cast<double>(config.original_max_position_embeddings);
  if (config.scaling == RopeScaling::yarn) {
    const auto bound = [&](double turns) {
      return static_cast<double>(dim) * std::log(original / (turns * 2 * std::numbers::pi)) /
             (2 * std::log(config.theta));
    };
    const double low = std::max(0.0, std::floor(bound(config.beta_fast)));
    const double high = std::min(static_cast<double>(dim - 1), std::ceil(bound(config.beta_slow)));
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    return plain * (1 - ramp) + plain / config.factor * ramp;
  }
  if (config.scaling == RopeScaling::llama3) {
    const double turns = original * plain / (2 * std::numbers::pi);  // over the original length
    if (turns < config.low_freq_factor) return plain / config.factor;
    if (turns > config.high_freq_factor) return plain;
    const double share =
        (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
    return plain * share + plain / config.factor * (1 - share);
  }
  return plain;
}

void expect_table(const RopeConfig& config, int64_t dim, double attention_factor) {
  const int64_t positions = 3000;
  const RopeTable table = rope_table(config, positions, at::kCPU, dim == config.rotary_dim ? 0 : dim);
  ASSERT_EQ(table.cos.sizes(), (std::vector<int64_t>{positions, dim / 2}));
  std::mt19937_64 random(fresh_seed());
  for (int round = 0; round < 300; ++round) {
    const auto position = static_cast<int64_t>(random() % positions),
               i = static_cast<int64_t>(random() % (dim / 2));
    const double angle = static_cast<double>(position) * frequency(config, dim, i);
    // float32 angles up to 3000 are off by up to 2e-4.
    EXPECT_NEAR(table.cos[position][i].item<double>(), attention_factor * std::cos(angle), 6e-4);
    EXPECT_NEAR(table.sin[position][i].item<double>(), attention_factor * std::sin(angle), 6e-4);
  }
}

TEST(Rope, TableFollowsTheFormulas) {
  RopeConfig config;
  config.theta = 1e6;
  config.rotary_dim = 128;
  expect_table(config, 128, 1.0);
  expect_table(config, 64, 1.0);
  config.scaling = RopeScaling::yarn;
  config.original_max_position_embeddings = 32768;
  // The attention factors that published Qwen3 figures use: 0.1 ln(factor) + 1.
  for (const auto& [factor, attention] : {std::pair{2.0, 1.0693}, {4.0, 1.1386}, {16.0, 1.2773}}) {
    config.factor = factor;
    expect_table(config, 128, attention);
    expect_table(config, 64, attention);
  }
  config.attention_factor = 0.7;
  expect_table(config, 128, 0.7);
  config = RopeConfig{};
  config.theta = 500000;
  config.rotary_dim = 64;
  config.scaling = RopeScaling::llama3;
  config.factor = 32;
  config.original_max_position_embeddings = 8192;
  expect_table(config, 64, 1.0);
}

TEST(Rope, RotatesPairsHalfADimApartAndLeavesTheRest) {
  at::manual_seed(fresh_seed());
  RopeConfig config;
  config.theta = 10000;
  config.rotary_dim = 6;
  const RopeTable table = rope_table(config, 50, at::kCPU);
  const at::Tensor x = at::randn({4, 3, 11}), positions = at::randint(0, 50, {4}, at::kLong);
  const at::Tensor rotated = apply_rope(x, positions, table);
  for (int64_t t = 0; t < 4; ++t) {
    const auto position = positions[t].item<double>();
    for (int64_t head = 0; head < 3; ++head) {
      for (int64_t i = 0; i < 11; ++i) {
        const double value = x[t][head][i].item<double>();
        double expected = value;
        if (i < 6) {
          const int64_t pair = i % 3;
          const double angle = position * std::pow(10000.0, -static_cast<double>(pair) / 3.0);
          const double other = x[t][head][i < 3 ? i + 3 : i - 3].item<double>();
          expected = value * std::cos(angle) + (i < 3 ? -other : other) * std::sin(angle);
        }
        EXPECT_NEAR(rotated[t][head][i].item<double>(), expected, 2e-5) << i;
      }
    }
  }
  {
    const at::NoGradGuard no_grad;
    EXPECT_TRUE(at::equal(apply_rope(x, positions, table), rotated));
    const at::Tensor rounded = apply_rope(x.to(at::kBFloat16), positions, table);
    EXPECT_TRUE(at::equal(
        rounded, apply_rope(x.to(at::kBFloat16).to(at::kFloat), positions, table).to(at::kBFloat16)));
    // Strided heads, as they come out of a fused projection.
    const at::Tensor wider = at::cat({x, x + 1}, 1).narrow(1, 0, 3);
    EXPECT_TRUE(at::equal(apply_rope(wider, positions, table), rotated));
    EXPECT_TRUE(apply_rope(wider, positions, table).is_contiguous());
  }
  const at::Tensor half = apply_rope(x.to(at::kBFloat16), positions, table);
  EXPECT_EQ(half.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(
      at::equal(half, apply_rope(x.to(at::kBFloat16).to(at::kFloat), positions, table).to(at::kBFloat16)));
}

TEST(Rope, DotProductsDependOnDistanceOnly) {
  at::manual_seed(fresh_seed());
  RopeConfig config;
  config.rotary_dim = 32;
  const RopeTable table = rope_table(config, 200, at::kCPU);
  const at::Tensor query = at::randn({1, 1, 32}), key = at::randn({1, 1, 32});
  const auto dot = [&](int64_t q, int64_t k) {
    return (apply_rope(query, at::tensor({q}, at::kLong), table) *
            apply_rope(key, at::tensor({k}, at::kLong), table))
        .sum()
        .item<double>();
  };
  EXPECT_NEAR(dot(10, 3), dot(107, 100), 1e-3);
  EXPECT_GT(std::abs(dot(10, 3) - dot(10, 9)), 1e-4);
}

TEST(Rope, RefusesOddDimsAndNarrowHeads) {
  RopeConfig config;
  config.rotary_dim = 7;
  testing::expect_error([&] { rope_table(config, 4, at::kCPU); }, {"7 dims"});
  config.rotary_dim = 8;
  const RopeTable table = rope_table(config, 4, at::kCPU);
  testing::expect_error([&] { apply_rope(at::zeros({1, 1, 6}), at::zeros({1}, at::kLong), table); },
                        {"8 dims", "6"});
}

}  // namespace
}  // namespace spot
