// rms_norm, gated_product, rotate_heads and attention_prologue against float64 on the host, on the GPU or
// emulated.
#include "kernels/attention_prologue.h"
#include "kernels/gated_product.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate_heads.h"
#include "tests/kernels/device.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::Random;
using testing::Typed;

constexpr DataType kTypes[] = {DataType::kBf16, DataType::kF16, DataType::kF32};

int64_t bytes_of(DataType type) {
  return type == DataType::kF32 ? 4 : 2;
}
// Numbers as they came out of device memory.
std::vector<double> numbers(DataType type, const std::vector<uint8_t>& bytes) {
  if (type != DataType::kF32) {
    std::vector<uint16_t> bits(bytes.size() / 2);
    std::memcpy(bits.data(), bytes.data(), bytes.size());
    return testing::to_double(type, bits);
  }
  std::vector<float> values(bytes.size() / 4);
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return {values.begin(), values.end()};
}
// Half a unit in the last place, relative.
double rounding(DataType type) {
  return type == DataType::kBf16 ? 0x1p-8 : type == DataType::kF16 ? 0x1p-11 : 0;
}
void expect_close(const std::vector<double>& out, const std::vector<double>& reference, double relative,
                  const std::string& what) {
  ASSERT_EQ(out.size(), reference.size()) << what;
  for (size_t i = 0; i < out.size(); ++i) {
    // Besides the roundings to the type, a little for float32 arithmetic.
    const double allowed = 1.01 * relative * std::abs(reference[i]) + 2e-6 * (std::abs(reference[i]) + 0.5);
    ASSERT_NEAR(out[i], reference[i], allowed) << what << " at " << i;
  }
}

TEST(RmsNorm, MatchesFloat64AndIgnoresOtherRows) {
  Random random(testing::fresh_seed());
  for (DataType type : kTypes)
    for (DataType factor_type : {type, DataType::kF32})
      for (int32_t width : {1, 37, 40, 64, 1000, 4096, 4104, 12288}) {
        const int64_t rows = 3, stride = width + (random() % 2 ? 8 : random() % 5);
        const float epsilon = 1e-6f;
        const Typed x(type, testing::normal(random, rows * stride, 2.0f)),
            factor(factor_type, testing::normal(random, width));
        Buffer<uint8_t> device_x(x.bytes), device_factor(factor.bytes),
            y(static_cast<size_t>(rows * width * bytes_of(type)));
        RmsNormParams p;
        p.type = type;
        p.num_rows = rows;
        p.width = width;
        p.x = device_x.data();
        p.x_stride = stride;
        p.factor = device_factor.data();
        p.factor_type = factor_type;
        p.epsilon = epsilon;
        p.y = y.data();
        p.overlap = random() % 2 ? Overlap::kLaunch : Overlap::kNone;
        check(rms_norm(p, nullptr));
        const std::vector<uint8_t> first = y.download();
        std::vector<double> reference;
        for (int64_t row = 0; row < rows; ++row) {
          double sum = 0;
          for (int32_t i = 0; i < width; ++i) sum += std::pow(double{x.values[row * stride + i]}, 2);
          for (int32_t i = 0; i < width; ++i)
            reference.push_back(x.values[row * stride + i] / std::sqrt(sum / width + double{epsilon}) *
                                factor.values[i]);
        }
        const std::string what = "width " + std::to_string(width) + " type " +
                                 std::to_string(static_cast<int>(type)) + " factor " +
                                 std::to_string(static_cast<int>(factor_type));
        expect_close(numbers(type, first), reference, rounding(type), what);
        // A row alone, and again.
        Buffer<uint8_t> alone(static_cast<size_t>(width * bytes_of(type)));
        p.num_rows = 1;
        p.x = device_x.data() + stride * bytes_of(type);
        p.y = alone.data();
        check(rms_norm(p, nullptr));
        const std::vector<uint8_t> row = alone.download();
        EXPECT_EQ(std::memcmp(row.data(), first.data() + row.size(), row.size()), 0) << what;
      }
}

TEST(GatedProduct, MatchesTwoRoundedOperators) {
  Random random(testing::fresh_seed());
  for (DataType type : kTypes)
    for (Activation activation : {Activation::kSilu, Activation::kSigmoid})
      for (int32_t width : {1, 7, 64, 128, 264}) {
        const int64_t rows = 5;
        const int32_t heads = 1 + static_cast<int32_t>(random() % 3);
        // gate and x side by side, head by head, as projections of both leave them.
        const int64_t head_stride = 2 * width, row_stride = heads * head_stride + (random() % 2 ? 8 : 3);
        const Typed both(type, testing::normal(random, rows * row_stride, 3.0f));
        Buffer<uint8_t> device(both.bytes), y(static_cast<size_t>(rows * heads * width * bytes_of(type)));
        GatedProductParams p;
        p.type = type;
        p.activation = activation;
        p.num_rows = rows;
        p.num_heads = heads;
        p.width = width;
        p.gate = device.data();
        p.x = device.data() + width * bytes_of(type);
        p.gate_row_stride = p.x_row_stride = row_stride;
        p.gate_head_stride = p.x_head_stride = head_stride;
        p.y = y.data();
        check(gated_product(p, nullptr));
        std::vector<double> reference;
        for (int64_t row = 0; row < rows; ++row)
          for (int32_t head = 0; head < heads; ++head)
            for (int32_t i = 0; i < width; ++i) {
              const int64_t at = row * row_stride + head * head_stride + i;
              const double gate = both.values[at];
              const double sigmoid = 1 / (1 + std::exp(-gate));
              reference.push_back((activation == Activation::kSilu ? gate * sigmoid : sigmoid) *
                                  both.values[at + width]);
            }
        expect_close(numbers(type, y.download()), reference, 2 * rounding(type),
                     "width " + std::to_string(width) + " type " + std::to_string(static_cast<int>(type)));
      }
}

struct PrologueCase {
  DataType type;
  int32_t heads, kv_heads, dim, pairs;
  bool norm, gated, stored;
  int selector_key_heads;  // 0: no selector
  KeyNorm key_norm = KeyNorm::layernorm;
  KeyFormat format = KeyFormat::int4;
  bool selector_turns = true;
  bool e4m3 = false;  // pools of codes
};

// The E4M3 code of x: the nearest of the 127 magnitudes, the even one of two, NaN for NaN.
uint8_t code_of(double x) {
  if (std::isnan(x)) return 0x7f;
  int best = 0;
  double least = std::abs(x);
  for (int code = 1; code < 0x7f; ++code) {
    const double number = std::ldexp(code < 8 ? code : 8 + code % 8, std::max(code / 8, 1) - 10),
                 distance = std::abs(std::abs(x) - number);
    if (distance < least || (distance == least && code % 2 == 0)) best = code, least = distance;
  }
  return static_cast<uint8_t>(best | (std::signbit(x) ? 0x80 : 0));
}

// Inputs of some tokens, the call, and the outputs.
class Prologue {
 public:
  Prologue(Random& random, const PrologueCase& c, int64_t tokens)
      : c_(c),
        tokens_(tokens),
        query_stride_((c.gated ? 2 : 1) * c.dim),
        key_offset_(c.heads * query_stride_),
        value_offset_(key_offset_ + c.kv_heads * c.dim),
        selector_offset_(value_offset_ + c.kv_heads * c.dim),
        stride_(selector_offset_ + (4 + c.selector_key_heads) * kKeyDim +
                2 * static_cast<int64_t>(random() % 5)),
        hidden_size_(2 * (1 + random() % 600)),
        hidden_stride_(hidden_size_ + 2 * static_cast<int64_t>(random() % 3)),
        mix_rows_(4 * (1 + random() % 2)),
        projected_(c.type, testing::normal(random, tokens * stride_, 2.0f)),
        hidden_(c.type, testing::normal(random, tokens * hidden_stride_)),
        qk_norm_(testing::normal(random, (c.heads + c.kv_heads) * c.dim)),
        cos_(testing::normal(random, kPositions * c.pairs, 0.7f)),
        sin_(testing::normal(random, kPositions * c.pairs, 0.7f)),
        selector_cos_(testing::normal(random, kPositions * kRotaryPairs, 0.7f)),
        selector_sin_(testing::normal(random, kPositions * kRotaryPairs, 0.7f)),
        key_weight_(testing::normal(random, kKeyDim)),
        key_bias_(testing::normal(random, kKeyDim)),
        mix_(testing::normal(random, mix_rows_ * hidden_size_, 0.1f)),
        key_scales_(testing::normal(random, c.kv_heads)),
        value_scales_(testing::normal(random, c.kv_heads)),
        with_scales_(random() % 4 != 0),
        positions_(tokens),
        slots_(kPages * kPageTokens) {
    // Powers of two and others, some so small that numbers saturate, some so large that they are subnormal.
    for (auto* scales : {&key_scales_, &value_scales_})
      for (float& scale : *scales)
        scale = std::ldexp(random() % 2 ? 1.0f : 1 + std::abs(scale), static_cast<int>(random() % 16) - 9);
    for (int64_t& p : positions_) p = random() % kPositions;
    std::iota(slots_.begin(), slots_.end(), 0);
    std::shuffle(slots_.begin(), slots_.end(), random);
    slots_.resize(tokens);
    if (tokens > 2) slots_[1] = -1;
    // Pools by heads; by pages with the heads inside; keys and values in turn, with gaps.
    const int64_t dim = c.dim, inside = c.kv_heads * dim;
    switch (random() % 3) {
      case 0:
        pool_ = {kPages * kPageTokens * dim, kPageTokens * dim, dim};
        break;
      case 1:
        pool_ = {dim, kPageTokens * inside, inside};
        break;
      default:
        pool_ = {dim, 2 * kPageTokens * (inside + 6) + 10, inside + 6};
    }
  }

  struct Outputs {
    std::vector<uint8_t> query, key, value, key_pool, value_pool, selector_query, selector_pool;
    std::vector<float> weight;
    bool operator==(const Outputs&) const = default;
  };

  // Runs tokens first .. first + count - 1; `alone`: the selector's share of them.
  Outputs run(int64_t first, int64_t count, Overlap overlap, bool alone = false) const {
    const int64_t size = bytes_of(c_.type);
    const auto bytes = [&](int64_t n) { return static_cast<size_t>(n * size); };
    Buffer<uint8_t> projected(projected_.bytes), hidden(hidden_.bytes),
        query(bytes(count * c_.heads * c_.dim)), key(bytes(count * c_.kv_heads * c_.dim)),
        value(bytes(count * c_.kv_heads * c_.dim)), key_pool(pool_size() * stored_bytes()),
        value_pool(pool_size() * stored_bytes()), selector_query(bytes(count * 4 * kKeyDim)),
        selector_pool(
            static_cast<size_t>(kPages * page_bytes(c_.format, std::max(1, c_.selector_key_heads))));
    Buffer<float> qk_norm(qk_norm_), cos(cos_), sin(sin_), selector_cos(selector_cos_),
        selector_sin(selector_sin_), key_weight(key_weight_), key_bias(key_bias_), mix(mix_),
        key_scales(key_scales_), value_scales(value_scales_), weight(count * mix_rows_);
    Buffer<int64_t> positions(positions_), slots(slots_);
    AttentionPrologueParams p;
    p.type = c_.type;
    p.num_tokens = count;
    if (!alone) {
      p.num_heads = c_.heads;
      p.num_kv_heads = c_.kv_heads;
      p.head_dim = c_.dim;
      p.projected = projected.data() + first * stride_ * size;
      p.token_stride = stride_;
      p.query_head_stride = query_stride_;
      p.key_offset = key_offset_;
      p.value_offset = value_offset_;
      p.qk_norm = c_.norm ? qk_norm.data() : nullptr;
      p.norm_epsilon = 1e-6f;
      p.rope_cos = cos.data();
      p.rope_sin = sin.data();
      p.rotary_pairs = c_.pairs;
      p.positions = positions.data() + first;
      p.query = query.data();
      p.key = key.data();
      p.value = value.data();
      p.key_pool = c_.stored ? key_pool.data() : nullptr;
      p.value_pool = c_.stored ? value_pool.data() : nullptr;
      p.e4m3 = c_.e4m3;
      p.key_scales = c_.e4m3 && with_scales_ ? key_scales.data() : nullptr;
      p.value_scales = c_.e4m3 && with_scales_ ? value_scales.data() : nullptr;
      p.pool_head_stride = pool_.head;
      p.pool_page_stride = pool_.page;
      p.pool_token_stride = pool_.token;
      p.slots = slots.data() + first;
    }
    if (c_.selector_key_heads > 0) {
      p.selector_queries = projected.data() + (first * stride_ + selector_offset_) * size;
      p.selector_token_stride = stride_;
      p.selector_query = selector_query.data();
      SelectorKeyAppendParams& keys = p.selector_keys;
      keys.format = c_.format;
      keys.key_heads = c_.selector_key_heads;
      keys.num_tokens = count;
      keys.keys = projected.data() + (first * stride_ + selector_offset_ + 4 * kKeyDim) * size;
      keys.key_type = c_.type;
      keys.token_stride = stride_;
      keys.norm = c_.key_norm;
      keys.norm_weight = key_weight.data();
      keys.norm_bias = key_bias.data();
      keys.rope_cos = c_.selector_turns ? selector_cos.data() : nullptr;
      keys.rope_sin = selector_sin.data();
      keys.positions = positions.data() + first;
      keys.slots = slots.data() + first;
      keys.pages = selector_pool.data();
      keys.global_scale = kGlobalScale;
      p.hidden = hidden.data() + first * hidden_stride_ * size;
      p.hidden_stride = hidden_stride_;
      p.hidden_size = hidden_size_;
      p.mix = mix.data();
      p.mix_rows = mix_rows_;
      p.mix_scale = 0.25f;
      p.selector_weight = weight.data();
    }
    p.overlap = overlap;
    check(attention_prologue(p, nullptr));
    return {query.download(),         key.download(),        value.download(),
            key_pool.download(),      value_pool.download(), selector_query.download(),
            selector_pool.download(), weight.download()};
  }

  void compare(const Outputs& out, const std::string& what) const {
    std::vector<double> query, key, value;
    for (int64_t t = 0; t < tokens_; ++t) {
      const float* row = projected_.values.data() + t * stride_;
      const float *c = cos_.data() + positions_[t] * c_.pairs, *s = sin_.data() + positions_[t] * c_.pairs;
      for (int32_t h = 0; h < c_.heads; ++h)
        head(row + h * query_stride_, c_.dim, c_.norm ? qk_norm_.data() + h * c_.dim : nullptr, c, s,
             c_.pairs, query);
      for (int32_t h = 0; h < c_.kv_heads; ++h) {
        head(row + key_offset_ + h * c_.dim, c_.dim,
             c_.norm ? qk_norm_.data() + (c_.heads + h) * c_.dim : nullptr, c, s, c_.pairs, key);
        head(row + value_offset_ + h * c_.dim, c_.dim, nullptr, nullptr, nullptr, 0, value);
      }
    }
    const double once = rounding(c_.type);
    expect_close(numbers(c_.type, out.query), query, once, what + " query");
    expect_close(numbers(c_.type, out.key), key, once, what + " key");
    expect_close(numbers(c_.type, out.value), value, 0, what + " value");
    expect_stored(out.key_pool, out.key, key_scales_, what + " stored key");
    expect_stored(out.value_pool, out.value, value_scales_, what + " stored value");
    if (c_.selector_key_heads > 0) compare_selector(out, what);
  }

 private:
  static constexpr int64_t kPositions = 300, kPages = 4;
  static constexpr float kGlobalScale = 0.0625f;

  struct PoolStrides {
    int64_t head, page, token;
  };
  int64_t pool_at(int64_t head, int64_t slot) const {
    return head * pool_.head + slot / kPageTokens * pool_.page + slot % kPageTokens * pool_.token;
  }
  int64_t pool_size() const { return pool_at(c_.kv_heads - 1, kPages * kPageTokens - 1) + c_.dim; }

  static void head(const float* x, int32_t dim, const float* norm, const float* cos, const float* sin,
                   int32_t pairs, std::vector<double>& out) {
    std::vector<double> y(x, x + dim);
    if (norm != nullptr) {
      double sum = 0;
      for (double v : y) sum += v * v;
      for (int32_t i = 0; i < dim; ++i) y[i] *= norm[i] / std::sqrt(sum / dim + 1e-6);
    }
    for (int32_t i = 0; i < pairs; ++i) {
      const double a = y[i], b = y[i + pairs];
      y[i] = a * cos[i] - b * sin[i];
      y[i + pairs] = b * cos[i] + a * sin[i];
    }
    out.insert(out.end(), y.begin(), y.end());
  }

  int64_t stored_bytes() const { return c_.e4m3 ? 1 : bytes_of(c_.type); }

  // The pool holds the heads' bytes, or the codes of their numbers, at their slots and nothing else has changed.
  void expect_stored(const std::vector<uint8_t>& pool, const std::vector<uint8_t>& heads,
                     const std::vector<float>& scales, const std::string& what) const {
    std::vector<uint8_t> expected(pool.size(), 0xff), rows = heads;
    if (c_.e4m3) {
      rows.clear();
      const std::vector<double> all = numbers(c_.type, heads);
      for (size_t i = 0; i < all.size(); ++i) {
        const float scale = with_scales_ ? scales[i / c_.dim % c_.kv_heads] : 1.0f;
        rows.push_back(code_of(static_cast<float>(all[i]) / scale));
      }
    }
    const int64_t size = stored_bytes(), bytes = c_.dim * size;
    for (int64_t t = 0; t < tokens_ && c_.stored; ++t)
      for (int32_t h = 0; h < c_.kv_heads && slots_[t] >= 0; ++h)
        std::memcpy(expected.data() + pool_at(h, slots_[t]) * size,
                    rows.data() + (t * c_.kv_heads + h) * bytes, bytes);
    EXPECT_EQ(pool, expected) << what;
  }

  void compare_selector(const Outputs& out, const std::string& what) const {
    std::vector<double> query, weight;
    std::vector<uint8_t> pool(out.selector_pool.size(), 0xff);
    for (int64_t t = 0; t < tokens_; ++t) {
      const float* row = projected_.values.data() + t * stride_ + selector_offset_;
      const float *c = selector_cos_.data() + positions_[t] * kRotaryPairs,
                  *s = selector_sin_.data() + positions_[t] * kRotaryPairs;
      for (int h = 0; h < kSelectorHeads; ++h)
        head(row + h * kKeyDim, kKeyDim, nullptr, c, s, c_.selector_turns ? kRotaryPairs : 0, query);
      for (int h = 0; h < c_.selector_key_heads && slots_[t] >= 0; ++h) {
        float prepared[kKeyDim];
        prepare_selector_key(row + (4 + h) * kKeyDim, c_.key_norm, key_weight_.data(), key_bias_.data(),
                             1e-6f, c_.selector_turns ? c : nullptr, s, prepared);
        encode_key(c_.format, prepared, static_cast<int>(slots_[t] % kPageTokens),
                   pool.data() + slots_[t] / kPageTokens * page_bytes(c_.format, c_.selector_key_heads) +
                       h * page_head_bytes(c_.format),
                   kGlobalScale);
      }
      for (int64_t g = 0; g < mix_rows_; ++g) {
        double sum = 0;
        for (int64_t i = 0; i < hidden_size_; ++i)
          sum += double{mix_[g * hidden_size_ + i]} * hidden_.values[t * hidden_stride_ + i];
        weight.push_back(0.25 * sum);
      }
    }
    expect_close(numbers(c_.type, out.selector_query), query, rounding(c_.type), what + " selector query");
    // Float32 sums that may cancel, and only a few of them to take the norm of.
    EXPECT_LT(testing::relative_error({out.weight.begin(), out.weight.end()}, weight), 5e-6) << what;
    EXPECT_EQ(out.selector_pool, pool) << what;
  }

  PrologueCase c_;
  int64_t tokens_, query_stride_, key_offset_, value_offset_, selector_offset_, stride_, hidden_size_,
      hidden_stride_, mix_rows_;
  Typed projected_, hidden_;
  std::vector<float> qk_norm_, cos_, sin_, selector_cos_, selector_sin_, key_weight_, key_bias_, mix_,
      key_scales_, value_scales_;
  bool with_scales_;
  PoolStrides pool_;
  std::vector<int64_t> positions_, slots_;
};

TEST(AttentionPrologue, MatchesFloat64OnEveryLayout) {
  Random random(testing::fresh_seed());
  for (DataType type : kTypes)
    for (int32_t dim : {16, 64, 80, 128, 256, 512})
      for (int32_t group : {1, 3, 16}) {
        PrologueCase c;
        c.type = type;
        c.kv_heads = 1 + static_cast<int32_t>(random() % 3);
        c.heads = c.kv_heads * group;
        c.dim = dim;
        c.pairs = random() % 2 ? dim / 2 : 1 + static_cast<int32_t>(random() % (dim / 2));
        c.norm = random() % 2;
        c.gated = random() % 2;
        c.stored = random() % 3 != 0;
        c.e4m3 = c.stored && random() % 2;
        c.selector_key_heads = 0;
        const int64_t tokens = 1 + static_cast<int64_t>(random() % 7);
        const Prologue prologue(random, c, tokens);
        const auto out = prologue.run(0, tokens, random() % 2 ? Overlap::kLaunch : Overlap::kNone);
        prologue.compare(out, "type " + std::to_string(static_cast<int>(type)) + " dim " +
                                  std::to_string(dim) + " group " + std::to_string(group) + " pairs " +
                                  std::to_string(c.pairs));
      }
}

TEST(AttentionPrologue, TakesTheSelectorAlong) {
  Random random(testing::fresh_seed());
  for (KeyFormat format :
       {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4})
    for (int key_heads : {1, 4})
      for (KeyNorm norm : {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm}) {
        PrologueCase c{kTypes[random() % 3],
                       8,
                       2,
                       128,
                       64,
                       true,
                       false,
                       true,
                       key_heads,
                       norm,
                       format,
                       random() % 4 != 0,
                       random() % 2 != 0};
        const int64_t tokens = 1 + static_cast<int64_t>(random() % 9);
        const Prologue prologue(random, c, tokens);
        const auto out = prologue.run(0, tokens, Overlap::kLaunch);
        const auto alone = prologue.run(0, tokens, Overlap::kLaunch, true);
        EXPECT_EQ(alone.selector_query, out.selector_query);
        EXPECT_EQ(alone.selector_pool, out.selector_pool);
        EXPECT_EQ(alone.weight, out.weight);
        prologue.compare(out, "format " + std::to_string(static_cast<int>(format)) + " key heads " +
                                  std::to_string(key_heads) + " norm " +
                                  std::to_string(static_cast<int>(norm)));
      }
}

TEST(AttentionPrologue, SameBitsAgainAndWithoutCompany) {
  Random random(testing::fresh_seed());
  const PrologueCase c{DataType::kBf16, 6, 3, 64, 16, true, true, true, 1};
  const int64_t tokens = 7, own = 4;
  const Prologue prologue(random, c, tokens);
  const auto all = prologue.run(0, tokens, Overlap::kNone);
  EXPECT_TRUE(prologue.run(0, tokens, Overlap::kLaunch) == all);
  const auto alone = prologue.run(own, 1, Overlap::kNone);
  const auto part = [&](const auto& whole) {
    const size_t size = whole.size() / tokens;
    return std::vector(whole.begin() + own * size, whole.begin() + (own + 1) * size);
  };
  EXPECT_EQ(alone.query, part(all.query));
  EXPECT_EQ(alone.key, part(all.key));
  EXPECT_EQ(alone.value, part(all.value));
  EXPECT_EQ(alone.selector_query, part(all.selector_query));
  EXPECT_EQ(alone.weight, part(all.weight));
}

TEST(RotateHeads, TurnsPairsAndBackAgain) {
  Random random(testing::fresh_seed());
  std::normal_distribution<double> normal;
  for (const DataType type : kTypes)
    for (const bool backwards : {false, true}) {
      const int tokens = 19, heads = 3, dim = 24, half = backwards ? 12 : 8, positions = 40,
                stride = heads * dim + 4;
      std::vector<float> drawn(static_cast<size_t>(tokens) * stride), cos(positions * half),
          sin(positions * half);
      for (float& v : drawn) v = static_cast<float>(normal(random));
      for (size_t i = 0; i < cos.size(); ++i) {
        const double angle = 3 * normal(random);
        cos[i] = static_cast<float>(std::cos(angle));
        sin[i] = static_cast<float>(std::sin(angle));
      }
      std::vector<int64_t> chosen(tokens);
      for (int64_t& p : chosen) p = static_cast<int64_t>(std::abs(normal(random)) * 1000) % positions;
      const Typed x(type, drawn);
      const Buffer<uint8_t> input(x.bytes),
          output(static_cast<size_t>(tokens) * heads * dim * bytes_of(type));
      const Buffer<float> cos_table(cos), sin_table(sin);
      const Buffer<int64_t> position_list(chosen);
      RotateHeadsParams p;
      p.type = type;
      p.num_tokens = tokens;
      p.num_heads = heads;
      p.dim = dim;
      p.half = half;
      p.x = input.data();
      p.x_token_stride = stride;
      p.x_head_stride = dim;
      p.positions = position_list.data();
      p.cos = cos_table.data();
      p.sin = sin_table.data();
      p.backwards = backwards;
      p.y = output.data();
      check(rotate_heads(p, nullptr));
      std::vector<double> want;
      for (int t = 0; t < tokens; ++t)
        for (int h = 0; h < heads; ++h) {
          const float* from = &x.values[static_cast<size_t>(t) * stride + h * dim];
          for (int d = 0; d < dim; ++d) {
            if (d >= 2 * half) {
              want.push_back(from[d]);
              continue;
            }
            const int64_t angle = chosen[t] * half + d % half;
            const double s = (d < half) == backwards ? sin[angle] : -sin[angle];
            want.push_back(static_cast<double>(from[d]) * cos[angle] +
                           from[d < half ? d + half : d - half] * s);
          }
        }
      expect_close(numbers(type, output.download()), want, rounding(type),
                   backwards ? "backwards" : "forwards");
    }
}

TEST(LayerKernels, RejectWhatTheyCannotDo) {
  RmsNormParams norm;
  norm.num_rows = 1;
  norm.width = 8;
  EXPECT_EQ(rms_norm(norm, nullptr), cudaErrorInvalidValue);  // null pointers
  norm.factor_type = DataType::kF16;
  EXPECT_EQ(rms_norm(norm, nullptr), cudaErrorInvalidValue);
  GatedProductParams product;
  product.num_rows = 1;
  product.width = 8;
  EXPECT_EQ(gated_product(product, nullptr), cudaErrorInvalidValue);
  RotateHeadsParams rotation;
  rotation.num_tokens = rotation.num_heads = 1;
  rotation.dim = 8;
  rotation.half = 6;
  EXPECT_EQ(rotate_heads(rotation, nullptr), cudaErrorInvalidValue);
  AttentionPrologueParams prologue;
  prologue.num_tokens = 1;
  prologue.num_heads = prologue.num_kv_heads = 1;
  prologue.head_dim = 64;
  prologue.rotary_pairs = 32;
  EXPECT_EQ(attention_prologue(prologue, nullptr), cudaErrorInvalidValue);  // null pointers
  int64_t position = 0;
  float number[64] = {};
  prologue.projected = number;
  prologue.rope_cos = prologue.rope_sin = number;
  prologue.positions = prologue.slots = &position;
  prologue.query = prologue.key = prologue.value = prologue.key_pool = prologue.value_pool = number;
  prologue.key_scales = number;
  EXPECT_EQ(attention_prologue(prologue, nullptr), cudaErrorInvalidValue);  // scales of numbers
  prologue.rotary_pairs = 33;
  EXPECT_EQ(attention_prologue(prologue, nullptr), cudaErrorInvalidValue);
  prologue.head_dim = 514;
  EXPECT_EQ(attention_prologue(prologue, nullptr), cudaErrorInvalidValue);
  prologue.num_heads = prologue.num_kv_heads = 0;
  EXPECT_EQ(attention_prologue(prologue, nullptr), cudaErrorInvalidValue);  // no selector either
}

}  // namespace
}  // namespace spot::kernels
