// selector_key_append, score_blocks and select_blocks against their references, on the GPU or emulated.
#include "kernels/score_blocks.h"
#include "kernels/select_blocks.h"
#include "kernels/select_reference.h"
#include "kernels/selector_key_append.h"
#include "tests/kernels/device.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::kEmulated;
using testing::KeyPool;
using testing::PageTable;
using testing::Random;
using testing::Typed;

constexpr KeyFormat kFormats[] = {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4,
                                  KeyFormat::nvfp4};
constexpr DataType kTypes[] = {DataType::kBf16, DataType::kF16, DataType::kF32};

TEST(SelectorKeyAppend, EqualsTheHostBitForBit) {
  Random random(testing::fresh_seed());
  for (KeyFormat format : kFormats)
    for (int32_t key_heads : {1, 4})
      for (KeyNorm norm : {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm}) {
        const DataType type = kTypes[random() % 3];
        const int64_t tokens = 37, pages = 5, padding = 6, positions = 1000;
        const int64_t stride = key_heads * kKeyDim + padding;
        const bool own_norm = random() % 2 == 0, rotate = random() % 4 != 0;
        const float global_scale = format == KeyFormat::nvfp4 ? 0.02f : 1.0f;
        const Typed keys(type, testing::normal(random, tokens * stride, 3.0f));
        const std::vector<float> weight = testing::normal(random, 4 * kKeyDim),
                                 bias = testing::normal(random, 4 * kKeyDim),
                                 cos = testing::normal(random, positions * 32, 0.7f),
                                 sin = testing::normal(random, positions * 32, 0.7f);
        std::vector<int64_t> slots(pages * kPageTokens), position(tokens);
        std::iota(slots.begin(), slots.end(), 0);
        std::shuffle(slots.begin(), slots.end(), random);
        slots.resize(tokens);
        slots[3] = -1;
        for (int64_t& p : position) p = random() % positions;
        std::vector<uint8_t> expected(pages * page_bytes(format, key_heads), 0xff);
        for (int64_t t = 0; t < tokens; ++t)
          for (int32_t head = 0; head < key_heads && slots[t] >= 0; ++head) {
            float prepared[kKeyDim];
            const int64_t at = own_norm ? head * kKeyDim : 0;
            prepare_selector_key(keys.values.data() + t * stride + head * kKeyDim, norm, weight.data() + at,
                                 bias.data() + at, 1e-6f, rotate ? cos.data() + position[t] * 32 : nullptr,
                                 sin.data() + position[t] * 32, prepared);
            encode_key(format, prepared, static_cast<int>(slots[t] % kPageTokens),
                       expected.data() + slots[t] / kPageTokens * page_bytes(format, key_heads) +
                           head * page_head_bytes(format),
                       global_scale);
          }
        Buffer<uint8_t> device_keys(keys.bytes), out(expected.size());
        Buffer<float> device_weight(weight), device_bias(bias), device_cos(cos), device_sin(sin);
        Buffer<int64_t> device_slots(slots), device_position(position);
        SelectorKeyAppendParams p;
        p.format = format;
        p.key_heads = key_heads;
        p.num_tokens = tokens;
        p.keys = device_keys.data();
        p.key_type = type;
        p.token_stride = stride;
        p.norm = norm;
        p.norm_weight = device_weight.data();
        p.norm_bias = device_bias.data();
        p.norm_head_stride = own_norm ? kKeyDim : 0;
        p.rope_cos = rotate ? device_cos.data() : nullptr;
        p.rope_sin = device_sin.data();
        p.positions = device_position.data();
        p.slots = device_slots.data();
        p.pages = out.data();
        p.global_scale = global_scale;
        check(selector_key_append(p, nullptr));
        EXPECT_EQ(out.download(), expected)
            << "format " << static_cast<int>(format) << " heads " << key_heads << " norm "
            << static_cast<int>(norm) << " type " << static_cast<int>(type);
      }
}

struct ScoreCase {
  KeyFormat format;
  int32_t key_heads;
  DataType type;
  std::vector<int32_t> lengths;
};

// Runs the kernel on the given rows of a common pool.
std::vector<float> run_scores(const ScoreCase& c, const Buffer<uint8_t>& queries,
                              const Buffer<float>& weights, const Buffer<uint8_t>& pages,
                              const Buffer<int32_t>& table, int64_t table_stride, float global_scale,
                              int32_t max_blocks, size_t first_row, size_t rows) {
  Buffer<int32_t> lengths(
      std::vector<int32_t>(c.lengths.begin() + first_row, c.lengths.begin() + first_row + rows));
  const int64_t stride = max_blocks + 5;
  Buffer<float> out(rows * stride);
  ScoreBlocksParams p;
  p.format = c.format;
  p.key_heads = c.key_heads;
  p.batch = static_cast<int32_t>(rows);
  p.max_blocks = max_blocks;
  p.queries = queries.data() + first_row * kSelectorHeads * kKeyDim * (c.type == DataType::kF32 ? 4 : 2);
  p.query_type = c.type;
  p.weights = weights.data() + first_row * kSelectorHeads;
  p.pages = pages.data();
  p.global_scale = global_scale;
  p.page_table = table.data() + first_row * table_stride;
  p.page_table_stride = table_stride;
  p.lengths = lengths.data();
  p.block_scores = out.data();
  p.score_stride = stride;
  p.overlap = rows % 2 == 0 ? Overlap::kNone : Overlap::kHistory;
  check(score_blocks(p, nullptr));
  return out.download();
}

TEST(ScoreBlocks, MatchesFloat64AndIgnoresTheBatch) {
  Random random(testing::fresh_seed());
  for (KeyFormat format : kFormats)
    for (int32_t key_heads : {1, 4})
      for (DataType type : kTypes) {
        ScoreCase c = {format, key_heads, type, {1, 16, 333, 0, 17, 15, 700, 1025}};
        if (!kEmulated)
          c.lengths.insert(c.lengths.end(),
                           {12000, 64,   4099, 131, 9, 300, 2000, 31,  33,  9999, 48,  5,   99,  160,
                            7,     1000, 2,    3,   4, 600, 601,  602, 603, 604,  605, 606, 607, 608});
        std::shuffle(c.lengths.begin(), c.lengths.end(), random);
        const size_t rows = c.lengths.size();
        const float global_scale = format == KeyFormat::nvfp4 ? 0.013f : 1.0f;
        PageTable pages(random, c.lengths);
        KeyPool pool(random, format, key_heads, pages.num_pages, global_scale);
        std::vector<float> raw = testing::normal(random, rows * kSelectorHeads * kKeyDim);
        // Queries of very different size: their float16 images must not overflow or vanish.
        for (size_t i = 0; i < raw.size(); ++i)
          raw[i] *= std::ldexp(1.0f, static_cast<int>(i / kKeyDim % 3) * 7 - 7);
        const Typed queries(type, raw);
        const std::vector<float> weights = testing::normal(random, rows * kSelectorHeads, 0.05f);
        Buffer<uint8_t> device_queries(queries.bytes), device_pool(pool.bytes);
        Buffer<float> device_weights(weights);
        Buffer<int32_t> device_table(pages.table);
        const int32_t max_blocks = pages.max_blocks(), stride = max_blocks + 5;
        const auto run = [&](size_t first, size_t count) {
          return run_scores(c, device_queries, device_weights, device_pool, device_table, pages.stride,
                            global_scale, max_blocks, first, count);
        };
        const std::vector<float> scores = run(0, rows);
        std::vector<double> out, reference;
        for (size_t row = 0; row < rows; ++row) {
          for (int32_t block = 0; block < max_blocks; ++block) {
            const float score = scores[row * stride + block];
            const int32_t visible = c.lengths[row] - block * kPageTokens;
            if (visible <= 0) {
              EXPECT_EQ(score, -INFINITY);
              continue;
            }
            if (!kEmulated && block % 7 != 0 && visible > 64) continue;  // the reference is slow
            out.push_back(score);
            reference.push_back(testing::block_score_reference(
                queries.values.data() + row * kSelectorHeads * kKeyDim, weights.data() + row * kSelectorHeads,
                pool, key_heads, pages.page(row, block), visible));
          }
          for (int32_t extra = max_blocks; extra < stride; ++extra)
            EXPECT_TRUE(std::isnan(scores[row * stride + extra]));
        }
        EXPECT_LT(testing::relative_error(out, reference),
                  format == KeyFormat::bf16 && type == DataType::kF32 ? 1e-5 : 3e-6)
            << "format " << static_cast<int>(format) << " heads " << key_heads << " type "
            << static_cast<int>(type);
        // The same bits again, and from a row on its own.
        const std::vector<float> again = run(0, rows);
        EXPECT_EQ(std::memcmp(again.data(), scores.data(), scores.size() * 4), 0);
        const size_t row = random() % rows;
        const std::vector<float> alone = run(row, 1);
        EXPECT_EQ(std::memcmp(alone.data(), scores.data() + row * stride, max_blocks * 4), 0);
      }
}

TEST(ScoreBlocks, RejectsWhatItCannotDo) {
  ScoreBlocksParams p;
  p.batch = 1;
  p.max_blocks = 10;
  p.score_stride = 9;
  p.page_table_stride = 10;
  EXPECT_EQ(score_blocks(p, nullptr), cudaErrorInvalidValue);
  p.score_stride = 10;
  EXPECT_EQ(score_blocks(p, nullptr), cudaErrorInvalidValue);  // null pointers
  p.key_heads = 3;
  EXPECT_EQ(score_blocks(p, nullptr), cudaErrorInvalidValue);
}

// Selects every row on the device and on the host and compares all outputs exactly.
void compare_selection(const SelectionRule& rules, const std::vector<int32_t>& lengths,
                       int32_t rows_per_sequence, const std::vector<float>& scores, int64_t stride,
                       int32_t max_selected, bool with_share) {
  const int32_t rows = static_cast<int32_t>(lengths.size()) * rows_per_sequence;
  Buffer<float> device_scores(scores), share(rows);
  Buffer<int32_t> device_lengths(lengths), selected(static_cast<size_t>(rows) * max_selected), counts(rows);
  selected.fill(0x11);
  SelectBlocksParams p;
  p.rules = rules;
  p.rows = rows;
  p.rows_per_sequence = rows_per_sequence;
  p.scores = device_scores.data();
  p.score_stride = stride;
  p.lengths = device_lengths.data();
  p.selected = selected.data();
  p.max_selected = max_selected;
  p.counts = counts.data();
  p.covered_share = with_share ? share.data() : nullptr;
  check(select_blocks(p, nullptr));
  const std::vector<int32_t> out = selected.download(), out_counts = counts.download();
  const std::vector<float> out_share = share.download();
  for (int32_t row = 0; row < rows; ++row) {
    float expected_share = 0;
    const std::vector<int32_t> expected =
        select_blocks_reference(scores.data() + row * stride, lengths[row / rows_per_sequence], rules,
                                &expected_share, max_selected, row % rows_per_sequence);
    ASSERT_EQ(out_counts[row], static_cast<int32_t>(expected.size()))
        << "length " << lengths[row / rows_per_sequence];
    ASSERT_TRUE(
        std::equal(expected.begin(), expected.end(), out.begin() + static_cast<int64_t>(row) * max_selected))
        << "length " << lengths[row / rows_per_sequence];
    for (int64_t i = static_cast<int64_t>(expected.size()); i < max_selected; ++i)
      ASSERT_EQ(out[static_cast<int64_t>(row) * max_selected + i], -1);
    if (with_share) {
      EXPECT_EQ(out_share[row], expected_share);
    }
  }
}

// Rows of every kind that selection meets: spread, tied, flat, one far off, with NaN and infinities.
void fill_scores(Random& random, int kind, float* row, int32_t n) {
  std::normal_distribution<float> normal(0.0f, kind == 1 ? 0.02f : 3.0f);
  for (int32_t i = 0; i < n; ++i) {
    float x = normal(random);
    if (kind == 2) x = std::round(x);             // heavy ties
    if (kind == 3) x = std::max(x - 2.0f, 0.0f);  // a plateau of zeros
    if (kind == 4) x = random() % 50 == 0 ? NAN : x;
    if (kind == 5) x = -INFINITY;
    if (kind == 6) x = random() % 3 == 0 ? -INFINITY : random() % 90 == 0 ? INFINITY : x;
    if (kind == 7) x = i == n / 2 ? 1e30f : x * 1e-3f;  // all others in one bin
    if (kind == 8) x = random() % 2 == 0 ? -0.0f : 0.0f;
    if (kind == 9) x = std::ldexp(x, static_cast<int>(random() % 200) - 100);
    if (kind == 10) x = 7.25f;
    if (kind == 11) x = random() % 2 == 0 ? 3e38f : -3e38f;  // the range overflows
    row[i] = x;
  }
}
constexpr int kKinds = 12;

TEST(SelectBlocks, EqualsTheHostOnEveryKindOfRow) {
  Random random(testing::fresh_seed());
  for (int trial = 0; trial < (kEmulated ? 6 : 60); ++trial) {
    SelectionRule rules;
    rules.mode = static_cast<SelectionMode>(trial % 3);
    rules.threshold = std::pow(10.0, -static_cast<double>(random() % 500) / 100);
    rules.p = trial % 10 == 8 ? 1.0f : static_cast<float>(random() % 1000) / 1000;
    rules.budget = static_cast<int32_t>(random() % 8000);
    if (random() % 2 == 0) rules.budget_fraction = static_cast<double>(random() % 1000) / 1000;
    rules.temperature = 0.3f + static_cast<float>(random() % 300) / 100;
    if (trial % 3 == 1) rules.cap = 700 + static_cast<int32_t>(random() % 5000);
    if (trial % 7 == 6) rules.sinks = rules.recency = rules.floor = 0;
    std::vector<int32_t> lengths = {0, 1, 512, 513, 600};
    for (int kind = 0; kind < kKinds; ++kind)
      lengths.push_back(1 + static_cast<int32_t>(random() % (kEmulated ? 30000 : 200000)));
    std::shuffle(lengths.begin(), lengths.end(), random);
    const int32_t rows_per_sequence = trial % 4 == 3 ? 2 : 1;
    if (random() % 2 == 0) {
      rules.thresholds.count = rows_per_sequence;
      for (int32_t set = 0; set < rows_per_sequence; ++set)
        rules.thresholds.of[set] = std::pow(10.0, 1 - static_cast<double>(random() % 500) / 100);
    }
    const int64_t stride = 200000 / 16 + 3;
    std::vector<float> scores(lengths.size() * rows_per_sequence * stride, NAN);
    for (size_t row = 0; row < lengths.size() * rows_per_sequence; ++row)
      fill_scores(random, static_cast<int>(row % kKinds), scores.data() + row * stride,
                  (lengths[row / rows_per_sequence] + 15) / 16);
    const int32_t capacity = trial % 5 == 4 ? 60 : 200000 / 16 + 1;
    compare_selection(rules, lengths, rows_per_sequence, scores, stride, capacity,
                      trial % 2 == 0 || trial % 3 == 0);
  }
}

TEST(SelectBlocks, AMillionTokens) {
  Random random(testing::fresh_seed());
  for (int kind : {0, 3, 10}) {
    SelectionRule rules;
    rules.mode = kind == 3 ? SelectionMode::top_k : SelectionMode::top_p;
    rules.temperature = 2.0f;
    const int32_t length = 16 * kMaxSelectBlocks - 5;
    std::vector<float> scores(kMaxSelectBlocks);
    fill_scores(random, kind, scores.data(), kMaxSelectBlocks);
    compare_selection(rules, {length}, 1, scores, kMaxSelectBlocks, kMaxSelectBlocks, true);
    if (kEmulated) break;
  }
}

TEST(SelectBlocks, RejectsWhatItCannotDo) {
  SelectBlocksParams p;
  p.rows = 1;
  p.max_selected = smallest_capacity(p.rules) - 1;
  EXPECT_EQ(select_blocks(p, nullptr), cudaErrorInvalidValue);
  p.max_selected = 1000;
  EXPECT_EQ(select_blocks(p, nullptr), cudaErrorInvalidValue);  // null pointers
  p.rules.temperature = 0.0f;
  EXPECT_EQ(select_blocks(p, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace spot::kernels
