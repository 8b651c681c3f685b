#include <gtest/gtest.h>

#include <cmath>

#include "ops/attention/attention.h"
#include "ops/selector/selector.h"
#include "tests/selection/support.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

// A paged batch: every sequence's pages are drawn at random; what belongs to nobody is NaN.
struct Paged {
  at::Tensor page_table, lengths;        // [R, P], [R] int32
  at::Tensor key_pool, value_pool;       // [Hkv, pages, 16, d]
  std::vector<at::Tensor> keys, values;  // per row [Hkv, length, d]
};

Paged random_pages(const std::vector<int64_t>& lengths, int64_t kv_heads, int64_t dim, at::ScalarType dtype) {
  int64_t widest = 0, used = 0;
  for (int64_t n : lengths) {
    widest = std::max(widest, (n + 15) / 16);
    used += (n + 15) / 16;
  }
  const int64_t rows = static_cast<int64_t>(lengths.size()), pages = used + 3;
  Paged paged;
  paged.key_pool = at::full({kv_heads, pages, 16, dim}, NAN).to(dtype);
  paged.value_pool = paged.key_pool.clone();
  paged.page_table = at::zeros({rows, widest + 1}, at::kInt);
  paged.lengths = at::tensor(lengths).to(at::kInt);
  const at::Tensor order = at::randperm(pages, at::kLong);
  int64_t next = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t blocks = (lengths[r] + 15) / 16;
    paged.keys.push_back(at::randn({kv_heads, lengths[r], dim}).to(dtype));
    paged.values.push_back(at::randn({kv_heads, lengths[r], dim}).to(dtype));
    for (int64_t b = 0; b < blocks; ++b, ++next) {
      const int64_t page = order[next].item<int64_t>(), tokens = std::min<int64_t>(16, lengths[r] - b * 16);
      paged.page_table[r][b] = static_cast<int32_t>(page);
      paged.key_pool.select(1, page)
          .slice(1, 0, tokens)
          .copy_(paged.keys[r].slice(1, b * 16, b * 16 + tokens));
      paged.value_pool.select(1, page)
          .slice(1, 0, tokens)
          .copy_(paged.values[r].slice(1, b * 16, b * 16 + tokens));
    }
  }
  return paged;
}

// Scales of E4M3 pools in one of their forms: none, one number, one a KV head.
at::Tensor random_scale(int64_t kv_heads) {
  switch (random_int(0, 3)) {
    case 0:
      return {};
    case 1:
      return at::rand({}) + 0.25;
    case 2:
      return at::rand({1}) + 0.25;
    default:
      return (at::rand({kv_heads, 2}) + 0.25).select(1, 0);
  }
}
at::Tensor scaled(const at::Tensor& stored, const at::Tensor& scale) {
  const at::Tensor numbers = stored.to(at::kDouble);
  return scale.defined() ? numbers * scale.to(at::kDouble).reshape({-1, 1, 1}) : numbers;
}

// A random ascending subset of each row's blocks, the last always in.
std::pair<at::Tensor, at::Tensor> random_selection(const at::Tensor& lengths, int64_t groups, double share) {
  const int64_t rows = lengths.size(0), widest = (lengths.max().item<int32_t>() + 15) / 16;
  at::Tensor indices = at::full({rows, groups, widest}, -1, at::kInt),
             counts = at::zeros({rows, groups}, at::kInt);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t blocks = (lengths[r].item<int32_t>() + 15) / 16;
      int32_t count = 0;
      for (int64_t b = 0; b < blocks; ++b)
        if (b == blocks - 1 || at::rand({1}).item<double>() < share)
          indices[r][g][count++] = static_cast<int32_t>(b);
      counts[r][g] = count;
    }
  return {indices, counts};
}

}  // namespace

// Head dim, dtype, and whether the pools hold E4M3 codes.
class SparseDecode : public testing::TestWithParam<std::tuple<int64_t, at::ScalarType, bool>> {};

TEST_P(SparseDecode, MatchesDoublePrecisionAndReadsNothingElse) {
  fresh_seed();
  const auto [dim, dtype, codes] = GetParam();
  for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{6, 2}, {8, 8}, {5, 1}, {28, 4}, {16, 1}})
    for (int64_t groups : {int64_t{1}, kv_heads}) {
      const Paged paged = random_pages({random_int(1, 15), 64, random_int(65, 300), random_int(300, 700)},
                                       kv_heads, dim, codes ? at::kFloat8_e4m3fn : dtype);
      const at::Tensor key_scale = codes ? random_scale(kv_heads) : at::Tensor(),
                       value_scale = codes ? random_scale(kv_heads) : at::Tensor();
      const auto [indices, counts] = random_selection(paged.lengths, groups, 0.4);
      // Unselected pages become NaN too: touching one would show.
      Paged poisoned = paged;
      poisoned.key_pool = at::full(paged.key_pool.sizes(), NAN).to(paged.key_pool.scalar_type());
      poisoned.value_pool = poisoned.key_pool.clone();
      const at::Tensor query = at::randn({4, heads, dim}).to(dtype);
      const double scale = 1 / std::sqrt(static_cast<double>(dim));
      at::Tensor expected = at::empty({4, heads, dim}, at::kDouble);
      for (int64_t r = 0; r < 4; ++r) {
        std::vector<std::vector<int64_t>> chosen;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t count = counts[r][g].item<int32_t>(), length = paged.lengths[r].item<int32_t>();
          chosen.push_back(tokens_of_blocks(indices[r][g], count, length));
          for (int64_t i = 0; i < count; ++i) {
            const int64_t block = indices[r][g][i].item<int32_t>(),
                          page = paged.page_table[r][block].item<int32_t>();
            const int64_t first = groups == 1 ? 0 : g, last = groups == 1 ? kv_heads : g + 1;
            poisoned.key_pool.slice(0, first, last)
                .select(1, page)
                .copy_(paged.key_pool.slice(0, first, last).select(1, page));
            poisoned.value_pool.slice(0, first, last)
                .select(1, page)
                .copy_(paged.value_pool.slice(0, first, last).select(1, page));
          }
        }
        expected[r] = plain_attention(query[r], scaled(paged.keys[r], key_scale),
                                      scaled(paged.values[r], value_scale), chosen, scale);
      }
      const at::Tensor got =
          ops::sparse_decode_attention({query, poisoned.key_pool, poisoned.value_pool, paged.page_table,
                                        paged.lengths, scale, indices, counts, key_scale, value_scale});
      ASSERT_EQ(got.scalar_type(), dtype);
      EXPECT_LT(largest_difference(got, expected), dtype == at::kFloat  ? 5e-6
                                                   : dtype == at::kHalf ? 2e-3
                                                                        : 1.5e-2)
          << heads << "/" << kv_heads << " groups " << groups;
    }
}

INSTANTIATE_TEST_SUITE_P(Shapes, SparseDecode,
                         testing::Combine(testing::Values<int64_t>(64, 128, 256, 72),
                                          testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                                          testing::Bool()));

// Codes are what their numbers are in pools of the query's dtype, the scales applied.
TEST(SparseDecodeAttention, OfE4m3PoolsIsThatOfTheirNumbers) {
  fresh_seed();
  const Paged paged = random_pages({333, 90, 512}, 3, 64, at::kFloat8_e4m3fn);
  const at::Tensor query = at::randn({3, 6, 64}), keys = paged.key_pool.to(at::kFloat),
                   values = paged.value_pool.to(at::kFloat);
  const auto call = [&](const at::Tensor& key_pool, const at::Tensor& value_pool, const at::Tensor& key_scale,
                        const at::Tensor& value_scale, double scale) {
    return ops::sparse_decode_attention({query,
                                         key_pool,
                                         value_pool,
                                         paged.page_table,
                                         paged.lengths,
                                         scale,
                                         {},
                                         {},
                                         key_scale,
                                         value_scale});
  };
  const at::Tensor got = call(paged.key_pool, paged.value_pool, {}, {}, 0.125);
  EXPECT_TRUE(at::equal(got, call(keys, values, {}, {}, 0.125)));
  // A power of two rounds nothing.
  const at::Tensor halves = at::full({}, 0.5), fours = at::full({3}, 4.0);
  EXPECT_TRUE(at::equal(call(paged.key_pool, paged.value_pool, halves, fours, 0.25), got * 4));
  // A token's key beside its value, as other engines keep them.
  const at::Tensor beside = at::cat({keys, values}, 3).to(at::kFloat8_e4m3fn);
  EXPECT_TRUE(at::equal(call(beside.slice(3, 0, 64), beside.slice(3, 64), {}, {}, 0.125), got));
}

TEST(SparseDecodeAttention, IsIndependentOfBatchAndThreads) {
  fresh_seed();
  const Paged paged = random_pages({333, 90, 512}, 2, 64, at::kFloat);
  const auto [indices, counts] = random_selection(paged.lengths, 1, 0.5);
  const at::Tensor query = at::randn({3, 8, 64});
  const at::Tensor whole = ops::sparse_decode_attention(
      {query, paged.key_pool, paged.value_pool, paged.page_table, paged.lengths, 0.125, indices, counts});
  for (int64_t r = 0; r < 3; ++r) {
    auto one = [&](const at::Tensor& x) { return x.slice(0, r, r + 1); };
    EXPECT_TRUE(at::equal(
        ops::sparse_decode_attention({one(query), paged.key_pool, paged.value_pool, one(paged.page_table),
                                      one(paged.lengths), 0.125, one(indices), one(counts)})[0],
        whole[r]));
  }
  // A page table shared by all rows may be expanded.
  const at::Tensor lengths = at::tensor({333, 40, 200}).to(at::kInt);
  const auto [few, few_counts] = random_selection(lengths, 2, 0.5);
  const at::Tensor expanded = paged.page_table.slice(0, 0, 1).expand({3, -1});
  EXPECT_TRUE(
      at::equal(ops::sparse_decode_attention(
                    {query, paged.key_pool, paged.value_pool, expanded, lengths, 0.125, few, few_counts}),
                ops::sparse_decode_attention({query, paged.key_pool, paged.value_pool, expanded.contiguous(),
                                              lengths, 0.125, few, few_counts})));
}

TEST(SparseDecodeAttention, EmptyRowsGiveZeros) {
  const Paged paged = random_pages({16, 32}, 2, 64, at::kFloat);
  const at::Tensor none = at::full({2, 1, 0}, -1, at::kInt);
  const at::Tensor got =
      ops::sparse_decode_attention({at::randn({2, 4, 64}), paged.key_pool, paged.value_pool, paged.page_table,
                                    paged.lengths, 0.1, none, at::zeros({2, 1}, at::kInt)});
  EXPECT_EQ(got.abs().max().item<float>(), 0.0f);
}

TEST(SparseDecodeAttention, RefusesWhatWouldReadOutside) {
  const Paged paged = random_pages({20}, 2, 64, at::kFloat);
  const at::Tensor query = at::randn({1, 4, 64}), counts = at::ones({1, 1}, at::kInt);
  auto run = [&](const at::Tensor& indices, const at::Tensor& count, const at::Tensor& table) {
    return ops::sparse_decode_attention(
        {query, paged.key_pool, paged.value_pool, table, paged.lengths, 0.1, indices, count});
  };
  const at::Tensor zero = at::zeros({1, 1, 1}, at::kInt);
  run(zero, counts, paged.page_table);
  EXPECT_THROW(run(zero + 2, counts, paged.page_table), c10::Error);            // past the length
  EXPECT_THROW(run(zero - 1, counts, paged.page_table), c10::Error);            // padding counted in
  EXPECT_THROW(run(zero, counts + 1, paged.page_table), c10::Error);            // more than there are
  EXPECT_THROW(run(zero, counts, paged.page_table + 100), c10::Error);          // no such page
  EXPECT_THROW(run(zero.to(at::kLong), counts, paged.page_table), c10::Error);  // dtype
  EXPECT_THROW(run(zero.expand({1, 3, 1}), counts.expand({1, 3}), paged.page_table), c10::Error);  // groups
  EXPECT_THROW(ops::sparse_decode_attention({query.to(at::kDouble), paged.key_pool, paged.value_pool,
                                             paged.page_table, paged.lengths, 0.1, zero, counts}),
               c10::Error);
  EXPECT_THROW(ops::sparse_decode_attention({query.slice(1, 0, 3), paged.key_pool, paged.value_pool,
                                             paged.page_table, paged.lengths, 0.1, zero, counts}),
               c10::Error);
}

TEST(SparseDecodeAttention, RefusesScalesAndCodesThatDoNotFit) {
  const Paged codes = random_pages({20}, 2, 64, at::kFloat8_e4m3fn),
              numbers = random_pages({20}, 2, 64, at::kFloat);
  const auto refused = [](const Paged& paged, const at::Tensor& values, const at::Tensor& scale) {
    try {
      ops::sparse_decode_attention({at::zeros({1, 4, 64}),
                                    paged.key_pool,
                                    values,
                                    paged.page_table,
                                    paged.lengths,
                                    0.1,
                                    {},
                                    {},
                                    {},
                                    scale});
    } catch (const c10::Error& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string();
  };
  EXPECT_EQ(refused(codes, codes.value_pool, at::ones({2})), "");
  EXPECT_EQ(refused(numbers, numbers.value_pool, at::ones({2})),
            "spot::sparse_decode_attention: value_scale was given for pools of Float; scales are for "
            "float8_e4m3fn, leave it out");
  EXPECT_EQ(
      refused(codes, codes.value_pool, at::ones({3})),
      "spot::sparse_decode_attention: value_scale is Float [3]; it must be float32 of one number or [2]");
  EXPECT_NE(refused(codes, codes.value_pool, at::ones({2}, at::kDouble)).find("is Double [2]"),
            std::string::npos);
  EXPECT_NE(refused(codes, numbers.value_pool, {}).find("value_pool is Float"), std::string::npos);
  Paged other = codes;
  other.key_pool = other.value_pool = numbers.key_pool.to(at::kFloat8_e5m2);
  EXPECT_EQ(refused(other, other.value_pool, {}),
            "spot::sparse_decode_attention: key_pool is Float8_e5m2; for this query it must be Float or "
            "Float8_e4m3fn");
}

TEST(ScoreBlocks, MatchesDoublePrecisionInEveryFormat) {
  fresh_seed();
  for (const KeyFormat format : {KeyFormat::f32, KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4,
                                 KeyFormat::mxfp4, KeyFormat::nvfp4})
    for (int64_t key_heads : {1, 4})
      for (int64_t groups : {1, 3}) {
        const std::vector<int64_t> lengths = {random_int(1, 16), random_int(17, 100), 64};
        at::Tensor pool = at::zeros({14, key_heads, kernels::page_head_bytes(format)}, at::kByte);
        const at::Tensor order = at::randperm(14, at::kLong);
        at::Tensor table = at::zeros({3, 8}, at::kInt);
        int64_t next = 0;
        std::vector<at::Tensor> stored;
        for (int64_t r = 0; r < 3; ++r) {
          for (int64_t b = 0; b < (lengths[r] + 15) / 16; ++b) table[r][b] = order[next++].to(at::kInt);
          const at::Tensor position = at::arange(lengths[r], at::kLong);
          const at::Tensor slots =
              table[r].to(at::kLong).index_select(0, at::div(position, 16, "floor")) * 16 +
              at::remainder(position, 16);
          ops::selector_key_append({pool, slots, at::randn({lengths[r], key_heads, 128}), format, 0.0625});
          stored.push_back(ops::selector_key_gather({pool, table[r], lengths[r], format, 0.0625}));
        }
        // int4 is scored in integers, the query in 15 bits.
        const double bound = format == KeyFormat::int4 ? 1e-2 : 2e-3;
        const at::Tensor query = at::randn({3, 4, 128}), weight = at::randn({3, groups, 4});
        const at::Tensor got =
            ops::score_blocks({query, weight, pool, table, at::tensor(lengths).to(at::kInt), format, 0.0625});
        ASSERT_EQ(got.sizes(), (std::vector<int64_t>{3, groups, 8}));
        for (int64_t r = 0; r < 3; ++r)
          for (int64_t g = 0; g < groups; ++g) {
            at::Tensor scores = at::zeros({lengths[r]}, at::kDouble);
            for (int64_t h = 0; h < 4; ++h) {
              const at::Tensor keys = stored[r].select(1, key_heads == 1 ? 0 : h).to(at::kDouble);
              scores +=
                  weight[r][g][h].item<double>() * at::mv(keys, query[r][h].to(at::kDouble)).clamp_min(0);
            }
            for (int64_t b = 0; b < 8; ++b) {
              const int64_t first = b * 16, last = std::min(first + 16, lengths[r]);
              const double value = got[r][g][b].item<double>();
              if (first >= lengths[r]) {
                EXPECT_EQ(value, -INFINITY);
              } else {
                EXPECT_NEAR(value, scores.slice(0, first, last).max().item<double>(), bound)
                    << to_string(format);
              }
            }
          }
        EXPECT_EQ(ops::score_blocks(
                      {query, weight, pool, table, at::tensor(lengths).to(at::kInt), format, 0.0625, 7})
                      .size(2),
                  7);
        EXPECT_THROW(ops::score_blocks({query, weight, pool, table, at::tensor(lengths).to(at::kInt) + 200,
                                        format, 0.0625}),
                     c10::Error);
      }
}

TEST(ScoreBlocks, RefusesBadArguments) {
  const at::Tensor pool = at::zeros({2, 1, 4096}, at::kByte), table = at::zeros({1, 2}, at::kInt),
                   lengths = at::full({1}, 20, at::kInt);
  const at::Tensor query = at::zeros({1, 4, 128}), weight = at::zeros({1, 1, 4});
  ops::score_blocks({query, weight, pool, table, lengths, KeyFormat::bf16});
  EXPECT_THROW(ops::score_blocks({query, weight, pool, table, lengths, KeyFormat::int8}), c10::Error);
  EXPECT_THROW(ops::score_blocks({query.slice(1, 0, 3), weight, pool, table, lengths, KeyFormat::bf16}),
               c10::Error);
  EXPECT_THROW(ops::score_blocks({query, weight.to(at::kBFloat16), pool, table, lengths, KeyFormat::bf16}),
               c10::Error);
  EXPECT_THROW(ops::score_blocks({query, weight, pool, table + 5, lengths, KeyFormat::bf16}), c10::Error);
  EXPECT_THROW(ops::score_blocks({query, weight, pool, table, lengths.to(at::kLong), KeyFormat::bf16}),
               c10::Error);
}

TEST(SelectAndAttend, IsItsTwoHalves) {
  fresh_seed();
  const Paged numbers = random_pages({random_int(1, 40), 700, random_int(300, 900)}, 2, 64, at::kFloat),
              codes = random_pages({random_int(1, 40), 700, random_int(300, 900)}, 2, 64, at::kFloat8_e4m3fn);
  const at::Tensor query = at::randn({3, 6, 64}), all_scores = at::randn({3, 2, 60}) * 4;
  for (bool e4m3 : {false, true})
    for (bool top_p : {true, false}) {
      const Paged& paged = e4m3 ? codes : numbers;
      const at::Tensor scores = all_scores.slice(2, 0, paged.page_table.size(1)),
                       key_scale = e4m3 ? at::rand({2}) + 0.25 : at::Tensor(),
                       value_scale = e4m3 ? at::rand({}) + 0.25 : at::Tensor();
      SelectionRule arguments;
      arguments.mode = top_p ? SelectionMode::top_p : SelectionMode::top_k;
      arguments.budget_fraction = top_p ? 0.0 : 0.6;
      arguments.floor = 32;
      arguments.sinks = 16;
      arguments.recency = 64;
      const auto got = ops::select_and_attend(
          {scores, query, paged.key_pool, paged.value_pool, paged.page_table, paged.lengths, 0.125, arguments,
           /*max_selected=*/0, /*with_mass=*/true, key_scale, value_scale});
      const auto [indices, counts, mass] = ops::select_blocks({scores, paged.lengths, arguments});
      EXPECT_TRUE(at::equal(got.indices, indices));
      EXPECT_TRUE(at::equal(got.counts, counts));
      EXPECT_TRUE(at::equal(got.predicted_mass, mass));
      const auto unmeasured = ops::select_and_attend({scores, query, paged.key_pool, paged.value_pool,
                                                      paged.page_table, paged.lengths, 0.125, arguments,
                                                      /*max_selected=*/0, false, key_scale, value_scale});
      EXPECT_TRUE(at::equal(unmeasured.output, got.output));
      EXPECT_TRUE(at::equal(unmeasured.indices, got.indices));
      EXPECT_EQ(unmeasured.predicted_mass.numel(), 0);
      EXPECT_TRUE(at::equal(
          got.output,
          ops::sparse_decode_attention({query, paged.key_pool, paged.value_pool, paged.page_table,
                                        paged.lengths, 0.125, indices, counts, key_scale, value_scale})));
      EXPECT_THROW(
          ops::select_and_attend({scores.slice(1, 0, 1).expand({3, 3, -1}), query, paged.key_pool,
                                  paged.value_pool, paged.page_table, paged.lengths, 0.125, arguments}),
          c10::Error);
    }
}

TEST(SparseDecodeAttention, WithoutListsAttendsToEverything) {
  fresh_seed();
  const Paged paged = random_pages({random_int(1, 40), 300}, 2, 64, at::kFloat);
  const at::Tensor query = at::randn({2, 6, 64});
  const at::Tensor got = ops::sparse_decode_attention(
      {query, paged.key_pool, paged.value_pool, paged.page_table, paged.lengths, 0.125});
  for (int64_t r = 0; r < 2; ++r) {
    std::vector<int64_t> all(paged.lengths[r].item<int32_t>());
    std::iota(all.begin(), all.end(), 0);
    EXPECT_LT(
        largest_difference(got[r], plain_attention(query[r], paged.keys[r], paged.values[r], {all}, 0.125)),
        5e-6);
  }
  EXPECT_TRUE(ops::attends(query, paged.key_pool));
  EXPECT_FALSE(ops::attends(query.to(at::kDouble), paged.key_pool));
}
