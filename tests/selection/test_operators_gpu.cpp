// The CUDA operators against the CPU ones, which are their oracle. Needs a CUDA build of torch and a GPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ops/attention/attention.h"
#include "ops/baselines/baselines.h"
#include "ops/selector/selector.h"
#include "ops/settled_history.h"
#include "selector/config.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

const at::Device kGpu(at::kCUDA, 0);

// Lengths with their corner cases, and a page table that scatters every row's pages.
struct Table {
  at::Tensor pages, lengths;
  int64_t num_pages;
};
Table random_table(int64_t rows, int64_t most_blocks) {
  at::Tensor lengths = at::randint(1, most_blocks * 16 + 1, {rows}, at::kInt);
  lengths[0] = static_cast<int32_t>(most_blocks * 16);
  if (rows > 1) lengths[1] = 1;
  return {at::randperm(rows * most_blocks, at::kInt).view({rows, most_blocks}), lengths, rows * most_blocks};
}

SelectionRule random_arguments(bool top_p) {
  SelectionRule arguments;
  arguments.mode = top_p ? SelectionMode::top_p : SelectionMode::top_k;
  arguments.p = 0.3 + 0.65 * at::rand({1}).item<double>();
  arguments.budget = random_int(0, 3000);
  arguments.budget_fraction = random_int(0, 2) ? 0.0 : 0.3;
  arguments.sinks = random_int(0, 200);
  arguments.recency = random_int(0, 400);
  arguments.floor = random_int(0, 700);
  arguments.cap = random_int(0, 1) ? 0 : arguments.floor + random_int(0, 900);
  arguments.temperature = 0.3 + at::rand({1}).item<double>() * 2;
  return arguments;
}

// Selections of equal content; the GPU's may be wider, its counts being unknown to the host.
void expect_equal_lists(const at::Tensor& gpu, const at::Tensor& cpu) {
  const at::Tensor host = gpu.cpu();
  ASSERT_GE(host.size(2), cpu.size(2));
  EXPECT_TRUE(at::equal(host.slice(2, 0, cpu.size(2)), cpu));
  EXPECT_TRUE((host.slice(2, cpu.size(2)) == -1).all().item<bool>());
}

double relative_difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = b.cpu().to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

}  // namespace

TEST(GpuOperators, SelectorKeysAreStoredBitForBit) {
  fresh_seed();
  for (const KeyFormat format :
       {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4})
    for (int64_t key_heads : {1, 4})
      for (int norm : {0, 1, 2})
        for (bool rotate : {false, true}) {
          const int64_t tokens = random_int(1, 90);
          const at::Tensor keys = at::randn({tokens, key_heads, 128}).to(at::kBFloat16);
          ops::KeyPreparation preparation;
          preparation.norm = static_cast<KeyNorm>(norm);
          if (norm > 0) preparation.norm_weight = at::rand({128}) + 0.5;
          if (norm == 1) preparation.norm_bias = at::randn({128});
          if (rotate) {
            const at::Tensor angle = at::rand({500, 32}) * 6;
            preparation.cos = angle.cos();
            preparation.sin = angle.sin();
            preparation.positions = at::randint(0, 500, {tokens}, at::kLong);
          }
          at::Tensor slots = at::randperm(8 * 16, at::kLong).slice(0, 0, tokens);
          slots[0] = -1;
          at::Tensor pool = at::zeros({8, key_heads, kernels::page_head_bytes(format)}, at::kByte),
                     on_gpu = pool.to(kGpu);
          ops::selector_key_append({pool, slots, keys, format, 0.0625, preparation});
          for (at::Tensor* x : {&preparation.norm_weight, &preparation.norm_bias, &preparation.cos,
                                &preparation.sin, &preparation.positions})
            if (x->defined()) *x = x->to(kGpu);
          ops::selector_key_append({on_gpu, slots.to(kGpu), keys.to(kGpu), format, 0.0625, preparation});
          EXPECT_TRUE(at::equal(on_gpu.cpu(), pool))
              << static_cast<int>(format) << " norm " << norm << " rotate " << rotate;
          const at::Tensor pages = at::randperm(8, at::kInt).slice(0, 0, 5);
          const int64_t length = random_int(1, 80);
          EXPECT_TRUE(
              at::equal(ops::selector_key_gather({on_gpu, pages.to(kGpu), length, format, 0.0625}).cpu(),
                        ops::selector_key_gather({pool, pages, length, format, 0.0625})));
        }
}

TEST(GpuOperators, ScoresMatch) {
  fresh_seed();
  for (const KeyFormat format :
       {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4})
    for (int64_t key_heads : {1, 4})
      for (int64_t groups : {1, 3})
        for (at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
          const Table table = random_table(5, random_int(2, 70));
          at::Tensor pool =
              at::zeros({table.num_pages, key_heads, kernels::page_head_bytes(format)}, at::kByte);
          ops::selector_key_append({pool, at::arange(table.num_pages * 16, at::kLong),
                                    at::randn({table.num_pages * 16, key_heads, 128}), format, 0.0625});
          const at::Tensor query = at::randn({5, 4, 128}).to(dtype), weight = at::randn({5, groups, 4});
          const at::Tensor expected =
              ops::score_blocks({query, weight, pool, table.pages, table.lengths, format, 0.0625});
          const at::Tensor got =
              ops::score_blocks({query.to(kGpu), weight.to(kGpu), pool.to(kGpu), table.pages.to(kGpu),
                                 table.lengths.to(kGpu), format, 0.0625})
                  .cpu();
          ASSERT_EQ(got.sizes(), expected.sizes());
          EXPECT_TRUE(at::equal(at::isinf(got), at::isinf(expected)));
          const at::Tensor seen = at::isfinite(expected);
          EXPECT_LT(relative_difference(got.masked_select(seen), expected.masked_select(seen)), 1e-4)
              << static_cast<int>(format);
          // A page table shared by all rows may be expanded.
          const at::Tensor shared = table.pages.slice(0, 0, 1).expand({5, -1});
          EXPECT_LT(relative_difference(
                        ops::score_blocks({query.to(kGpu), weight.to(kGpu), pool.to(kGpu), shared.to(kGpu),
                                           table.lengths.to(kGpu), format, 0.0625})
                            .cpu()
                            .masked_select(seen),
                        ops::score_blocks({query, weight, pool, shared, table.lengths, format, 0.0625})
                            .masked_select(seen)),
                    1e-4);
        }
}

TEST(GpuOperators, SelectionsAreEqual) {
  fresh_seed();
  for (int round = 0; round < 40; ++round) {
    const int64_t blocks = random_int(1, 400), groups = round % 3 == 0 ? 4 : 1;
    const Table table = random_table(6, blocks);
    at::Tensor scores = at::randn({6, groups, blocks}) * 3;
    if (round % 4 == 1) scores = at::round(scores);
    if (round % 4 == 2) scores.masked_fill_(at::rand_like(scores) < 0.3, NAN);
    const SelectionRule arguments = random_arguments(round % 2 == 0);
    const auto [indices, counts, mass] = ops::select_blocks({scores, table.lengths, arguments});
    const auto [gpu_indices, gpu_counts, gpu_mass] =
        ops::select_blocks({scores.to(kGpu), table.lengths.to(kGpu), arguments});
    EXPECT_TRUE(at::equal(gpu_counts.cpu(), counts));
    expect_equal_lists(gpu_indices, indices);
    EXPECT_TRUE(at::equal(gpu_mass.cpu(), mass));
  }
}

namespace {

// Of pools of the query's dtype, or of E4M3 codes with a scale for all heads of keys and one a head of values.
void expect_attention_matches(bool codes) {
  fresh_seed();
  for (int64_t dim : {64, 128, 256})
    for (at::ScalarType dtype : {at::kBFloat16, at::kHalf})
      for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{32, 8}, {6, 2}, {4, 4}})
        for (int64_t groups : {int64_t{1}, kv_heads}) {
          const Table table = random_table(4, random_int(3, 120));
          // What no row sees is NaN.
          at::Tensor keys = at::randn({kv_heads, table.num_pages, 16, dim}), values = at::randn_like(keys);
          for (int64_t r = 0; r < 4; ++r) {
            const int64_t length = table.lengths[r].item<int32_t>();
            for (int64_t b = 0; b < table.pages.size(1); ++b)
              for (at::Tensor* pool : {&keys, &values})
                pool->select(1, table.pages[r][b].item<int32_t>())
                    .slice(1, std::clamp<int64_t>(length - b * 16, 0, 16))
                    .fill_(NAN);
          }
          for (at::Tensor* pool : {&keys, &values}) *pool = pool->to(codes ? at::kFloat8_e4m3fn : dtype);
          const at::Tensor key_scale = codes ? at::rand({}) + 0.5 : at::Tensor(),
                           value_scale = codes ? at::rand({kv_heads}) + 0.5 : at::Tensor(),
                           gpu_key_scale = codes ? key_scale.to(kGpu) : key_scale,
                           gpu_value_scale = codes ? value_scale.to(kGpu) : value_scale;
          const at::Tensor query = at::randn({4, heads, dim}).to(dtype);
          const at::Tensor scores = at::randn({4, groups, table.pages.size(1)}) * 3;
          const double scale = 1 / std::sqrt(static_cast<double>(dim));
          for (bool top_p : {true, false}) {
            const SelectionRule arguments = random_arguments(top_p);
            const auto expected = ops::select_and_attend(
                {scores, query, keys, values, table.pages, table.lengths, scale, arguments,
                 /*max_selected=*/0, /*with_mass=*/true, key_scale, value_scale});
            const auto got = ops::select_and_attend(
                {scores.to(kGpu), query.to(kGpu), keys.to(kGpu), values.to(kGpu), table.pages.to(kGpu),
                 table.lengths.to(kGpu), scale, arguments, /*max_selected=*/0, /*with_mass=*/true,
                 gpu_key_scale, gpu_value_scale});
            EXPECT_TRUE(at::equal(got.counts.cpu(), expected.counts));
            expect_equal_lists(got.indices, expected.indices);
            EXPECT_LT(relative_difference(got.output, expected.output), dtype == at::kHalf ? 2e-3 : 1e-2)
                << heads << "/" << kv_heads << " dim " << dim;
            const at::Tensor halves = ops::sparse_decode_attention(
                {query.to(kGpu), keys.to(kGpu), values.to(kGpu), table.pages.to(kGpu), table.lengths.to(kGpu),
                 scale, got.indices, got.counts, gpu_key_scale, gpu_value_scale});
            EXPECT_TRUE(at::equal(halves, got.output));
            // Without masses other code selects; and what may be read early is read early.
            const at::Tensor device_scores = scores.to(kGpu), device_query = query.to(kGpu),
                             device_keys = keys.to(kGpu), device_values = values.to(kGpu),
                             device_pages = table.pages.to(kGpu), device_lengths = table.lengths.to(kGpu);
            const ops::SettledHistory settled(true);
            const auto early = ops::select_and_attend(
                {device_scores + 0, device_query, device_keys, device_values, device_pages, device_lengths,
                 scale, arguments, /*max_selected=*/0, false, gpu_key_scale, gpu_value_scale});
            EXPECT_TRUE(at::equal(early.output, got.output));
            EXPECT_TRUE(at::equal(early.indices, got.indices) && at::equal(early.counts, got.counts));
            EXPECT_EQ(early.predicted_mass.numel(), 0);
          }
          const at::Tensor all = ops::sparse_decode_attention(
              {query, keys, values, table.pages, table.lengths, scale, {}, {}, key_scale, value_scale});
          // A token's key beside its value, as vLLM keeps them.
          const at::Tensor beside =
              at::cat({keys.to(at::kFloat), values.to(at::kFloat)}, 3).to(keys.scalar_type()).to(kGpu);
          for (const bool spaced : {false, true})
            EXPECT_LT(relative_difference(
                          ops::sparse_decode_attention({query.to(kGpu),
                                                        spaced ? beside.slice(3, 0, dim) : keys.to(kGpu),
                                                        spaced ? beside.slice(3, dim) : values.to(kGpu),
                                                        table.pages.to(kGpu),
                                                        table.lengths.to(kGpu),
                                                        scale,
                                                        {},
                                                        {},
                                                        gpu_key_scale,
                                                        gpu_value_scale}),
                          all),
                      dtype == at::kHalf ? 2e-3 : 1e-2);
        }
}

}  // namespace

TEST(GpuOperators, AttentionMatchesAndFusesExactly) {
  expect_attention_matches(false);
  EXPECT_TRUE(ops::attends(at::zeros({1, 4, 64}, at::kBFloat16).to(kGpu),
                           at::zeros({2, 1, 16, 64}, at::kBFloat16).to(kGpu)));
  EXPECT_FALSE(ops::attends(at::zeros({1, 4, 64}).to(kGpu), at::zeros({2, 1, 16, 64}).to(kGpu)));
  EXPECT_FALSE(
      ops::attends(at::zeros({1, 4, 96}, at::kHalf).to(kGpu), at::zeros({2, 1, 16, 96}, at::kHalf).to(kGpu)));
}

TEST(GpuOperators, AttentionOverE4m3PoolsMatchesAndFusesExactly) {
  expect_attention_matches(true);
}

// The stages of Quest and Twilight: the copies of keys bit for bit, the pruning exactly, sums to rounding.
TEST(GpuOperators, BaselinesMatch) {
  fresh_seed();
  for (int64_t dim : {64, 128, 256})
    for (at::ScalarType dtype : {at::kBFloat16, at::kHalf})
      for (const auto& [heads, kv_heads] : {std::pair<int64_t, int64_t>{32, 8}, {6, 2}, {16, 1}}) {
        const Table table = random_table(4, random_int(3, 120));
        const at::Tensor keys = at::randn({kv_heads, table.num_pages, 16, dim}).to(dtype),
                         values = at::randn_like(keys);
        const at::Tensor query = at::randn({4, heads, dim}).to(dtype);
        const double scale = 1 / std::sqrt(static_cast<double>(dim));
        at::Tensor bounds = at::zeros({kv_heads, table.num_pages, 2, dim}, dtype),
                   codes = at::zeros({kv_heads, table.num_pages * 16, dim / 2}, at::kByte),
                   ranges = at::zeros({kv_heads, table.num_pages * 16, 2}, at::kHalf);
        at::Tensor gpu_bounds = bounds.to(kGpu), gpu_codes = codes.to(kGpu), gpu_ranges = ranges.to(kGpu);
        const at::Tensor slots = at::arange(table.num_pages * 16 - 5, at::kLong);
        ops::key_summary_append({bounds, codes, ranges, keys, slots});
        ops::key_summary_append({gpu_bounds, gpu_codes, gpu_ranges, keys.to(kGpu), slots.to(kGpu)});
        EXPECT_TRUE(at::equal(gpu_bounds.cpu(), bounds));
        EXPECT_TRUE(at::equal(gpu_codes.cpu(), codes));
        EXPECT_TRUE(at::equal(gpu_ranges.cpu(), ranges));

        const at::Tensor pages = table.pages.to(kGpu), lengths = table.lengths.to(kGpu),
                         gpu_query = query.to(kGpu);
        for (bool per_kv_head : {true, false}) {
          const at::Tensor expected =
              ops::quest_score({query, bounds, table.pages, table.lengths, scale, per_kv_head});
          const at::Tensor got =
              ops::quest_score({gpu_query, gpu_bounds, pages, lengths, scale, per_kv_head}).cpu();
          ASSERT_EQ(got.sizes(), expected.sizes());
          EXPECT_TRUE(at::equal(at::isinf(got), at::isinf(expected)));
          const at::Tensor seen = at::isfinite(expected);
          EXPECT_LT(relative_difference(got.masked_select(seen), expected.masked_select(seen)), 1e-4);
        }
        SelectionRule rule;
        rule.mode = SelectionMode::top_k;
        rule.budget = 1024;
        const at::Tensor scores = ops::quest_score({query, bounds, table.pages, table.lengths, scale, true});
        const auto [indices, counts, share] = ops::select_blocks({scores, table.lengths, rule});
        const at::Tensor logits =
            ops::estimate_logits({query, codes, ranges, table.pages, table.lengths, indices, counts, scale});
        const at::Tensor got = ops::estimate_logits({gpu_query, gpu_codes, gpu_ranges, pages, lengths,
                                                     indices.to(kGpu), counts.to(kGpu), scale})
                                   .cpu();
        const at::Tensor seen = at::isfinite(logits);
        EXPECT_LT(relative_difference(got.masked_select(seen), logits.masked_select(seen)), 1e-3);
        for (double p : {0.5, 0.95}) {
          const ops::PrunedTokens kept = ops::prune_tokens({logits, indices, counts, table.lengths, p, 100}),
                                  on_gpu = ops::prune_tokens(
                                      {logits.to(kGpu), indices.to(kGpu), counts.to(kGpu), lengths, p, 100});
          ASSERT_TRUE(at::equal(on_gpu.counts.cpu(), kept.counts));
          const at::Tensor there =
              at::arange(kept.positions.size(2), kept.counts.options()) < kept.counts.unsqueeze(2);
          EXPECT_TRUE(
              at::equal(on_gpu.positions.cpu().masked_select(there), kept.positions.masked_select(there)));
          const at::Tensor expected = ops::token_attention(
              {query, keys, values, table.pages, table.lengths, kept.positions, kept.counts, scale});
          EXPECT_LT(
              relative_difference(ops::token_attention({gpu_query, keys.to(kGpu), values.to(kGpu), pages,
                                                        lengths, on_gpu.positions, on_gpu.counts, scale}),
                                  expected),
              dtype == at::kHalf ? 2e-3 : 1e-2);
        }
      }
}
