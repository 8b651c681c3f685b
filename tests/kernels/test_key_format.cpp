// Number formats, page layout and the host's key preparation against independent definitions.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <set>

#include "kernels/selector_key_math.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

constexpr KeyFormat kFormats[] = {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4,
                                  KeyFormat::nvfp4};

uint32_t seed() {
  const uint32_t s = std::random_device{}();
  std::printf("seed %u\n", s);
  return s;
}

TEST(KeyFormat, SizesAreTheDocumentedOnes) {
  const int bytes[] = {256, 136, 72, 68, 72};
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(key_bytes(kFormats[i]), bytes[i]);
    EXPECT_EQ(page_head_bytes(kFormats[i]) % 64, 0);
    EXPECT_EQ(page_bytes(kFormats[i], 4), 4 * 16 * bytes[i]);
  }
}

TEST(KeyFormat, EveryBitOfAPageBelongsToOneTokenAndDim) {
  for (KeyFormat format : kFormats) {
    std::set<int> taken;
    for (int token = 0; token < 16; ++token) {
      for (int dim = 0; dim < kKeyDim; ++dim) {
        const int offset = code_offset(format, token, dim);
        const int half = code_bits(format) == 4 ? dim % 16 / 8 : 0;
        for (int i = 0; i < std::max(1, code_bits(format) / 8); ++i)
          EXPECT_TRUE(taken.insert(2 * (offset + i) + half).second);
        for (int i = 0; i < code_bits(format) / 8; ++i)
          EXPECT_TRUE(taken.insert(2 * (offset + i) + 1).second);
      }
      for (int group = 0; group < num_groups(format); ++group)
        for (int i = 0; i < 2 * scale_bytes(format); ++i)
          EXPECT_TRUE(taken.insert(2 * scale_offset(format, token, group) + i).second);
    }
    EXPECT_EQ(static_cast<int>(taken.size()), 2 * page_head_bytes(format));
    EXPECT_EQ(*taken.rbegin(), 2 * page_head_bytes(format) - 1);
  }
}

TEST(KeyFormat, PairsUnpackToWhatWasPacked) {
  for (KeyFormat format : {KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4}) {
    std::set<uint32_t> seen;
    for (uint32_t lower = 0; lower < 16; ++lower)
      for (uint32_t upper = 0; upper < 16; ++upper) {
        const uint32_t byte = pack_pair(format, lower, upper);
        EXPECT_LT(byte, 256u);
        EXPECT_EQ(unpack_lower(format, byte), lower);
        EXPECT_EQ(unpack_upper(format, byte), upper);
        seen.insert(byte);
      }
    EXPECT_EQ(seen.size(), 256u);
  }
}

TEST(KeyFormat, SmallFloatsRoundToTheNearestEven) {
  // Every E4M3 and E2M1 value and every midpoint, from the formats' definitions in float64.
  std::vector<double> e4m3, e2m1 = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (int bits = 0; bits < 0x7f; ++bits)
    e4m3.push_back(bits < 8 ? bits * std::ldexp(1.0, -9)
                            : (1 + bits % 8 / 8.0) * std::ldexp(1.0, bits / 8 - 7));
  for (size_t i = 0; i < e4m3.size(); ++i) {
    EXPECT_EQ(e4m3_to_float(i), static_cast<float>(e4m3[i]));
    EXPECT_EQ(float_to_e4m3(static_cast<float>(e4m3[i])), i);
    if (i + 1 < e4m3.size()) {
      const float middle = static_cast<float>((e4m3[i] + e4m3[i + 1]) / 2);
      EXPECT_EQ(float_to_e4m3(middle), i % 2 == 0 ? i : i + 1);
      EXPECT_EQ(float_to_e4m3(std::nextafter(middle, 0.0f)), i);
      EXPECT_EQ(float_to_e4m3(std::nextafter(middle, 1e9f)), i + 1);
    }
  }
  EXPECT_EQ(float_to_e4m3(1e30f), 0x7eu);
  for (size_t i = 0; i < e2m1.size(); ++i) {
    EXPECT_EQ(decode_value(KeyFormat::mxfp4, static_cast<uint32_t>(i)), static_cast<float>(e2m1[i]));
    EXPECT_EQ(decode_value(KeyFormat::mxfp4, static_cast<uint32_t>(i) + 8), -static_cast<float>(e2m1[i]));
    if (i + 1 < e2m1.size()) {
      const float middle = static_cast<float>((e2m1[i] + e2m1[i + 1]) / 2);
      EXPECT_EQ(e2m1_magnitude(middle), i % 2 == 0 ? i : i + 1);
      EXPECT_EQ(e2m1_magnitude(std::nextafter(middle, 0.0f)), i);
      EXPECT_EQ(e2m1_magnitude(std::nextafter(middle, 1e9f)), i + 1);
    }
  }
  EXPECT_EQ(e2m1_magnitude(100.0f), 7u);
}

TEST(KeyFormat, ErrorIsAtMostHalfAStepOfTheGroup) {
  std::mt19937 random(seed());
  for (KeyFormat format : kFormats) {
    std::vector<uint8_t> page(page_head_bytes(format), 0xee);
    std::vector<std::vector<float>> keys;
    const float global_scale = format == KeyFormat::nvfp4 ? 0.037f : 1.0f;
    std::vector<int> order = {3, 15, 0, 8, 7, 1, 2, 4, 5, 6, 14, 13, 12, 11, 10, 9};
    for (int token = 0; token < 16; ++token)
      keys.push_back(testing::normal(random, kKeyDim, std::ldexp(1.0f, static_cast<int>(random() % 8) - 4)));
    for (int token : order) encode_key(format, keys[token].data(), token, page.data(), global_scale);
    for (int token = 0; token < 16; ++token) {
      float decoded[kKeyDim];
      decode_key(format, page.data(), token, decoded, global_scale);
      for (int dim = 0; dim < kKeyDim; ++dim) {
        const float x = keys[token][dim];
        if (format == KeyFormat::bf16) {
          EXPECT_LE(std::fabs(decoded[dim] - x), std::fabs(x) / 256);
          continue;
        }
        const int group = dim / group_size(format);
        float largest = 0;
        for (int i = 0; i < group_size(format); ++i)
          largest = std::max(largest, std::fabs(keys[token][group * group_size(format) + i]));
        // Integers: half a step. E2M1: a step near the top is a third of the largest; scales round by up to
        // 1/16 (E4M3), 2 (a power of two).
        const float bound = format == KeyFormat::int8    ? largest / 127 * 0.51f
                            : format == KeyFormat::int4  ? largest / 7 * 0.52f
                            : format == KeyFormat::mxfp4 ? largest / 3 * 1.001f
                                                         : largest / 6 * 1.2f;
        EXPECT_LE(std::fabs(decoded[dim] - x), bound) << static_cast<int>(format) << " dim " << dim;
      }
    }
  }
}

TEST(KeyFormat, ZerosAndNonFiniteNumbers) {
  for (KeyFormat format : kFormats) {
    std::vector<uint8_t> page(page_head_bytes(format));
    float key[kKeyDim] = {}, decoded[kKeyDim];
    encode_key(format, key, 5, page.data());
    decode_key(format, page.data(), 5, decoded);
    for (float x : decoded) EXPECT_EQ(x, 0.0f);
    if (format == KeyFormat::bf16) continue;
    key[3] = std::nanf(""), key[40] = 2.0f;
    encode_key(format, key, 5, page.data());
    decode_key(format, page.data(), 5, decoded);
    EXPECT_EQ(decoded[3], 0.0f);
    EXPECT_NEAR(decoded[40], 2.0f, 0.1f);
    key[100] = -INFINITY;
    encode_key(format, key, 5, page.data());
    decode_key(format, page.data(), 5, decoded);
    EXPECT_LT(decoded[100], -100.0f);
    EXPECT_NEAR(decoded[40], 2.0f, 0.1f);
  }
}

TEST(SelectorKey, MatchesItsFormulaInFloat64) {
  std::mt19937 random(seed());
  for (KeyNorm norm : {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm}) {
    std::vector<float> x = testing::normal(random, kKeyDim, 3.0f), weight = testing::normal(random, kKeyDim),
                       bias = testing::normal(random, kKeyDim),
                       angle = testing::normal(random, kRotaryPairs, 5.0f);
    for (float& v : x) v += 1.5f;
    float cos[kRotaryPairs], sin[kRotaryPairs], y[kKeyDim];
    for (int i = 0; i < kRotaryPairs; ++i) cos[i] = std::cos(angle[i]), sin[i] = std::sin(angle[i]);
    prepare_selector_key(x.data(), norm, weight.data(), bias.data(), 1e-6f, cos, sin, y);
    std::vector<double> expected(x.begin(), x.end());
    if (norm != KeyNorm::none) {
      double mean = 0, square = 0;
      if (norm == KeyNorm::layernorm) {
        for (double v : expected) mean += v / kKeyDim;
      }
      for (double& v : expected) v -= mean, square += v * v / kKeyDim;
      for (int i = 0; i < kKeyDim; ++i)
        expected[i] = expected[i] / std::sqrt(square + 1e-6) * static_cast<double>(weight[i]) +
                      static_cast<double>(bias[i]);
    }
    for (int i = 0; i < kRotaryPairs; ++i) {
      const double a = expected[i], b = expected[i + 32], c = cos[i], s = sin[i];
      expected[i] = a * c - b * s;
      expected[i + 32] = b * c + a * s;
    }
    EXPECT_LT(testing::relative_error(std::vector<double>(y, y + kKeyDim), expected), 3e-7);
  }
}

}  // namespace
}  // namespace spot::kernels
