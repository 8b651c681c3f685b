// narrow_linear and decode_blocks against float64 on the host, on the GPU or emulated.
#include <limits>

#include "kernels/decode_blocks.h"
#include "kernels/narrow_linear.h"
#include "tests/kernels/device.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::Random;
using testing::Typed;

float e4m3_number(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                   : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return code & 0x80 ? -size : size;
}

// W as the device has it, and its numbers.
struct Matrix {
  std::vector<uint8_t> bytes;
  std::vector<float> values, scales;
  Matrix(Random& random, DataType type, bool e4m3, int32_t out, int32_t width) {
    if (!e4m3) {
      const Typed typed(type, testing::normal(random, static_cast<size_t>(out) * width));
      bytes = typed.bytes, values = typed.values;
      return;
    }
    const int32_t across = (width + kScaleBlock - 1) / kScaleBlock,
                  down = (out + kScaleBlock - 1) / kScaleBlock;
    for (int32_t i = 0; i < across * down; ++i)
      scales.push_back(std::exp2(static_cast<float>(random() % 60) / 10 - 15));
    for (int32_t row = 0; row < out; ++row)
      for (int32_t column = 0; column < width; ++column) {
        uint8_t code = static_cast<uint8_t>(random());  // every number that there is
        if ((code & 0x7f) == 0x7f) code ^= 1;
        bytes.push_back(code);
        values.push_back(e4m3_number(code) * scales[row / kScaleBlock * across + column / kScaleBlock]);
      }
  }
};

struct Case {
  DataType type;
  bool e4m3, bias, accumulate;
  int32_t rows, out, width;
};

std::vector<uint8_t> run(const Case& c, const Buffer<uint8_t>& x, int64_t x_stride,
                         const Buffer<uint8_t>& weight, const Buffer<float>& scales,
                         const Buffer<uint8_t>& bias, Buffer<uint8_t>& y, int64_t y_stride, Overlap overlap) {
  NarrowLinearParams p;
  p.type = c.type;
  p.e4m3 = c.e4m3;
  p.num_rows = c.rows;
  p.width = c.width;
  p.out = c.out;
  p.x = x.data();
  p.x_stride = x_stride;
  p.weight = weight.data();
  p.scales = c.e4m3 ? scales.data() : nullptr;
  p.bias = c.bias ? bias.data() : nullptr;
  p.y = y.data();
  p.y_stride = y_stride;
  p.accumulate = c.accumulate;
  p.overlap = overlap;
  check(narrow_linear(p, nullptr));
  return y.download();
}

void expect_matches_float64(Random& random, const Case& c) {
  const int64_t x_stride = (c.width + 7) / 8 * 8 + 8 * (random() % 3), y_stride = c.out + random() % 3;
  const Typed x(c.type, testing::normal(random, c.rows * x_stride)),
      bias(c.type, testing::normal(random, c.out)),
      before(c.type, testing::normal(random, c.rows * y_stride, 20.0f));
  const Matrix w(random, c.type, c.e4m3, c.out, c.width);
  const Buffer<uint8_t> device_x(x.bytes), weight(w.bytes), device_bias(bias.bytes);
  const Buffer<float> scales(w.scales);
  Buffer<uint8_t> y(before.bytes);
  const auto overlap = static_cast<Overlap>(random() % 3);
  const std::vector<uint8_t> bytes =
      run(c, device_x, x_stride, weight, scales, device_bias, y, y_stride, overlap);
  std::vector<uint16_t> bits(bytes.size() / 2);
  std::memcpy(bits.data(), bytes.data(), bytes.size());
  const std::vector<double> out = testing::to_double(c.type, bits);
  const std::string what = "rows " + std::to_string(c.rows) + " out " + std::to_string(c.out) + " width " +
                           std::to_string(c.width) + (c.e4m3 ? " codes" : "");
  for (int32_t row = 0; row < c.rows; ++row) {
    for (int64_t column = 0; column < y_stride; ++column) {
      const int64_t at = row * y_stride + column;
      if (column >= c.out) {
        ASSERT_EQ(out[at], before.values[at]) << what << ": written beside y";
        continue;
      }
      double sum = (c.bias ? bias.values[column] : 0.0) + (c.accumulate ? before.values[at] : 0.0), size = 0;
      for (int32_t k = 0; k < c.width; ++k) {
        const double product = double{x.values[row * x_stride + k]} * w.values[column * c.width + k];
        sum += product, size += std::abs(product);
      }
      // Half a place of y, relative and where its numbers are subnormal, and the sums in float32.
      const double half_place = c.type == DataType::kBf16 ? 0x1p-8 : 0x1p-11;
      const double smallest = c.type == DataType::kBf16 ? 0x1p-134 : 0x1p-25;
      ASSERT_NEAR(out[at], sum, half_place * std::abs(sum) + smallest + 3e-6 * size)
          << what << " at " << row << ", " << column;
    }
  }
  // Each row alone, and again, bit for bit.
  const size_t row_bytes = y_stride * 2;
  for (int32_t row = 0; row < c.rows; row += 1 + static_cast<int32_t>(random() % 5)) {
    Case alone = c;
    alone.rows = 1;
    const std::vector<uint8_t> own_x(x.bytes.begin() + row * x_stride * 2,
                                     x.bytes.begin() + (row + 1) * x_stride * 2),
        own_y(before.bytes.begin() + row * row_bytes, before.bytes.begin() + (row + 1) * row_bytes);
    const Buffer<uint8_t> one_x(own_x);
    Buffer<uint8_t> one_y(own_y);
    const std::vector<uint8_t> got =
        run(alone, one_x, x_stride, weight, scales, device_bias, one_y, y_stride, overlap);
    ASSERT_EQ(std::memcmp(got.data(), bytes.data() + row * row_bytes, row_bytes), 0)
        << what << ": row " << row << " alone";
  }
}

TEST(NarrowLinear, MatchesFloat64AndIgnoresOtherRows) {
  Random random(testing::fresh_seed());
  for (DataType type : {DataType::kBf16, DataType::kF16})
    for (bool e4m3 : {false, true})
      for (int32_t rows : {1, 3, 8, 9, 16, 17, 32})
        for (int32_t width : {16, 144, 1024, 1184}) {
          const int32_t out = 1 + static_cast<int32_t>(random() % (testing::kEmulated ? 60 : 5000));
          expect_matches_float64(random,
                                 {type, e4m3, random() % 2 == 0, random() % 2 == 0, rows, out, width});
        }
}

TEST(NarrowLinear, MatchesFloat64AtModelSizes) {
  Random random(testing::fresh_seed());
  for (bool e4m3 : {false, true}) {
    expect_matches_float64(random, {DataType::kBf16, e4m3, false, true, 1, testing::kEmulated ? 130 : 4096,
                                    testing::kEmulated ? 2304 : 12288});
    expect_matches_float64(random,
                           {DataType::kBf16, e4m3, false, false, 4, testing::kEmulated ? 300 : 24576, 4096});
  }
}

TEST(NarrowLinear, TakesEveryNumberOfRows) {
  Random random(testing::fresh_seed());
  for (int32_t rows = 1; rows <= kNarrowRows; ++rows)
    for (bool e4m3 : {false, true}) {
      const DataType type = random() % 2 == 0 ? DataType::kBf16 : DataType::kF16;
      const int32_t out = 1 + static_cast<int32_t>(random() % (testing::kEmulated ? 80 : 3000)),
                    width = (e4m3 ? 16 : 8) * (1 + static_cast<int32_t>(random() % 160));
      expect_matches_float64(random, {type, e4m3, random() % 2 == 0, random() % 2 == 0, rows, out, width});
    }
}

// y of x of one row, as float32.
std::vector<double> multiply(DataType type, const std::vector<float>& x, const std::vector<uint8_t>& weight,
                             const std::vector<float>& scales, int32_t out) {
  const Typed typed(type, x);
  const Buffer<uint8_t> device_x(typed.bytes), device_weight(weight), bias(16);
  const Buffer<float> device_scales(scales.empty() ? std::vector<float>(1) : scales);
  Buffer<uint8_t> y(std::vector<uint8_t>(out * 2, 0xff));
  const auto width = static_cast<int32_t>(x.size());
  const std::vector<uint8_t> bytes = run({type, !scales.empty(), false, false, 1, out, width}, device_x,
                                         width, device_weight, device_scales, bias, y, out, Overlap::kNone);
  std::vector<uint16_t> bits(out);
  std::memcpy(bits.data(), bytes.data(), bytes.size());
  return testing::to_double(type, bits);
}

TEST(NarrowLinear, EveryCodeIsItsNumber) {
  Random random(testing::fresh_seed());
  for (DataType type : {DataType::kBf16, DataType::kF16})
    for (int32_t width : {16, 80, 1232}) {
      std::vector<uint8_t> codes;  // row r: code r everywhere
      for (int32_t row = 0; row < 256; ++row) codes.insert(codes.end(), width, static_cast<uint8_t>(row));
      const std::vector<float> scales(2 * ((width + kScaleBlock - 1) / kScaleBlock), 0.25f);
      std::vector<float> x(width);
      x[random() % width] = -2.0f;
      const std::vector<double> y = multiply(type, x, codes, scales, 256);
      for (int32_t row = 0; row < 256; ++row) {
        if ((row & 0x7f) == 0x7f)
          EXPECT_TRUE(std::isnan(y[row])) << row;
        else
          EXPECT_EQ(y[row], -0.5 * static_cast<double>(e4m3_number(static_cast<uint8_t>(row)))) << row;
      }
    }
}

TEST(NarrowLinear, KeepsWhatIsNotFinite) {
  Random random(testing::fresh_seed());
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr int32_t kOut = 40;
  for (DataType type : {DataType::kBf16, DataType::kF16})
    for (int32_t width : {16, 528, 1104}) {
      const auto scales = static_cast<size_t>((width + kScaleBlock - 1) / kScaleBlock);
      std::vector<uint8_t> ones(kOut * width, 0x38);  // 1 each
      const auto nan_row = static_cast<int32_t>(random() % kOut);
      ones[nan_row * width + random() % width] = random() % 2 == 0 ? 0x7f : 0xff;
      const std::vector<float> x(width, 0.5f);
      std::vector<float> infinite = x, both = x;
      const auto place = static_cast<int32_t>(random() % width);
      infinite[place] = -kInfinity;
      both[place] = kInfinity, both[(place + 5) % width] = -kInfinity;
      const std::vector<double> of_x = multiply(type, x, ones, std::vector<float>(scales, 1.0f), kOut),
                                of_infinite =
                                    multiply(type, infinite, ones, std::vector<float>(scales, 1.0f), kOut),
                                of_both = multiply(type, both, ones, std::vector<float>(scales, 1.0f), kOut);
      std::vector<float> wide(kOut * width, 1.0f);
      wide[nan_row * width + place] = kInfinity;
      const std::vector<double> of_wide = multiply(type, x, Typed(type, wide).bytes, {}, kOut);
      for (int32_t row = 0; row < kOut; ++row) {
        EXPECT_EQ(of_wide[row], row == nan_row ? kInfinity : 0.5f * width);
        EXPECT_TRUE(std::isnan(of_both[row]));
        if (row == nan_row) {
          EXPECT_TRUE(std::isnan(of_x[row]) && std::isnan(of_infinite[row]));
        } else {
          EXPECT_EQ(of_x[row], 0.5f * width);
          EXPECT_EQ(of_infinite[row], -kInfinity);
        }
      }
    }
}

TEST(NarrowLinear, RefusesWhatItDoesNotTake) {
  const Buffer<uint8_t> room(4096);
  NarrowLinearParams p;
  p.num_rows = 1, p.width = 64, p.out = 8, p.x_stride = 64, p.y_stride = 8;
  p.x = p.weight = room.data(), p.y = room.data() + 2048;
  const auto refused = [&](auto change) {
    NarrowLinearParams changed = p;
    change(changed);
    return narrow_linear(changed, nullptr) == cudaErrorInvalidValue;
  };
  check(narrow_linear(p, nullptr));
  EXPECT_TRUE(refused([](auto& c) { c.num_rows = kNarrowRows + 1; }));
  EXPECT_TRUE(refused([](auto& c) { c.width = 60; }));
  EXPECT_TRUE(refused([](auto& c) { c.e4m3 = true; }));
  EXPECT_TRUE(refused([](auto& c) { c.type = DataType::kF32; }));
  EXPECT_TRUE(refused([](auto& c) { c.x = static_cast<const uint8_t*>(c.x) + 2; }));
  EXPECT_TRUE(refused([](auto& c) { c.weight = nullptr; }));
  EXPECT_TRUE(refused([](auto& c) { c.x_stride = 60; }));
}

TEST(DecodeBlocks, RoundsEachNumberOnce) {
  Random random(testing::fresh_seed());
  for (DataType type : {DataType::kBf16, DataType::kF16})
    for (int32_t width : {16, 128, 144, 2064}) {
      const int32_t rows = 1 + static_cast<int32_t>(random() % 300);
      const Matrix w(random, type, true, rows, width);
      const Typed expected(type, w.values);
      const Buffer<uint8_t> codes(w.bytes);
      const Buffer<float> scales(w.scales);
      const Buffer<uint8_t> y(expected.bytes.size());
      DecodeBlocksParams p;
      p.type = type;
      p.rows = rows, p.width = width;
      p.codes = codes.data(), p.scales = scales.data(), p.y = y.data();
      check(decode_blocks(p, nullptr));
      const std::vector<uint8_t> got = y.download();
      for (size_t i = 0; i < got.size(); i += 2) {
        uint16_t a, b;
        std::memcpy(&a, &got[i], 2), std::memcpy(&b, &expected.bytes[i], 2);
        ASSERT_EQ(a & (a & 0x7fff ? 0xffff : 0x7fff), b & (b & 0x7fff ? 0xffff : 0x7fff))
            << "number " << i / 2;
      }
    }
}

}  // namespace
}  // namespace spot::kernels
