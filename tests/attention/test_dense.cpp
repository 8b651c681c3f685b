#include <gtest/gtest.h>

#include "attention/dense.h"
#include "attention/mass.h"
#include "tests/attention/support.h"

using namespace spot;
using namespace spot::test;

class Dense : public testing::TestWithParam<std::tuple<int64_t, at::ScalarType>> {};

TEST_P(Dense, MatchesDoublePrecisionInPrefillChunksAndDecode) {
  fresh_seed();
  const auto [dim, dtype] = GetParam();
  const double tolerance = dtype == at::kFloat ? 5e-6 : 2e-2;
  const ModelConfig model = small_model(24, 1, 6, 2, dim);
  LayerHistory history(model, 64, dtype, 3);
  DenseAttention attention(history.cache());
  // Prefill, a second chunk beside a first one, decode of all, decode of some, and a chunk beside a decode.
  const std::vector<std::vector<int64_t>> passes = {{random_int(30, 90), random_int(1, 15), 0},
                                                    {random_int(2, 70), 0, random_int(16, 50)},
                                                    {1, 1, 1},
                                                    {0, 1, 1},
                                                    {1, random_int(2, 40), 1}};
  for (const auto& counts : passes) {
    const Pass pass = history.next(counts);
    const at::Tensor got = attention.forward(pass.inputs(0, history.scale()));
    ASSERT_EQ(got.sizes(), pass.query.sizes());
    ASSERT_EQ(got.scalar_type(), dtype);
    int64_t row = 0;
    for (size_t i = 0; i < counts.size(); ++i)
      for (int64_t t = 0; t < counts[i]; ++t, ++row) {
        const int64_t position = history.cache().length(history.id(i)) - counts[i] + t;
        ASSERT_LT(largest_difference(got[row], history.dense(pass, row, i, position)), tolerance)
            << "sequence " << i << " position " << position;
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, Dense,
                         testing::Combine(testing::Values<int64_t>(64, 128, 256),
                                          testing::Values(at::kFloat, at::kBFloat16)));

TEST(CausalAttention, ChunksOfALongSequenceJoinUp) {
  fresh_seed();
  const int64_t length = 1300;
  const at::Tensor query = at::randn({length, 4, 32}), key = at::randn({2, length, 32}),
                   value = at::randn({2, length, 32});
  const at::Tensor whole = causal_attention(query, key, value, 0, 0.2);
  const at::Tensor expected = at::scaled_dot_product_attention(
      query.to(at::kDouble).transpose(0, 1).unsqueeze(0),
      key.to(at::kDouble).repeat_interleave(2, 0).unsqueeze(0),
      value.to(at::kDouble).repeat_interleave(2, 0).unsqueeze(0), std::nullopt, 0.0, true, 0.2);
  EXPECT_LT(largest_difference(whole, expected[0].transpose(0, 1)), 1e-5);
  at::Tensor logsumexp;
  EXPECT_TRUE(at::equal(causal_attention(query, key, value, 0, 0.2, &logsumexp), whole));
  at::Tensor logits =
      at::einsum("qhd,hkd->hqk", {query.to(at::kDouble), key.to(at::kDouble).repeat_interleave(2, 0)}) * 0.2;
  logits.masked_fill_(at::ones({length, length}, at::kBool).triu_(1), -INFINITY);
  EXPECT_LT(largest_difference(logsumexp, at::logsumexp(logits, {-1})), 1e-5);
  for (int64_t start = 0; start < length;) {
    const int64_t count = std::min(random_int(1, 600), length - start);
    // Keys past the chunk must not matter.
    at::Tensor poisoned = key.clone();
    poisoned.slice(1, start + count).fill_(NAN);
    EXPECT_LT(largest_difference(
                  causal_attention(query.slice(0, start, start + count), poisoned, value, start, 0.2),
                  whole.slice(0, start, start + count)),
              1e-5);
    start += count;
  }
  EXPECT_THROW(causal_attention(query, key, value, 1, 0.2), Error);
  EXPECT_THROW(causal_attention(query.slice(1, 0, 3), key, value, 0, 0.2), Error);
}

TEST(AttentionMass, MatchesDoublePrecision) {
  fresh_seed();
  const int64_t length = random_int(40, 150), start = random_int(0, length - 20), count = length - start;
  const at::Tensor query = at::randn({count, 6, 16}), key = at::randn({2, length, 16});
  for (int64_t groups : {1, 2})
    for (BlockReduction reduction : {BlockReduction::sum, BlockReduction::max}) {
      const at::Tensor got = attention_mass(query, key, 0.25, start, groups, reduction);
      ASSERT_EQ(got.sizes(), (std::vector<int64_t>{count, groups, (length + 15) / 16}));
      for (int64_t t = 0; t < count; ++t) {
        const int64_t visible = start + t + 1;
        at::Tensor mean = at::zeros({groups, length}, at::kDouble);
        for (int64_t h = 0; h < 6; ++h) {
          const at::Tensor scores =
              at::mv(key[h / 3].slice(0, 0, visible).to(at::kDouble), query[t][h].to(at::kDouble)) * 0.25;
          mean[groups == 1 ? 0 : h / 3].slice(0, 0, visible) +=
              at::softmax(scores, 0) / (groups == 1 ? 6.0 : 3.0);
        }
        for (int64_t g = 0; g < groups; ++g) {
          EXPECT_NEAR(got[t][g].sum().item<double>(),
                      reduction == BlockReduction::sum ? 1.0 : got[t][g].sum().item<double>(), 1e-5);
          for (int64_t b = 0; b < got.size(2); ++b) {
            const at::Tensor block = mean[g].slice(0, b * 16, std::min(b * 16 + 16, length));
            const double expected =
                (reduction == BlockReduction::sum ? block.sum() : block.max()).item<double>();
            ASSERT_NEAR(got[t][g][b].item<double>(), expected, 1e-5);
          }
        }
      }
    }
  EXPECT_THROW(attention_mass(query, key, 0.25, start + 1), Error);
  EXPECT_THROW(attention_mass(query, key, 0.25, start, 3), Error);
}

TEST(AttentionMass, CapturedMassSplitsReservedAndResidual) {
  SelectionRule rule;
  rule.sinks = 16;
  rule.recency = 20;
  rule.floor = 0;
  rule.mode = SelectionMode::top_k;
  rule.budget = 16 * 4;
  // Length 100: 7 blocks; reserved are 0 and 5, 6. One residual block is kept besides.
  const at::Tensor mass = at::tensor({0.3, 0.1, 0.05, 0.25, 0.1, 0.15, 0.05}).to(at::kFloat).view({1, 1, 7});
  const Selection selection = select_blocks(mass.log(), at::full({1}, 100, at::kInt), rule);
  const CapturedMass captured = captured_mass(mass, selection, rule);
  EXPECT_NEAR(captured.total.item<double>(), 0.3 + 0.25 + 0.15 + 0.05, 1e-6);
  EXPECT_NEAR(captured.residual.item<double>(), 0.25 / 0.5, 1e-6);
  rule.sinks = 200;  // nothing residual
  const Selection all = select_blocks(mass.log(), at::full({1}, 100, at::kInt), rule);
  EXPECT_NEAR(captured_mass(mass, all, rule).residual.item<double>(), 1.0, 1e-6);
  EXPECT_NEAR(captured_mass(mass, all, rule).total.item<double>(), 1.0, 1e-6);
}
