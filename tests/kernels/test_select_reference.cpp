// The host reference of block selection against a brute-force reading of the rules in float64 and big sums.
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <random>
#include <set>

#include "kernels/select_reference.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

uint32_t seed() {
  const uint32_t s = std::random_device{}();
  std::printf("seed %u\n", s);
  return s;
}

std::set<int32_t> reserved_blocks(const SelectionRule& p, int32_t length) {
  std::set<int32_t> reserved;
  const int32_t n = (length + 15) / 16;
  for (int32_t b = 0; b < n; ++b) {
    // A sink block starts before the first `sinks` tokens end; a recent one holds one of the last
    // `recency`.
    if (b * 16 < p.sinks || (b + 1) * 16 > length - p.recency) reserved.insert(b);
  }
  return reserved;
}

TEST(SelectReference, MassIsTheRoundedExponential) {
  std::mt19937 random(seed());
  std::uniform_real_distribution<float> distance(0.0f, 20.0f), temperature(0.3f, 3.0f);
  for (int i = 0; i < 20000; ++i) {
    SelectionRule p;
    p.temperature = temperature(random);
    const float top = distance(random) - 10, score = top - distance(random);
    const double exact = std::exp((static_cast<double>(score) - static_cast<double>(top)) /
                                  static_cast<double>(p.temperature)) *
                         16777216.0;
    EXPECT_NEAR(mass_of(score, top, mass_scale(p)), exact, 0.501 + exact * 6e-6);
  }
  EXPECT_EQ(mass_of(1.5f, 1.5f, 1.0f), 1u << 24);
  EXPECT_EQ(mass_of(-INFINITY, 1.5f, 1.0f), 0u);
  EXPECT_EQ(mass_of(1.0f, INFINITY, 1.0f), 0u);
  EXPECT_EQ(mass_of(INFINITY, INFINITY, 1.0f), 1u << 24);
}

TEST(SelectReference, TopKKeepsTheReservedAndTheBest) {
  std::mt19937 random(seed());
  for (int trial = 0; trial < 200; ++trial) {
    SelectionRule p;
    p.mode = SelectionMode::top_k;
    p.budget = static_cast<int32_t>(random() % 3000);
    const int32_t length = 1 + static_cast<int32_t>(random() % 12000), n = (length + 15) / 16;
    if (trial % 4 == 1) {
      p.budget_fraction = static_cast<double>(1 + random() % 999) / 1000;
      p.budget = 1;
    }
    const int32_t budget =
        trial % 4 == 1 ? static_cast<int32_t>(std::ceil(p.budget_fraction * length)) : p.budget;
    std::vector<float> scores = testing::normal(random, n, 2.0f);
    if (trial % 3 == 0)
      for (float& s : scores) s = std::round(s);  // ties
    if (trial % 5 == 0) scores[random() % n] = NAN;
    const std::vector<int32_t> selected = select_blocks_reference(scores.data(), length, p);
    EXPECT_TRUE(std::is_sorted(selected.begin(), selected.end()));
    if (length <= p.floor) {
      EXPECT_EQ(static_cast<int32_t>(selected.size()), n);
      continue;
    }
    const std::set<int32_t> reserved = reserved_blocks(p, length), chosen(selected.begin(), selected.end());
    const int32_t expected = std::min(n, std::max((budget + 15) / 16, static_cast<int32_t>(reserved.size())));
    EXPECT_EQ(static_cast<int32_t>(selected.size()),
              static_cast<int32_t>(reserved.size()) < n ? expected : n);
    for (int32_t b : reserved) EXPECT_TRUE(chosen.count(b));
    // No block left out precedes a residual block taken, by (score descending, index).
    const auto better = [&](int32_t a, int32_t b) {
      const float x = std::isnan(scores[a]) ? -INFINITY : scores[a],
                  y = std::isnan(scores[b]) ? -INFINITY : scores[b];
      return x != y ? x > y : a < b;
    };
    int32_t worst = -1;
    for (int32_t b : selected)
      if (!reserved.count(b) && (worst < 0 || better(worst, b))) worst = b;
    for (int32_t b = 0; b < n && worst >= 0; ++b) EXPECT_TRUE(chosen.count(b) || better(worst, b));
  }
}

TEST(SelectReference, TopPCoversItsShareWithTheFewestBlocks) {
  std::mt19937 random(seed());
  for (int trial = 0; trial < 300; ++trial) {
    SelectionRule p;
    p.p = 0.05f + 0.949f * static_cast<float>(random() % 1000) / 1000;
    p.temperature = 0.5f + static_cast<float>(random() % 100) / 40;
    p.cap = trial % 4 == 0 ? 600 + static_cast<int32_t>(random() % 3000) : 0;
    const int32_t length = 1 + static_cast<int32_t>(random() % 20000), n = (length + 15) / 16;
    const std::vector<float> scores = testing::normal(random, n, trial % 2 == 0 ? 0.3f : 4.0f);
    float share = -1;
    const std::vector<int32_t> selected = select_blocks_reference(scores.data(), length, p, &share);
    const std::set<int32_t> reserved = reserved_blocks(p, length);
    if (length <= p.floor || static_cast<int32_t>(reserved.size()) == n) {
      EXPECT_EQ(static_cast<int32_t>(selected.size()), n);
      EXPECT_EQ(share, 1.0f);
      continue;
    }
    // Sorted masses in float64; the fewest whose sum reaches p may differ by one block where a sum meets p to
    // 1e-5.
    std::vector<std::pair<float, int32_t>> order;
    for (int32_t b = 0; b < n; ++b)
      if (!reserved.count(b)) order.push_back({-scores[b], b});
    std::sort(order.begin(), order.end());
    double total = 0, covered = 0, sum = 0;
    const auto mass = [&](size_t i) {
      return std::exp(static_cast<double>(order[0].first - order[i].first) /
                      static_cast<double>(p.temperature));
    };
    for (size_t i = 0; i < order.size(); ++i) total += mass(i);
    int32_t nucleus = 0;
    for (; sum < static_cast<double>(p.p) * total * (1 - 1e-12); ++nucleus) sum += mass(nucleus);
    const int32_t fixed = static_cast<int32_t>(reserved.size());
    int32_t expected = std::max(nucleus + fixed, 32);
    if (p.cap > 0) expected = std::min(expected, std::max(p.cap / 16, fixed));
    expected = std::min(expected, n);
    EXPECT_NEAR(static_cast<int32_t>(selected.size()), expected, 1 + expected / 500);
    const int32_t taken = static_cast<int32_t>(selected.size()) - fixed;
    for (int32_t i = 0; i < taken; ++i) {
      EXPECT_TRUE(std::binary_search(selected.begin(), selected.end(), order[i].second));
      covered += mass(i);
    }
    EXPECT_NEAR(share, covered / total, 2e-3);
    for (int32_t b : reserved) EXPECT_TRUE(std::binary_search(selected.begin(), selected.end(), b));
  }
}

TEST(SelectReference, ThresholdTakesEveryBlockThatHoldsItsShare) {
  std::mt19937 random(seed());
  for (int trial = 0; trial < 300; ++trial) {
    SelectionRule p;
    p.mode = SelectionMode::threshold;
    p.threshold = std::pow(10.0, -4.0 * static_cast<double>(random() % 1000) / 1000);
    p.temperature = 0.5 + static_cast<double>(random() % 100) / 40;
    p.floor = trial % 3 == 0 ? 512 : 0;
    p.cap = trial % 4 == 0 ? 600 + static_cast<int32_t>(random() % 3000) : 0;
    const int32_t length = 1 + static_cast<int32_t>(random() % 20000), n = (length + 15) / 16;
    std::vector<float> scores = testing::normal(random, n, trial % 2 == 0 ? 0.3f : 4.0f);
    if (trial % 5 == 0) scores[random() % n] = NAN;
    float share = -1;
    const std::vector<int32_t> selected = select_blocks_reference(scores.data(), length, p, &share);
    const std::set<int32_t> reserved = reserved_blocks(p, length), chosen(selected.begin(), selected.end());
    const int32_t fixed = static_cast<int32_t>(reserved.size());
    if (length <= p.floor || fixed == n) {
      EXPECT_EQ(static_cast<int32_t>(selected.size()), n);
      continue;
    }
    // Shares in float64. A block within the masses' rounding of the threshold may fall on either side.
    double largest = -INFINITY, total = 0, covered = 0;
    for (int32_t b = 0; b < n; ++b)
      if (!reserved.count(b) && !std::isnan(scores[b])) largest = std::max<double>(largest, scores[b]);
    const auto mass = [&](int32_t b) {
      return std::isnan(scores[b]) ? 0.0
                                   : std::exp((static_cast<double>(scores[b]) - largest) / p.temperature);
    };
    for (int32_t b = 0; b < n; ++b) total += reserved.count(b) ? 0 : mass(b);
    int32_t surely = 0, perhaps = 0;
    for (int32_t b = 0; b < n; ++b) {
      if (reserved.count(b)) continue;
      const double distance = mass(b) / total - p.threshold, rounding = 1e-4 * p.threshold + 1e-6;
      surely += distance > rounding ? 1 : 0;
      perhaps += distance > -rounding ? 1 : 0;
    }
    const int32_t least = std::max(0, (p.floor + 15) / 16 - fixed);
    const int32_t most = std::min(n - fixed, p.cap > 0 ? std::max(0, p.cap / 16 - fixed) : n);
    const int32_t taken = static_cast<int32_t>(selected.size()) - fixed;
    EXPECT_GE(taken, std::min(most, std::max(least, surely)));
    EXPECT_LE(taken, std::min(most, std::max(least, perhaps)));
    double lightest = INFINITY, heaviest_left = 0;
    for (int32_t b = 0; b < n; ++b) {
      if (reserved.count(b)) {
        EXPECT_TRUE(chosen.count(b));
      } else if (chosen.count(b)) {
        covered += mass(b);
        lightest = std::min(lightest, mass(b));
      } else {
        heaviest_left = std::max(heaviest_left, mass(b));
      }
    }
    EXPECT_GE(lightest * (1 + 1e-6) + 1e-7, heaviest_left);
    EXPECT_NEAR(share, covered / total, 2e-3);
  }
}

TEST(SelectReference, ThresholdOfRowsWithoutDifferences) {
  SelectionRule p;
  p.mode = SelectionMode::threshold;
  std::vector<float> scores(256, 2.5f);
  p.threshold = 1.0 / 232;  // exactly what each of the 232 residual blocks holds
  EXPECT_EQ(select_blocks_reference(scores.data(), 4096, p).size(), 256u);
  p.threshold = 1.0001 / 232;  // none: the floor fills up by index
  EXPECT_EQ(select_blocks_reference(scores.data(), 4096, p).size(), 32u);
  p.threshold = 1e-9;
  p.cap = 640;
  EXPECT_EQ(select_blocks_reference(scores.data(), 4096, p).size(), 40u);
  std::fill(scores.begin(), scores.end(), -INFINITY);  // no mass at all
  p.cap = p.floor = 0;
  EXPECT_EQ(select_blocks_reference(scores.data(), 4096, p).size(), 24u);
}

TEST(SelectReference, ExtremesAndTies) {
  SelectionRule p;
  const int32_t length = 4096;
  std::vector<float> scores(256, -INFINITY);
  float share;
  // Nothing has mass: the floor fills up by index.
  std::vector<int32_t> selected = select_blocks_reference(scores.data(), length, p, &share);
  EXPECT_EQ(selected.size(), 32u);
  EXPECT_EQ(selected[15], 15);
  EXPECT_EQ(share, 1.0f);
  // Equal scores: ceil(p * 232) residual blocks, the lowest.
  std::fill(scores.begin(), scores.end(), 2.5f);
  p.p = 0.5f;
  selected = select_blocks_reference(scores.data(), length, p, &share);
  EXPECT_EQ(selected.size(), 24u + 116u);
  EXPECT_EQ(selected[123], 123);
  EXPECT_EQ(selected[124], 240);
  EXPECT_EQ(share, 0.5f);
  p.p = 1.0f;
  EXPECT_EQ(select_blocks_reference(scores.data(), length, p).size(), 256u);
  // A capacity is a cap; -0 and +0 tie.
  scores[100] = -0.0f, scores[50] = 0.0f;
  for (int i = 0; i < 256; ++i)
    if (i != 100 && i != 50) scores[i] = -1.0f;
  p.mode = SelectionMode::top_k;
  p.budget = 25 * 16;
  selected = select_blocks_reference(scores.data(), length, p);
  EXPECT_TRUE(std::binary_search(selected.begin(), selected.end(), 50));
  EXPECT_FALSE(std::binary_search(selected.begin(), selected.end(), 100));
  p.budget = 100 * 16;
  EXPECT_EQ(select_blocks_reference(scores.data(), length, p, nullptr, 40).size(), 40u);
  EXPECT_TRUE(select_blocks_reference(scores.data(), 0, p).empty());
}

TEST(SelectReference, AThresholdOfASetStandsForTheRules) {
  std::mt19937 random(seed());
  SelectionRule rule;
  rule.mode = SelectionMode::threshold;
  rule.floor = 0;
  rule.thresholds.count = 5;
  for (int32_t set = 0; set < 5; ++set) rule.thresholds.of[set] = std::pow(10.0, -1 - set);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> scores(300);
  for (float& score : scores) score = normal(random);
  std::set<size_t> sizes;
  for (int32_t set = 0; set < 5; ++set) {
    SelectionRule own = rule;
    own.thresholds = {};
    own.threshold = rule.thresholds.of[set];
    const auto selected =
        select_blocks_reference(scores.data(), 4800, rule, nullptr, std::numeric_limits<int32_t>::max(), set);
    EXPECT_EQ(selected, select_blocks_reference(scores.data(), 4800, own));
    sizes.insert(selected.size());
  }
  EXPECT_EQ(sizes.size(), 5u);
}

}  // namespace
}  // namespace spot::kernels
