#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "kernels/select_reference.h"
#include "ops/attention/attention.h"
#include "selection/selection.h"
#include "tests/selection/support.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

SelectionRule random_rule(SelectionMode mode) {
  SelectionRule rule;
  rule.mode = mode;
  rule.sinks = random_int(0, 3) ? random_int(1, 150) : 0;
  rule.recency = random_int(0, 3) ? random_int(1, 300) : 0;
  rule.floor = random_int(0, 600);
  rule.p = at::rand({1}).item<double>() * 0.98 + 0.01;
  rule.threshold = std::pow(10.0, -4 * at::rand({1}).item<double>());
  rule.budget = random_int(0, 1500);
  rule.budget_fraction = random_int(0, 2) ? 0.0 : at::rand({1}).item<double>();
  rule.cap = random_int(0, 1) ? 0 : rule.floor + random_int(0, 800);
  rule.temperature = at::rand({1}).item<double>() * 3 + 0.2;
  return rule;
}

std::vector<float> row_of(const at::Tensor& scores, int64_t r, int64_t g) {
  const at::Tensor row = scores[r][g].contiguous();
  return {row.const_data_ptr<float>(), row.const_data_ptr<float>() + row.numel()};
}

// Lengths with their corner cases, and scores of the given flavour.
struct Rows {
  at::Tensor scores, lengths;
};
Rows random_rows(int64_t rows, int64_t groups, int64_t blocks, int flavour) {
  at::Tensor scores = at::randn({rows, groups, blocks}) * 3;
  if (flavour == 1) scores = at::round(scores);                                   // many ties
  if (flavour == 2) scores.masked_fill_(at::rand_like(scores) < 0.3, NAN);        // some NaN
  if (flavour == 3) scores.masked_fill_(at::rand_like(scores) < 0.5, -INFINITY);  // some -inf
  if (flavour == 4) scores.zero_();                                               // one plateau
  if (flavour == 5) scores = scores * 40;                                         // very peaked
  at::Tensor lengths = at::randint(1, blocks * 16 + 1, {rows}, at::kInt);
  lengths[0] = static_cast<int32_t>(blocks * 16);
  if (rows > 1) lengths[1] = 1;
  if (rows > 2) lengths[2] = static_cast<int32_t>((blocks - 1) * 16);
  return {scores, lengths};
}

void expect_well_formed(const Selection& selection, const Rows& rows, const SelectionRule& rule) {
  for (int64_t r = 0; r < selection.rows(); ++r)
    for (int64_t g = 0; g < selection.groups(); ++g) {
      const int64_t count = selection.counts[r][g].item<int32_t>();
      const PlainBlocks plain =
          plain_blocks(row_of(rows.scores, r, g), rows.lengths[r].item<int32_t>(), rule);
      std::set<int32_t> chosen;
      int32_t last = -1;
      for (int64_t i = 0; i < selection.indices.size(2); ++i) {
        const int32_t block = selection.indices[r][g][i].item<int32_t>();
        if (i >= count) {
          ASSERT_EQ(block, -1);
          continue;
        }
        ASSERT_GT(block, last) << "not ascending";
        ASSERT_LT(block, plain.blocks) << "past the length";
        last = block;
        chosen.insert(block);
      }
      for (int64_t b = 0; b < plain.blocks; ++b)
        ASSERT_GE(chosen.count(static_cast<int32_t>(b)), plain.is_reserved(b) || plain.all ? 1u : 0u)
            << "row " << r << " lost block " << b;
      // The residual blocks taken are the best ones: ties to the lower index, NaN last.
      const int64_t residual =
          plain.all ? static_cast<int64_t>(plain.order.size()) : count - plain.reserved();
      for (int64_t i = 0; i < static_cast<int64_t>(plain.order.size()); ++i)
        ASSERT_EQ(chosen.count(plain.order[i]) > 0, i < residual) << "row " << r << " rank " << i;
      // The reported share, against double precision.
      const auto masses = plain_masses(plain, row_of(rows.scores, r, g), rule.temperature);
      const double kept = std::accumulate(masses.begin(), masses.begin() + residual, 0.0);
      const double total = std::accumulate(masses.begin(), masses.end(), 0.0);
      EXPECT_NEAR(selection.predicted_mass[r][g].item<double>(), plain.all || total == 0 ? 1.0 : kept, 1e-4);
    }
}

}  // namespace

TEST(SelectBlocks, TopKKeepsExactlyItsBudget) {
  fresh_seed();
  for (int round = 0; round < 24; ++round) {
    const SelectionRule rule = random_rule(SelectionMode::top_k);
    const Rows rows = random_rows(7, round % 2 ? 3 : 1, random_int(3, 120), round % 6);
    const Selection selection = select_blocks(rows.scores, rows.lengths, rule);
    expect_well_formed(selection, rows, rule);
    for (int64_t r = 0; r < 7; ++r) {
      const int64_t length = rows.lengths[r].item<int32_t>();
      const PlainBlocks plain = plain_blocks(row_of(rows.scores, r, 0), length, rule);
      const auto budget = static_cast<int64_t>(
          rule.budget_fraction > 0 ? std::ceil(rule.budget_fraction * static_cast<double>(length))
                                   : static_cast<double>(rule.budget));
      const int64_t expected =
          plain.all ? plain.blocks : std::clamp((budget + 15) / 16, plain.reserved(), plain.blocks);
      EXPECT_EQ(selection.counts[r][0].item<int32_t>(), expected) << describe(rule) << " length " << length;
    }
  }
}

TEST(SelectBlocks, TopPIsTheShortestNucleusWithinItsLimits) {
  fresh_seed();
  for (int round = 0; round < 36; ++round) {
    const SelectionRule rule = random_rule(SelectionMode::top_p);
    const Rows rows = random_rows(7, round % 2 ? 2 : 1, random_int(3, 150), round % 6);
    const Selection selection = select_blocks(rows.scores, rows.lengths, rule);
    expect_well_formed(selection, rows, rule);
    for (int64_t r = 0; r < 7; ++r)
      for (int64_t g = 0; g < selection.groups(); ++g) {
        const int64_t length = rows.lengths[r].item<int32_t>(),
                      count = selection.counts[r][g].item<int32_t>();
        const PlainBlocks plain = plain_blocks(row_of(rows.scores, r, g), length, rule);
        if (plain.all) {
          EXPECT_EQ(count, plain.blocks);
          continue;
        }
        const auto masses = plain_masses(plain, row_of(rows.scores, r, g), rule.temperature);
        const int64_t most = rule.cap > 0 ? std::max<int64_t>(rule.cap / 16, plain.reserved()) : plain.blocks;
        const int64_t least =
            std::min({std::max<int64_t>((rule.floor + 15) / 16, plain.reserved()), plain.blocks, most});
        EXPECT_GE(count, least);
        EXPECT_LE(count, most);
        const int64_t kept = count - plain.reserved();
        const double mass = std::accumulate(masses.begin(), masses.begin() + kept, 0.0);
        const double total = std::accumulate(masses.begin(), masses.end(), 0.0);
        // Masses are integers of 24 bits and p of 20.
        if (total > 0 && count < most && count < plain.blocks) {
          EXPECT_GE(mass, rule.p - 1e-5) << "mass not reached";
        }
        if (count > least) {
          EXPECT_LT(mass - masses[kept - 1], rule.p + 1e-5) << "one block too many";
        }
      }
  }
}

TEST(SelectBlocks, KnownNucleus) {
  // 8 blocks of which 1..6 are residual; masses 1/2, 1/4, 1/8, 1/16, 1/32, 1/32 after softmax over their
  // logs.
  SelectionRule rule;
  rule.sinks = 16;
  rule.recency = 16;
  rule.floor = 0;
  const at::Tensor mass =
      at::tensor({9.0, 1.0 / 32, 0.25, 1.0 / 16, 0.5, 0.125, 1.0 / 32, 9.0}).to(at::kFloat);
  const at::Tensor scores = mass.log().view({1, 1, 8}), lengths = at::full({1}, 128, at::kInt);
  auto blocks = [&](double p, double temperature = 1, int64_t floor = 0, int64_t cap = 0) {
    rule.p = p;
    rule.temperature = temperature;
    rule.floor = floor;
    rule.cap = cap;
    const Selection s = select_blocks(scores, lengths, rule);
    const at::Tensor row = s.indices[0][0].contiguous();
    return std::vector<int32_t>(row.const_data_ptr<int32_t>(),
                                row.const_data_ptr<int32_t>() + s.counts.item<int32_t>());
  };
  using List = std::vector<int32_t>;
  EXPECT_EQ(blocks(0.5), (List{0, 4, 7}));
  EXPECT_EQ(blocks(0.51), (List{0, 2, 4, 7}));
  EXPECT_EQ(blocks(0.75), (List{0, 2, 4, 7}));
  EXPECT_EQ(blocks(0.9), (List{0, 2, 3, 4, 5, 7}));
  EXPECT_EQ(blocks(0.95), (List{0, 1, 2, 3, 4, 5, 7}));  // the tie of blocks 1 and 6 goes to 1
  EXPECT_EQ(blocks(1.0), (List{0, 1, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(blocks(0.5, 1, 80), (List{0, 2, 4, 5, 7}));
  EXPECT_EQ(blocks(0.95, 1, 0, 64), (List{0, 2, 4, 7}));
  EXPECT_EQ(blocks(0.95, 1, 0, 16), (List{0, 7}));
  // At temperature 1/2 masses are squared and renormalised: 3/4 of the mass lies on block 4.
  EXPECT_EQ(blocks(0.7, 0.5), (List{0, 4, 7}));
  EXPECT_EQ(blocks(0.5, 100), (List{0, 2, 4, 5, 7}));
}

TEST(SelectBlocks, EqualScoresGoToTheLowerIndexAndNanComesLast) {
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.sinks = rule.recency = rule.floor = 0;
  rule.budget = 48;
  at::Tensor scores = at::zeros({1, 1, 10});
  scores[0][0][0] = NAN;
  scores[0][0][1] = -INFINITY;
  scores[0][0][2] = -0.0f;
  const at::Tensor lengths = at::full({1}, 160, at::kInt);
  auto list = [&] {
    const Selection s = select_blocks(scores, lengths, rule);
    const at::Tensor row = s.indices[0][0].contiguous();
    return std::vector<int32_t>(row.const_data_ptr<int32_t>(),
                                row.const_data_ptr<int32_t>() + s.counts.item<int32_t>());
  };
  EXPECT_EQ(list(), (std::vector<int32_t>{2, 3, 4}));
  scores.fill_(NAN);
  EXPECT_EQ(list(), (std::vector<int32_t>{0, 1, 2}));
}

TEST(SelectBlocks, MaxSelectedIsACap) {
  fresh_seed();
  const Rows rows = random_rows(5, 2, 80, 0);
  SelectionRule arguments;
  arguments.p = 0.95;
  const auto [indices, counts, mass] = ops::select_blocks({rows.scores, rows.lengths, arguments, 40});
  EXPECT_EQ(indices.size(2), 40);
  EXPECT_LE(counts.max().item<int32_t>(), 40);
  // Fewer than the reserved blocks of the longest row.
  EXPECT_THROW(ops::select_blocks({rows.scores, rows.lengths, arguments, 3}), c10::Error);
}

TEST(SelectBlocks, IsThePureFunctionOfItsRow) {
  fresh_seed();
  const Rows rows = random_rows(6, 2, 100, 1);
  const SelectionRule rule = random_rule(SelectionMode::top_p);
  const Selection whole = select_blocks(rows.scores, rows.lengths, rule);
  for (int64_t r = 0; r < 6; ++r) {
    const Selection one =
        select_blocks(rows.scores.slice(0, r, r + 1), rows.lengths.slice(0, r, r + 1), rule);
    EXPECT_TRUE(at::equal(one.counts[0], whole.counts[r]));
    EXPECT_TRUE(at::equal(one.indices[0], whole.indices[r].slice(1, 0, one.indices.size(2))));
    // Scores past the length must not matter.
    at::Tensor poisoned = rows.scores.slice(0, r, r + 1).clone();
    const int64_t blocks = (rows.lengths[r].item<int32_t>() + 15) / 16;
    poisoned.slice(2, blocks).fill_(1e30f);
    EXPECT_TRUE(
        at::equal(select_blocks(poisoned, rows.lengths.slice(0, r, r + 1), rule).indices, one.indices));
  }
}

// The operator against the reference that the CUDA kernels are held to.
TEST(SelectBlocks, EqualsTheKernelsReferenceBitForBit) {
  fresh_seed();
  for (int round = 0; round < 60; ++round) {
    SelectionRule rule = random_rule(static_cast<SelectionMode>(round % 3));
    if (random_int(0, 1) == 0) {
      rule.thresholds.count = 2;
      for (double& threshold : rule.thresholds.of) threshold = std::pow(10.0, -random_int(0, 4));
    }
    const Rows rows = random_rows(5, 2, random_int(3, 200), random_int(0, 5));
    const Selection got = select_blocks(rows.scores, rows.lengths, rule);
    for (int64_t r = 0; r < 5; ++r)
      for (int64_t g = 0; g < 2; ++g) {
        const int32_t length = rows.lengths[r].item<int32_t>();
        SelectionRule tokens = rule;
        if (rule.budget_fraction > 0) {
          tokens.budget = static_cast<int32_t>(std::ceil(rule.budget_fraction * length));
          tokens.budget_fraction = 0;
        }
        float share = 0;
        const auto expected =
            kernels::select_blocks_reference(row_of(rows.scores, r, g).data(), length, tokens, &share,
                                             std::numeric_limits<int32_t>::max(), static_cast<int32_t>(g));
        ASSERT_EQ(got.counts[r][g].item<int32_t>(), static_cast<int32_t>(expected.size())) << describe(rule);
        const at::Tensor list = got.indices[r][g].slice(0, 0, static_cast<int64_t>(expected.size()));
        ASSERT_TRUE(at::equal(list, at::tensor(expected, at::kInt)));
        ASSERT_EQ(got.predicted_mass[r][g].item<float>(), share);
      }
  }
}

TEST(SelectBlocks, RefusesBadArguments) {
  const at::Tensor scores = at::zeros({2, 1, 4}), lengths = at::full({2}, 64, at::kInt);
  SelectionRule arguments;
  EXPECT_THROW(ops::select_blocks({scores.to(at::kDouble), lengths, arguments}), c10::Error);
  EXPECT_THROW(ops::select_blocks({scores[0], lengths, arguments}), c10::Error);
  EXPECT_THROW(ops::select_blocks({scores, lengths.to(at::kLong), arguments}), c10::Error);
  EXPECT_THROW(ops::select_blocks({scores, lengths + 1, arguments}), c10::Error);
  EXPECT_THROW(ops::select_blocks({scores, lengths * -1, arguments}), c10::Error);
  arguments.p = 0;
  EXPECT_THROW(ops::select_blocks({scores, lengths, arguments}), c10::Error);
  arguments.p = 0.5;
  arguments.temperature = NAN;
  EXPECT_THROW(ops::select_blocks({scores, lengths, arguments}), c10::Error);
  arguments = {};
  arguments.mode = SelectionMode::threshold;
  arguments.thresholds.count = 2;  // of one set
  arguments.thresholds.of[0] = arguments.thresholds.of[1] = 0.1;
  EXPECT_THROW(ops::select_blocks({scores, lengths, arguments}), c10::Error);
  arguments.thresholds.count = 1;
  arguments.thresholds.of[0] = 0;
  EXPECT_THROW(ops::select_blocks({scores, lengths, arguments}), c10::Error);
  arguments.thresholds = {};
  arguments.threshold = 0;
  EXPECT_THROW(ops::select_blocks({scores, lengths, arguments}), c10::Error);
  SelectionRule rule;
  rule.threshold = 1.5;
  EXPECT_NE(error_of([&] { validate(rule); }).find("threshold is 1.5"), std::string::npos);
  rule = {};
  rule.cap = 100;
  EXPECT_NE(error_of([&] { validate(rule); }).find("cap is 100"), std::string::npos);
  rule = {};
  rule.p = 1.5;
  EXPECT_NE(error_of([&] { select_blocks(scores, lengths, rule); }).find("p is 1.5"), std::string::npos);
}

TEST(Selection, BlockMaxMaskAndCounts) {
  fresh_seed();
  const int64_t tokens = random_int(17, 90), blocks = (tokens + 15) / 16;
  const at::Tensor scores = at::randn({2, 3, tokens}), reduced = block_max(scores);
  ASSERT_EQ(reduced.sizes(), (std::vector<int64_t>{2, 3, blocks}));
  for (int64_t b = 0; b < blocks; ++b)
    EXPECT_TRUE(
        at::equal(reduced.select(2, b), scores.slice(2, b * 16, std::min(b * 16 + 16, tokens)).amax(2)));

  SelectionRule rule;
  rule.sinks = rule.recency = 16;
  rule.floor = 0;
  rule.p = 0.6;
  const at::Tensor lengths = at::full({2}, static_cast<int32_t>(tokens), at::kInt);
  const Selection selection = select_blocks(reduced.contiguous(), lengths, rule);
  const at::Tensor mask = token_mask(selection, tokens);
  for (int64_t r = 0; r < 2; ++r)
    for (int64_t g = 0; g < 3; ++g) {
      at::Tensor expected = at::zeros({tokens}, at::kBool);
      for (int64_t t :
           tokens_of_blocks(selection.indices[r][g], selection.counts[r][g].item<int32_t>(), tokens))
        expected[t] = true;
      EXPECT_TRUE(at::equal(mask[r][g], expected));
    }
  const auto [kept, visible] = count_tokens(selection, lengths);
  EXPECT_EQ(visible.item<int64_t>(), 2 * tokens);
  EXPECT_NEAR(kept.item<double>(), mask.to(at::kDouble).sum().item<double>() / 3, 1e-9);
  EXPECT_EQ(describe(rule), "top-p 0.6");
  rule.mode = SelectionMode::top_k;
  rule.budget_fraction = 0.25;
  EXPECT_EQ(describe(rule), "top-k 25%");
}
