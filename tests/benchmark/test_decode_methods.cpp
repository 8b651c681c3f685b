#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "benchmark/decode_methods.h"

using namespace spot;

namespace {

const DecodeShape kShape = {"small", 8, 2, 64};

double normal_cdf(double x) {
  return 0.5 * std::erfc(-x / std::sqrt(2.0));
}

}  // namespace

// The share of tokens that hold 90% of the mass, against the lognormal law that the generator states.
TEST(DecodeScene, IsAsConcentratedAsItSays) {
  for (double sigma : {1.0, 2.0, 3.0}) {
    AttentionStatistics statistics;
    statistics.sigma = sigma;
    statistics.local = 0;
    const DecodeScene scene(kShape, 32768, 1, 1, statistics, at::kFloat, at::kCPU, 3);
    const double expected = normal_cdf(1.2815515655 - sigma);
    EXPECT_NEAR(scene.tokens_holding(0.9) / expected, 1, sigma < 3 ? 0.1 : 0.35) << sigma;
    EXPECT_NEAR(scene.covered_mass(at::ones({1, 32768}, at::kBool)), 1, 1e-4);
  }
}

TEST(DecodeMethods, HoldTheMassThatIsAskedFor) {
  const DecodeScene scene(kShape, 4096, 2, 2, {}, at::kFloat, at::kCPU, 4);
  for (double mass : {0.7, 0.9}) {
    std::vector<std::optional<DecodeMethod>> methods = {
        spot_at_mass(scene, 1, mass), spot_at_mass(scene, 4, mass), quest_at_mass(scene, mass),
        twilight_at_mass(scene, mass)};
    for (const auto& method : methods) {
      ASSERT_TRUE(method);
      EXPECT_GE(method->mass, mass) << method->name;
      EXPECT_GT(method->tokens, 0);
      EXPECT_LT(method->tokens, 4096) << method->name;
    }
    // Every head's best tokens, found one by one, are fewer than any method's.
    EXPECT_LT(scene.tokens_holding(mass) * 4096, methods[0]->tokens);
    // Twilight prunes tokens of Quest's blocks, so it holds the mass with fewer.
    EXPECT_LT(methods[3]->tokens, methods[2]->tokens);
  }
  EXPECT_FALSE(twilight_at_mass(scene, 1.0 + 1e-3));
}

TEST(DecodeMethods, StagesRunAndCoverTheStep) {
  const DecodeScene scene(kShape, 1024, 2, 2, {}, at::kFloat, at::kCPU, 5);
  StageTimer timer(at::kCPU, scene.sets(), 3);
  const std::vector<std::pair<DecodeMethod, std::set<std::string>>> all = {
      {dense_torch(scene, "sdpa"), {"step"}},
      {dense_ours(scene), {"step"}},
      {spot_method(scene, 1, top_k_rule(640)), {"append", "score", "select", "attend", "step"}},
      {spot_method(scene, 4, top_p_rule(0.8)), {"append", "score", "select", "attend", "step"}},
      {quest_method(scene, top_k_rule(640)), {"append", "score", "select", "attend", "step"}},
      {twilight_method(scene, top_k_rule(768), 0.9),
       {"append", "score", "select", "estimate", "prune", "attend", "step"}}};
  for (const auto& [method, names] : all) {
    std::set<std::string> seen;
    for (const DecodeStage& stage : method.stages) {
      seen.insert(stage.name);
      EXPECT_GT(stage.bytes, 0);
      timer.add(method.name + "/" + stage.name, stage.work);
    }
    EXPECT_EQ(seen, names) << method.name;
  }
  for (const auto& [name, us] : timer.measure()) EXPECT_GT(us, 0) << name;
  EXPECT_EQ(all[2].first.tokens, 640);
  EXPECT_EQ(all[4].first.tokens, 640);
  EXPECT_EQ(all[1].first.mass, 1);
  EXPECT_GE(all[5].first.mass, 0.5);
}
