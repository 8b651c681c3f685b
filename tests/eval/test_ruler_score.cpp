#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "eval/ruler_random.h"
#include "eval/ruler_score.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;

TEST(RulerScore, MatchesAsRulerDoes) {
  EXPECT_EQ(string_match_all("it is ABC and def", {"abc", "DEF", "ghi", "i"}), 0.75);
  EXPECT_EQ(string_match_all("", {"abc"}), 0);
  EXPECT_EQ(string_match_part("somewhere in VELDRUM, I think", {"Oslin", "Veldrum"}), 1);
  EXPECT_EQ(string_match_part("somewhere", {"Oslin", "Veldrum"}), 0);
  EXPECT_EQ(clean_output(" \n a\tb\x01 c \n"), "a\nb\n c");
  EXPECT_EQ(clean_output("\n \t"), "");
  // All but the questions want every reference; a control character inside one hides it.
  EXPECT_EQ(ruler_score(RulerTask::vt, "AAAAA CCCCC", {"AAAAA", "BBBBB"}), 0.5);
  EXPECT_EQ(ruler_score(RulerTask::qa_2, "AAAAA CCCCC", {"AAAAA", "BBBBB"}), 1);
  EXPECT_EQ(ruler_score(RulerTask::cwe, "wa\x02lnut walnut", {"walnut"}), 1);
  EXPECT_EQ(ruler_score(RulerTask::cwe, "wa\x02lnut", {"walnut"}), 0);
  expect_error([] { string_match_all("text", {}); }, {"reference"});
}

TEST(Bootstrap, IntervalIsThatOfTheMean) {
  RulerRandom random(fmt::format("{}", fresh_seed()));
  std::vector<double> values;
  double sum = 0, square = 0;
  for (int i = 0; i < 400; ++i) {
    values.push_back(random.below(10) < 7 ? 1 : 0);
    sum += values.back(), square += values.back() * values.back();
  }
  const double mean = sum / 400, error = std::sqrt((square / 400 - mean * mean) / 400);
  const Interval i = bootstrap_mean({values}, random.bits());
  EXPECT_NEAR(i.mean, mean, 1e-12);
  // 1000 resamples give the 2.5% points to about 0.15 standard errors; 0.6 is four of those.
  EXPECT_NEAR(i.low, mean - 1.96 * error, 0.6 * error);
  EXPECT_NEAR(i.high, mean + 1.96 * error, 0.6 * error);
  values.clear();
  for (int n = 0; n < 50; ++n)
    values.push_back(static_cast<double>(random.below(1 << 30)));  // so that no two means agree
  const Interval again = bootstrap_mean({values}, 5), same = bootstrap_mean({values}, 5),
                 other = bootstrap_mean({values}, 6);
  EXPECT_EQ(again.low, same.low);
  EXPECT_EQ(again.high, same.high);
  EXPECT_TRUE(again.low != other.low || again.high != other.high);
}

TEST(Bootstrap, StrataCountAlikeAndAreDrawnApart) {
  RulerRandom random(fmt::format("{}", fresh_seed()));
  // Values that differ between the strata only: every resample has the same mean.
  std::vector<std::vector<double>> strata = {
      std::vector<double>(3 + random.below(20), 1.0), std::vector<double>(3 + random.below(20), 0.25), {}};
  const Interval i = bootstrap_mean(strata);
  EXPECT_EQ(i.mean, 0.625);
  EXPECT_EQ(i.low, 0.625);
  EXPECT_EQ(i.high, 0.625);
  EXPECT_TRUE(std::isnan(bootstrap_mean({}).mean));
  EXPECT_TRUE(std::isnan(bootstrap_mean({{}, {}}).low));
  EXPECT_EQ(bootstrap_mean({{0.5}}).high, 0.5);
}

// Values of Newcombe (1998), table I, and the closed forms n / (n + z^2) at the ends.
TEST(Wilson, KnownIntervals) {
  const Interval rare = wilson_interval(15, 148);
  EXPECT_NEAR(rare.mean, 15.0 / 148, 1e-12);
  EXPECT_NEAR(rare.low, 0.0624, 5e-5);
  EXPECT_NEAR(rare.high, 0.1605, 5e-5);
  EXPECT_EQ(wilson_interval(0, 20).low, 0);
  EXPECT_NEAR(wilson_interval(0, 20).high, 0.1611, 5e-5);
  EXPECT_NEAR(wilson_interval(10, 10).low, 10 / (10 + 3.8414588), 1e-6);
  EXPECT_NEAR(wilson_interval(10, 10).high, 1, 1e-12);
}

}  // namespace
}  // namespace spot
