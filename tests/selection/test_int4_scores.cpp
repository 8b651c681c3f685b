// Integer dots of packed int4 keys against float64 of what the pages hold.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "ops/cpu/int4_scores.h"

using namespace spot;
using ops::cpu::Int4Query;

namespace {

constexpr kernels::KeyFormat kInt4 = kernels::KeyFormat::int4;
constexpr int kDim = kernels::kKeyDim, kHeads = kernels::kSelectorHeads, kTokens = kernels::kPageTokens;

std::mt19937& generator() {
  static std::mt19937 state(std::random_device{}());
  return state;
}

float normal(float deviation) {
  return deviation * std::normal_distribution<float>()(generator());
}

}  // namespace

TEST(Int4Scores, MatchDoublePrecision) {
  if (!Int4Query::available()) GTEST_SKIP() << "this processor lacks AVX2";
  const int page_bytes = kernels::page_head_bytes(kInt4);
  for (int round = 0; round < 200; ++round) {
    const bool shared = round % 2 == 0;
    const int groups = 1 + round % 9, tokens = 1 + round % kTokens;
    // Magnitudes differ between groups of dims, some are all zero, some codes are the extremes.
    std::vector<float> query(kHeads * kDim), weights(groups * kHeads);
    for (int i = 0; i < kHeads * kDim; ++i)
      query[i] = i / 32 % 5 == round % 5 ? 0.0f : normal(std::exp2(static_cast<float>(i / 32 % 7 - 3)));
    for (float& w : weights) w = normal(1);
    std::vector<uint8_t> pages(kHeads * page_bytes, 0xff);  // what no token wrote must not matter
    for (int h = 0; h < kHeads; ++h)
      for (int j = 0; j < tokens; ++j) {
        float key[kDim];
        for (float& x : key) x = normal(2);
        kernels::encode_key(kInt4, key, j, pages.data() + h * page_bytes);
      }
    const int64_t next = shared ? 0 : page_bytes;
    const uint8_t* const heads[] = {pages.data(), pages.data() + next, pages.data() + 2 * next,
                                    pages.data() + 3 * next};
    const int64_t stride = 3;
    std::vector<float> best(groups * stride, 7.0f);
    const Int4Query integers(query.data());
    ASSERT_TRUE(integers.is_finite());
    integers.block_scores(heads, shared, tokens, weights.data(), groups, best.data(), stride);

    std::vector<double> dots(kHeads * tokens), bounds(kHeads * tokens);
    for (int h = 0; h < kHeads; ++h)
      for (int j = 0; j < tokens; ++j) {
        float key[kDim];
        kernels::decode_key(kInt4, heads[h], j, key);
        for (int first = 0; first < kDim; first += 32) {
          double largest = 0, sum = 0;
          for (int i = first; i < first + 32; ++i) {
            dots[h * tokens + j] += static_cast<double>(query[h * kDim + i]) * key[i];
            largest = std::max(largest, std::fabs(static_cast<double>(query[h * kDim + i])));
            sum += std::fabs(static_cast<double>(key[i]));
          }
          bounds[h * tokens + j] += largest * sum * (std::exp2(-15.0) * 1.02);
        }
      }
    for (int g = 0; g < groups; ++g) {
      double most = -INFINITY, bound = 0;
      for (int j = 0; j < tokens; ++j) {
        double score = 0, slack = 0;
        for (int h = 0; h < kHeads; ++h) {
          const double w = weights[g * kHeads + h];
          score += w * std::max(0.0, dots[h * tokens + j]);
          slack += std::fabs(w) * bounds[h * tokens + j];
        }
        most = std::max(most, score);
        bound = std::max(bound, slack);
      }
      EXPECT_NEAR(best[g * stride], most, bound + 1e-6)
          << "group " << g << " tokens " << tokens << " shared " << shared;
      for (int64_t i = 1; i < stride; ++i) EXPECT_EQ(best[g * stride + i], 7.0f);
    }
  }
}

TEST(Int4Scores, SayWhereTheyCannotServe) {
  std::vector<float> query(kHeads * kDim, 1.0f);
  EXPECT_TRUE(Int4Query(query.data()).is_finite());
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    query[generator()() % query.size()] = bad;
    EXPECT_FALSE(Int4Query(query.data()).is_finite());
  }
  if (!Int4Query::available()) GTEST_SKIP() << "this processor lacks AVX2";
  // A weight that is not a number scores no block.
  std::fill(query.begin(), query.end(), 1.0f);
  std::vector<uint8_t> page(kernels::page_head_bytes(kInt4), 0);
  const uint8_t* const heads[] = {page.data(), page.data(), page.data(), page.data()};
  const float weights[] = {std::numeric_limits<float>::quiet_NaN(), 1, 1, 1};
  float best = 0;
  Int4Query(query.data()).block_scores(heads, true, kTokens, weights, 1, &best, 1);
  EXPECT_EQ(best, -std::numeric_limits<float>::infinity());
}
