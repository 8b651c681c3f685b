#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/key_format.h"
#include "ops/cpu/page_kernels.h"
#include "ops/selector/selector.h"
#include "selector/cache.h"
#include "selector/selector.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

const KeyFormat kFormats[] = {KeyFormat::f32,  KeyFormat::bf16,  KeyFormat::int8,
                              KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4};

// Largest error of a stored number, as a share of its group's largest magnitude.
double coarseness(KeyFormat format) {
  switch (format) {
    case KeyFormat::f32:
      return 0;
    case KeyFormat::bf16:
      return 1.0 / 256;
    case KeyFormat::int8:
      return 0.5 / 127 + 1.0 / 200;  // half a step, and the bf16 scale's own error
    case KeyFormat::int4:
      return 0.5 / 7 + 1.0 / 200;
    case KeyFormat::mxfp4:
      return 1.0 / 3;  // steps of 2 up to 6, and a scale up to twice too large
    default:
      return 1.0 / 6 + 1.0 / 12;
  }
}

}  // namespace

TEST(SelectorCache, KeepsKeysUnderAnyPages) {
  fresh_seed();
  for (KeyFormat format : kFormats)
    for (int64_t key_heads : {1, 4}) {
      SelectorConfig config;
      config.key_heads = key_heads;
      PagePools pools(9, 16, at::kCPU);
      SelectorCache cache(config, {2, 5}, pools, format);
      const int64_t length = random_int(50, 80);
      const at::Tensor pages = at::randperm(9, at::kInt).slice(0, 0, 5);
      const at::Tensor keys = at::randn({length, key_heads, 128}) * 2;
      const at::Tensor position = at::arange(length, at::kLong);
      const at::Tensor slots = pages.to(at::kLong).index_select(0, at::div(position, 16, "floor")) * 16 +
                               at::remainder(position, 16);
      const int64_t cut = random_int(1, length - 1);
      // In two parts, out of order: tokens are independent.
      cache.append(5, slots.slice(0, cut), keys.slice(0, cut));
      cache.append(5, slots.slice(0, 0, cut), keys.slice(0, 0, cut));
      const at::Tensor got = cache.gather(5, pages, length);
      ASSERT_EQ(got.sizes(), keys.sizes());
      const int64_t group = format == KeyFormat::nvfp4 ? 16 : 32;
      const at::Tensor largest = keys.view({length, key_heads, -1, group}).abs().amax(-1, true);
      const at::Tensor error = (got - keys).view({length, key_heads, -1, group}).abs() / largest;
      EXPECT_LE(error.max().item<double>(), coarseness(format)) << to_string(format);
      EXPECT_EQ(error.max().item<double>() > 0, format != KeyFormat::f32) << to_string(format);
      EXPECT_EQ(cache.pool(2).count_nonzero().item<int64_t>(), 0);  // the other layer is untouched
    }
}

// The tables of the fast decoder against the definition, bit for bit, over random bytes.
TEST(SelectorCache, DecodesExactlyAsTheFormatSays) {
  fresh_seed();
  namespace k = spot::kernels;
  for (const KeyFormat format : kFormats) {
    // Random bytes are not all numbers (bf16 NaN scales), so keys of wild magnitudes are encoded instead.
    at::Tensor pool = at::zeros({3, 2 * 2, k::page_head_bytes(format)}, at::kByte);
    const at::Tensor keys = at::randn({48, 4, 128}) * at::exp(at::randn({48, 4, 1}) * 3);
    ops::selector_key_append({pool, at::arange(48, at::kLong), keys, format, 0.0625});
    const at::Tensor got =
        ops::selector_key_gather({pool, at::arange(3, at::kInt), 48, format, 0.0625}).contiguous();
    float expected[128];
    uint8_t* bytes = pool.mutable_data_ptr<uint8_t>();
    std::vector<uint8_t> page(k::page_head_bytes(format), 0);
    for (int token = 0; token < 48; ++token)
      for (int head = 0; head < 4; ++head) {
        k::decode_key(format, bytes + ((token / 16) * 4 + head) * k::page_head_bytes(format), token % 16,
                      expected, 0.0625f);
        const float* row = got.const_data_ptr<float>() + (token * 4 + head) * 128;
        ASSERT_EQ(std::memcmp(row, expected, sizeof expected), 0) << to_string(format) << " token " << token;
      }
  }
}

TEST(SelectorCache, CountsItsBytes) {
  const std::pair<KeyFormat, double> shared[] = {{KeyFormat::f32, 512},  {KeyFormat::bf16, 256},
                                                 {KeyFormat::int8, 136}, {KeyFormat::int4, 72},
                                                 {KeyFormat::mxfp4, 68}, {KeyFormat::nvfp4, 72}};
  for (const auto& [format, bytes] : shared) {
    SelectorConfig config;
    PagePools pools(4, 16, at::kCPU);
    EXPECT_EQ(SelectorCache(config, {0}, pools, format).bytes_per_token(), bytes);
    config.key_heads = 4;
    const SelectorCache cache(config, {0}, pools, format);
    EXPECT_EQ(cache.bytes_per_token(), 4 * bytes);
    EXPECT_EQ(static_cast<double>(cache.pool(0).numel()), 4 * bytes * 4 * 16);
    EXPECT_EQ(static_cast<double>(pools.page_bytes("selector_keys")), 5 * bytes * 16);  // of both
  }
}

TEST(SelectorCache, RefusesWhatLiesOutside) {
  PagePools pools(2, 16, at::kCPU);
  SelectorCache cache(SelectorConfig{}, {0}, pools, KeyFormat::bf16);
  const at::Tensor key = at::ones({1, 1, 128});
  EXPECT_THROW(cache.append(1, at::zeros({1}, at::kLong), key), Error);
  EXPECT_THROW(cache.append(0, at::full({1}, 32, at::kLong), key), c10::Error);
  EXPECT_THROW(cache.append(0, at::zeros({2}, at::kLong), key), c10::Error);
  EXPECT_THROW(cache.append(0, at::zeros({1}, at::kLong), at::ones({1, 4, 128})), c10::Error);
  EXPECT_THROW(cache.gather(0, at::zeros({2}, at::kInt), 33), c10::Error);
  EXPECT_THROW(cache.gather(0, at::full({1}, 2, at::kInt), 3), c10::Error);
  cache.append(0, at::full({1}, -1, at::kLong), key);  // a padded row of a captured batch
  EXPECT_EQ(cache.pool(0).count_nonzero().item<int64_t>(), 0);
}

// Every instruction set of this processor, against double precision.
TEST(PageKernels, MatchDoublePrecision) {
  fresh_seed();
  int sets = 0;
  const auto* const* all = ops::cpu::all_page_kernels(&sets);
  ASSERT_GE(sets, 1);
  for (int s = 0; s < sets; ++s) {
    const ops::cpu::PageKernels& kernels = *all[s];
    SCOPED_TRACE(kernels.name);
    for (int heads : {1, 2, 3, 4, 5, 7, 8}) {
      const int stride = 16 * static_cast<int>(random_int(1, 9)),
                tokens = static_cast<int>(random_int(1, 16));
      const at::Tensor query = at::randn({heads, stride}), page = at::randn({16, stride});
      at::Tensor dots = at::full({heads, 16}, 7.0f), sums = at::randn({heads, stride});
      kernels.dots(query.const_data_ptr<float>(), heads, page.const_data_ptr<float>(), tokens, stride, 0.3f,
                   dots.mutable_data_ptr<float>());
      const at::Tensor expected = at::matmul(query.to(at::kDouble), page.to(at::kDouble).t()) * 0.3;
      EXPECT_LT(largest_difference(dots.slice(1, 0, tokens), expected.slice(1, 0, tokens)), 1e-4);
      EXPECT_TRUE((dots.slice(1, tokens) == 7.0f).all().item<bool>());
      // A token's dot must not depend on how many tokens its page has.
      at::Tensor full = at::empty({heads, 16});
      kernels.dots(query.const_data_ptr<float>(), heads, page.const_data_ptr<float>(), 16, stride, 0.3f,
                   full.mutable_data_ptr<float>());
      EXPECT_TRUE(at::equal(full.slice(1, 0, tokens), dots.slice(1, 0, tokens)));
      const at::Tensor weights = at::rand({heads, 16});
      const at::Tensor summed = sums.to(at::kDouble) + at::matmul(weights.to(at::kDouble).slice(1, 0, tokens),
                                                                  page.to(at::kDouble).slice(0, 0, tokens));
      kernels.accumulate(weights.const_data_ptr<float>(), heads, page.const_data_ptr<float>(), tokens, stride,
                         sums.mutable_data_ptr<float>());
      EXPECT_LT(largest_difference(sums, summed), 1e-5);
    }
    const int64_t count = random_int(1, 70);
    at::Tensor x = at::randn({count}) * 20;
    x[count / 2] = -INFINITY;
    if (count > 1) x[0] = 3;
    const float max = x.max().item<float>();
    if (std::isinf(max)) continue;
    const at::Tensor expected = at::exp((x - max).to(at::kDouble));  // what float32 makes of the difference
    const float sum = kernels.exponentials(x.mutable_data_ptr<float>(), count, max);
    EXPECT_LT(((x.to(at::kDouble) - expected).abs() / (expected + 1e-30))
                  .where(expected > 1e-36, 0.0)
                  .max()
                  .item<double>(),
              5e-7);
    EXPECT_NEAR(sum, expected.sum().item<double>(), 1e-5);
    EXPECT_EQ(x[count / 2].item<float>(), 0.0f);
    x[0] = NAN;
    EXPECT_TRUE(std::isnan(kernels.exponentials(x.mutable_data_ptr<float>(), count, 1.0f)));
    const at::Tensor half = at::randn({count}).to(at::kBFloat16);
    at::Tensor wide = at::empty({count});
    kernels.from_bfloat16(reinterpret_cast<const uint16_t*>(half.const_data_ptr()),
                          wide.mutable_data_ptr<float>(), count);
    EXPECT_TRUE(at::equal(wide, half.to(at::kFloat)));
    // Every code, and rows of any length, whose neighbours are left alone.
    const at::Tensor codes = at::cat({at::randperm(256), at::randint(256, {count})}).to(at::kByte);
    wide = at::full({256 + count + 1}, 7.0f);
    kernels.from_e4m3(codes.const_data_ptr<uint8_t>(), wide.mutable_data_ptr<float>(), 256 + count);
    const at::Tensor numbers = codes.view(at::kFloat8_e4m3fn).to(at::kFloat);
    EXPECT_TRUE(at::allclose(wide.slice(0, 0, -1), numbers, 0, 0, /*equal_nan=*/true));
    EXPECT_EQ(wide[-1].item<float>(), 7.0f);
  }
}

// Norm, rotation and storing in one operator, against project_key and against the tensors-only gather.
TEST(SelectorCache, AppendsProjectedKeys) {
  const uint64_t seed = fresh_seed();
  for (KeyNorm norm : {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm})
    for (int64_t rope_dims : {64, 0, 32}) {
      SelectorConfig config;
      config.key_heads = random_int(0, 1) ? 4 : 1;
      config.key_norm = norm;
      config.rope_dims = rope_dims;
      const ModelConfig model = small_model(20, 2, 4, 2, 16);
      const Selector selector(config, model, at::kCPU, at::kFloat, seed);
      for (const auto& [name, tensor] : selector.named_parameters())
        if (name.find("norm") != std::string::npos) at::Tensor(tensor).add_(at::randn_like(tensor), 0.3);
      PagePools pools(5, 16, at::kCPU);
      SelectorCache cache(config, {0, 1}, pools, KeyFormat::f32);
      const at::Tensor hidden = at::randn({40, 20}), positions = at::randint(0, 3000, {40}, at::kLong);
      selector.append_keys(1, hidden, positions, at::arange(16, 56, at::kLong), cache);
      const at::Tensor pages = at::tensor({1, 2, 3}, at::kInt);
      EXPECT_LT(largest_difference(cache.gather(1, pages, 40), selector.project_key(1, hidden, positions)),
                1e-4);
      // bfloat16 hidden states: stored without the rounding that project_key ends with.
      selector.append_keys(0, hidden.to(at::kBFloat16), positions, at::arange(40, at::kLong), cache);
      EXPECT_LT(largest_difference(cache.gather(0, at::arange(3, at::kInt), 40),
                                   selector.project_key(0, hidden.to(at::kBFloat16), positions)),
                0.05);
      if (rope_dims != 0) {
        EXPECT_ANY_THROW(
            selector.append_keys(0, hidden, positions + 100000, at::arange(40, at::kLong), cache));
      }
    }
}

// What devices without a kernel of ours run.
namespace spot::ops::aten {
decltype(ops::selector_key_gather) selector_key_gather;
}

TEST(SelectorCache, GathersTheSameBitsWithTorchOperators) {
  fresh_seed();
  for (KeyFormat format : kFormats)
    for (int64_t key_heads : {1, 4}) {
      at::Tensor pool = at::zeros({7, key_heads, kernels::page_head_bytes(format)}, at::kByte);
      const int64_t length = random_int(1, 80);
      const at::Tensor pages = at::randperm(7, at::kInt).slice(0, 0, 5),
                       position = at::arange(length, at::kLong);
      const at::Tensor slots = pages.to(at::kLong).index_select(0, at::div(position, 16, "floor")) * 16 +
                               at::remainder(position, 16);
      ops::selector_key_append({pool, slots, at::randn({length, key_heads, 128}) * 3, format, 0.0625});
      const at::Tensor expected = ops::selector_key_gather({pool, pages, length, format, 0.0625});
      const at::Tensor got = ops::aten::selector_key_gather({pool, pages, length, format, 0.0625});
      EXPECT_TRUE(at::equal(got, expected)) << to_string(format);
    }
}
