// The kernels behind Quest and Twilight against plain references, on the GPU or emulated.
#include <algorithm>

#include "kernels/estimate_logits.h"
#include "kernels/key_summary_append.h"
#include "kernels/prune_tokens.h"
#include "kernels/quest_score.h"
#include "kernels/token_attention.h"
#include "tests/kernels/device.h"
#include "tests/kernels/reference.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::fresh_seed;
using testing::PageTable;
using testing::Random;
using testing::Typed;

constexpr DataType kTypes[] = {DataType::kBf16, DataType::kF16};

float rounded_to_half(float x) {
  return static_cast<float>(static_cast<_Float16>(x));
}

// A pool of random keys in either order of its dims, [heads, pages, 16, dim] or [pages, 16, heads, dim].
struct Pool {
  int32_t heads, dim;
  int64_t pages, page_stride, head_stride, token_stride;
  Typed values;
  Buffer<uint8_t> device;
  Pool(Random& random, DataType type, int32_t heads, int32_t dim, int64_t pages, bool tokens_first)
      : heads(heads),
        dim(dim),
        pages(pages),
        page_stride(tokens_first ? int64_t{kPageTokens} * heads * dim : kPageTokens * dim),
        head_stride(tokens_first ? dim : pages * kPageTokens * dim),
        token_stride(tokens_first ? int64_t{heads} * dim : dim),
        values(type, testing::normal(random, static_cast<size_t>(pages) * kPageTokens * heads * dim)),
        device(values.bytes) {}
  const float* key(int32_t head, int64_t slot) const {
    return values.values.data() + head * head_stride + slot / kPageTokens * page_stride +
           slot % kPageTokens * token_stride;
  }
};

// Codes and ranges as the contract defines them.
struct Quantised {
  std::vector<uint8_t> codes;
  float scale, minimum;
  Quantised(const float* key, int32_t dim) : codes(dim / 2) {
    const auto [low, high] = std::minmax_element(key, key + dim);
    scale = rounded_to_half((*high - *low) / 15.0f);
    minimum = rounded_to_half(*low);
    for (int32_t i = 0; i < dim; ++i) {
      const float code =
          scale > 0 ? std::clamp(std::nearbyint((key[i] - minimum) / scale), 0.0f, 15.0f) : 0.0f;
      codes[i / 2] |= static_cast<uint8_t>(static_cast<int>(code) << (i % 2 * 4));
    }
  }
};

TEST(BaselineKernels, SummariesOfNewTokens) {
  Random random(fresh_seed());
  for (DataType type : kTypes)
    for (int32_t dim : {64, 128, 256})
      for (bool tokens_first : {false, true}) {
        const int32_t heads = 3;
        const int64_t pages = 9;
        Pool pool(random, type, heads, dim, pages, tokens_first);
        // Sequences: a decode token on page 4; one that fills page 2 and goes on on page 7; a page's first
        // token.
        std::vector<int64_t> slots = {4 * 16 + 5};
        for (int64_t offset = 11; offset < 16; ++offset) slots.push_back(2 * 16 + offset);
        for (int64_t offset = 0; offset < 3; ++offset) slots.push_back(7 * 16 + offset);
        slots.push_back(0);
        const std::vector<std::pair<int64_t, int>> touched = {
            {4, 6}, {2, 16}, {7, 3}, {0, 1}};  // page, tokens
        Buffer<int64_t> device_slots(slots);
        Buffer<uint16_t> bounds(heads * pages * 2 * dim), ranges(heads * pages * 16 * 2);
        Buffer<uint8_t> codes(heads * pages * 16 * dim / 2);
        KeySummaryAppendParams p;
        p.type = type;
        p.num_tokens = static_cast<int64_t>(slots.size());
        p.num_kv_heads = heads;
        p.head_dim = dim;
        p.keys = pool.device.data();
        p.page_stride = pool.page_stride, p.head_stride = pool.head_stride,
        p.token_stride = pool.token_stride;
        p.slots = device_slots.data();
        p.num_pages = pages;
        p.bounds = bounds.data();
        p.codes = codes.data();
        p.ranges = ranges.data();
        check(key_summary_append(p, nullptr));
        const std::vector<double> got_bounds = testing::to_double(type, bounds.download()),
                                  got_ranges = testing::to_double(DataType::kF16, ranges.download());
        const std::vector<uint8_t> got_codes = codes.download();
        for (int32_t head = 0; head < heads; ++head) {
          for (int64_t page = 0; page < pages; ++page) {
            const auto entry =
                std::find_if(touched.begin(), touched.end(), [&](auto& x) { return x.first == page; });
            for (int32_t i = 0; i < dim; ++i) {
              const double *at = &got_bounds[((head * pages + page) * 2) * dim + i], low = at[0],
                           high = at[dim];
              if (entry == touched.end()) {
                EXPECT_TRUE(std::isnan(low) && std::isnan(high));
                continue;
              }
              float expected_low = INFINITY, expected_high = -INFINITY;
              for (int t = 0; t < entry->second; ++t) {
                const float x = pool.key(head, page * 16 + t)[i];
                expected_low = std::min(expected_low, x), expected_high = std::max(expected_high, x);
              }
              ASSERT_EQ(low, expected_low);
              ASSERT_EQ(high, expected_high);
            }
          }
          for (int64_t slot : slots) {
            const Quantised expected(pool.key(head, slot), dim);
            const int64_t row = head * pages * 16 + slot;
            ASSERT_TRUE(std::equal(expected.codes.begin(), expected.codes.end(), &got_codes[row * dim / 2]));
            ASSERT_EQ(got_ranges[row * 2], expected.scale);
            ASSERT_EQ(got_ranges[row * 2 + 1], expected.minimum);
          }
          EXPECT_TRUE(std::isnan(got_ranges[(head * pages * 16 + 1) * 2]));  // no token of the batch
        }
      }
}

TEST(BaselineKernels, QuestScoresMatch) {
  Random random(fresh_seed());
  for (DataType type : kTypes)
    for (int32_t dim : {64, 128, 256})
      for (int32_t group : {1, 4, 7, 16})
        for (bool mean : {false, true}) {
          const int32_t kv_heads = 2, heads = kv_heads * group;
          const PageTable pages(random, {1 + static_cast<int32_t>(random() % 2200), 1, 16 * 17});
          const int32_t rows = 3, width = pages.max_blocks() + 2;
          std::vector<float> bounds =
              testing::normal(random, static_cast<size_t>(kv_heads) * pages.num_pages * 2 * dim);
          for (size_t page = 0; page < bounds.size(); page += 2 * dim)
            for (int32_t i = 0; i < dim; ++i)
              if (bounds[page + i] > bounds[page + dim + i])
                std::swap(bounds[page + i], bounds[page + dim + i]);
          const Typed queries(type, testing::normal(random, rows * heads * dim)), typed(type, bounds);
          Buffer<uint8_t> device_queries(queries.bytes), device_bounds(typed.bytes);
          Buffer<int32_t> table(pages.table), lengths(pages.lengths);
          Buffer<float> scores(static_cast<size_t>(rows) * kv_heads * width);
          QuestScoreParams p;
          p.type = type;
          p.batch = rows;
          p.num_heads = heads;
          p.num_kv_heads = kv_heads;
          p.head_dim = dim;
          p.scale = 0.25f;
          p.mean = mean;
          p.queries = device_queries.data();
          p.bounds = device_bounds.data();
          p.num_pages = pages.num_pages;
          p.page_table = table.data();
          p.page_table_stride = pages.stride;
          p.lengths = lengths.data();
          p.max_blocks = width;
          p.scores = scores.data();
          check(quest_score(p, nullptr));
          const std::vector<float> got = scores.download();
          for (int32_t row = 0; row < rows; ++row)
            for (int32_t kv = 0; kv < kv_heads; ++kv)
              for (int32_t block = 0; block < width; ++block) {
                const float score = got[(row * kv_heads + kv) * width + block];
                if (block * 16 >= pages.lengths[row]) {
                  ASSERT_EQ(score, -INFINITY);
                  continue;
                }
                double largest = -INFINITY, sum = 0;
                for (int32_t h = 0; h < group; ++h) {
                  double bound = 0;
                  const float* q = queries.values.data() + (row * heads + kv * group + h) * dim;
                  const float* low = typed.values.data() +
                                     (int64_t{kv} * pages.num_pages + pages.page(row, block)) * 2 * dim;
                  for (int32_t i = 0; i < dim; ++i)
                    bound += std::max(static_cast<double>(q[i]) * low[i],
                                      static_cast<double>(q[i]) * low[dim + i]);
                  largest = std::max(largest, bound * 0.25), sum += bound * 0.25;
                }
                ASSERT_NEAR(score, mean ? sum / group : largest, 1e-3);
              }
        }
}

TEST(BaselineKernels, EstimatesMatch) {
  Random random(fresh_seed());
  for (DataType type : kTypes)
    for (int32_t dim : {64, 128, 256})
      for (int32_t group : {1, 4, 12}) {
        const int32_t kv_heads = 2, heads = kv_heads * group, rows = 2;
        const PageTable pages(random, {37 * 16 + 5, 3 * 16});
        const int64_t slots = int64_t{pages.num_pages} * 16;
        const Typed queries(type, testing::normal(random, rows * heads * dim));
        std::vector<uint8_t> codes(kv_heads * slots * dim / 2);
        for (uint8_t& byte : codes) byte = static_cast<uint8_t>(random());
        const Typed ranges(DataType::kF16, testing::normal(random, kv_heads * slots * 2));
        std::vector<int32_t> selected, counts;
        const int32_t most = 30;
        for (int32_t list = 0; list < rows * kv_heads; ++list) {
          const int32_t blocks = (pages.lengths[list / kv_heads] + 15) / 16;
          std::vector<int32_t> chosen;
          for (int32_t b = 0; b < blocks; ++b)
            if (b == blocks - 1 || random() % 2 == 0) chosen.push_back(b);
          if (chosen.size() > static_cast<size_t>(most)) chosen.erase(chosen.begin(), chosen.end() - most);
          counts.push_back(static_cast<int32_t>(chosen.size()));
          chosen.resize(most, -1);
          selected.insert(selected.end(), chosen.begin(), chosen.end());
        }
        Buffer<uint8_t> device_queries(queries.bytes), device_codes(codes), device_ranges(ranges.bytes);
        Buffer<int32_t> table(pages.table), lengths(pages.lengths), device_selected(selected),
            device_counts(counts);
        Buffer<float> logits(static_cast<size_t>(rows) * heads * most * 16);
        EstimateLogitsParams p;
        p.type = type;
        p.batch = rows;
        p.num_heads = heads;
        p.num_kv_heads = kv_heads;
        p.head_dim = dim;
        p.scale = 0.1f;
        p.queries = device_queries.data();
        p.codes = device_codes.data();
        p.ranges = device_ranges.data();
        p.num_pages = pages.num_pages;
        p.page_table = table.data();
        p.page_table_stride = pages.stride;
        p.lengths = lengths.data();
        p.selected = device_selected.data();
        p.counts = device_counts.data();
        p.max_selected = most;
        p.logits = logits.data();
        check(estimate_logits(p, nullptr));
        const std::vector<float> got = logits.download();
        std::vector<double> seen, expected;
        for (int32_t row = 0; row < rows; ++row)
          for (int32_t head = 0; head < heads; ++head) {
            const int32_t kv = head / group, list = row * kv_heads + kv;
            for (int32_t i = 0; i < most * 16; ++i) {
              const float logit = got[(row * heads + head) * most * 16 + i];
              if (i / 16 >= counts[list]) {
                ASSERT_TRUE(std::isnan(logit));  // not written
                continue;
              }
              const int32_t block = selected[list * most + i / 16];
              if (block * 16 + i % 16 >= pages.lengths[row]) {
                ASSERT_EQ(logit, -INFINITY);
                continue;
              }
              const int64_t slot = kv * slots + int64_t{pages.page(row, block)} * 16 + i % 16;
              double dot = 0;
              for (int32_t d = 0; d < dim; ++d) {
                const int code = codes[slot * dim / 2 + d / 2] >> (d % 2 * 4) & 15;
                dot += queries.values[(row * heads + head) * dim + d] *
                       (static_cast<double>(code) * ranges.values[slot * 2] + ranges.values[slot * 2 + 1]);
              }
              seen.push_back(logit);
              expected.push_back(dot * 0.1);
            }
          }
        // Float32 sums of products that nearly cancel; with 256 of them 2.3e-5 was seen on an H100.
        EXPECT_LT(testing::relative_error(seen, expected), dim == 256 ? 5e-5 : 2e-5)
            << dim << " group " << group;
      }
}

// The rule of prune_tokens.h in plain words.
std::vector<bool> keep(const float* logits, int32_t n, float top_p) {
  float largest = -INFINITY;
  for (int32_t i = 0; i < n; ++i) largest = std::max(largest, logits[i]);
  std::vector<uint32_t> masses(n);
  uint64_t total = 0;
  for (int32_t i = 0; i < n; ++i) total += masses[i] = mass_of(logits[i], largest, 1.44269504088896340736f);
  std::vector<uint32_t> sorted = masses;
  std::sort(sorted.rbegin(), sorted.rend());
  SelectionRule rules;
  rules.p = top_p;
  const uint64_t target = mass_target(fixed_probability(rules), total);
  uint64_t sum = 0;
  uint32_t threshold = 1;
  for (uint32_t mass : sorted) {
    sum += mass;
    if (sum >= target) {
      threshold = std::max(mass, 1u);
      break;
    }
  }
  std::vector<bool> kept(n);
  for (int32_t i = 0; i < n; ++i) kept[i] = masses[i] >= threshold;
  return kept;
}

void expect_pruned(Random& random, int32_t kv_heads, int32_t group, const std::vector<int32_t>& row_counts,
                   int32_t most, float top_p, float deviation, bool round) {
  const int32_t rows = static_cast<int32_t>(row_counts.size()), heads = kv_heads * group, floor = 100;
  std::vector<int32_t> selected, counts, lengths;
  for (int32_t row = 0; row < rows; ++row) {
    const int32_t blocks = 2 * row_counts[row] + 1;
    lengths.push_back((blocks - 1) * 16 + 1 + static_cast<int32_t>(random() % 16));
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      const int32_t count = std::max(row_counts[row] - kv, 0);
      for (int32_t i = 0; i < most; ++i)  // the last block, partial, is among them
        selected.push_back(i >= count ? -1 : i == count - 1 ? blocks - 1 : 2 * i);
      counts.push_back(count);
    }
  }
  std::vector<float> logits =
      testing::normal(random, static_cast<size_t>(rows) * heads * most * 16, deviation);
  for (int32_t row = 0; row < rows; ++row)
    for (int32_t head = 0; head < heads; ++head)
      for (int32_t i = 0; i < most * 16; ++i) {
        float& logit = logits[(static_cast<size_t>(row) * heads + head) * most * 16 + i];
        const int32_t list = row * kv_heads + head / group;
        if (round) logit = std::round(logit);
        if (i / 16 >= counts[list])
          logit = NAN;
        else if (selected[list * most + i / 16] * 16 + i % 16 >= lengths[row])
          logit = -INFINITY;
      }
  Buffer<float> device_logits(logits);
  Buffer<int32_t> device_selected(selected), device_counts(counts), device_lengths(lengths);
  Buffer<int32_t> tokens(static_cast<size_t>(rows) * kv_heads * most * 16), token_counts(rows * kv_heads);
  Buffer<uint8_t> workspace(prune_tokens_workspace_bytes(rows, heads, most));
  workspace.fill(0);
  PruneTokensParams p;
  p.batch = rows;
  p.num_heads = heads;
  p.num_kv_heads = kv_heads;
  p.p = top_p;
  p.floor = floor;
  p.lengths = device_lengths.data();
  p.selected = device_selected.data();
  p.counts = device_counts.data();
  p.max_selected = most;
  p.logits = device_logits.data();
  p.tokens = tokens.data();
  p.token_counts = token_counts.data();
  p.workspace = workspace.data();
  p.workspace_bytes = workspace.size();
  for (int repeat = 0; repeat < 2; ++repeat) {  // the second call finds the workspace as the first left it
    check(prune_tokens(p, nullptr));
    const std::vector<int32_t> got = tokens.download(), got_counts = token_counts.download();
    for (int32_t list = 0; list < rows * kv_heads; ++list) {
      const int32_t n = counts[list] * 16, row = list / kv_heads;
      std::vector<bool> kept(n, lengths[row] <= floor);
      for (int32_t h = 0; h < group && lengths[row] > floor; ++h) {
        const auto head =
            keep(logits.data() + (static_cast<size_t>(row) * heads + list % kv_heads * group + h) * most * 16,
                 n, top_p);
        for (int32_t i = 0; i < n; ++i) kept[i] = kept[i] || head[i];
      }
      std::vector<int32_t> expected;
      for (int32_t i = 0; i < n; ++i) {
        const int32_t token = selected[list * most + i / 16] * 16 + i % 16;
        if (kept[i] && token < lengths[row]) expected.push_back(token);
      }
      ASSERT_EQ(got_counts[list], static_cast<int32_t>(expected.size())) << "list " << list << " of " << n;
      ASSERT_TRUE(
          std::equal(expected.begin(), expected.end(), got.begin() + static_cast<int64_t>(list) * most * 16));
    }
  }
}

TEST(BaselineKernels, PruningIsExact) {
  Random random(fresh_seed());
  for (float top_p : {0.05f, 0.5f, 0.95f, 1.0f})
    for (float deviation : {0.0f, 1.0f, 6.0f})
      for (bool round : {false, true})
        expect_pruned(random, 2, 1 + static_cast<int32_t>(random() % 4), {40, 2, 1, 0}, 41, top_p, deviation,
                      round);
}

TEST(BaselineKernels, PruningOfManyCandidatesIsExact) {
  Random random(fresh_seed());
  expect_pruned(random, 1, 2, {700}, 700, 0.9f, 3.0f, false);     // more than fit in shared memory at once
  expect_pruned(random, 1, 1, {2200}, 2300, 0.95f, 2.0f, false);  // more than fit in registers
}

TEST(BaselineKernels, TokenAttentionMatches) {
  Random random(fresh_seed());
  for (DataType type : kTypes)
    for (int32_t dim : {64, 128, 256})
      for (int32_t group : {1, 4, 12})
        for (bool tokens_first : {false, true}) {
          const int32_t kv_heads = 2, heads = kv_heads * group, most = 700;
          const PageTable pages(random, {1500, 3, 200});
          const int32_t rows = 3;
          Pool keys(random, type, kv_heads, dim, pages.num_pages, tokens_first),
              values(random, type, kv_heads, dim, pages.num_pages, tokens_first);
          const Typed queries(type, testing::normal(random, rows * heads * dim));
          std::vector<int32_t> tokens(rows * kv_heads * most, -1), counts;
          for (int32_t list = 0; list < rows * kv_heads; ++list) {
            int32_t count = 0;
            for (int32_t token = 0; token < pages.lengths[list / kv_heads] && list != 5; ++token)
              if (random() % 5 < 2) tokens[list * most + count++] = token;
            counts.push_back(count);
          }
          Buffer<uint8_t> device_queries(queries.bytes),
              workspace(sparse_decode_workspace_bytes(rows, heads, kv_heads, dim));
          workspace.fill(0);
          Buffer<int32_t> table(pages.table), lengths(pages.lengths), device_tokens(tokens),
              device_counts(counts);
          Buffer<uint16_t> out(rows * heads * dim);
          SparseDecodeAttentionParams p;
          p.type = type;
          p.batch = rows;
          p.num_heads = heads;
          p.num_kv_heads = kv_heads;
          p.head_dim = dim;
          p.scale = 0.125f;
          p.queries = device_queries.data();
          p.keys = keys.device.data();
          p.values = values.device.data();
          p.page_stride = keys.page_stride, p.head_stride = keys.head_stride,
          p.token_stride = keys.token_stride;
          p.page_table = table.data();
          p.page_table_stride = pages.stride;
          p.lengths = lengths.data();
          p.selected = device_tokens.data();
          p.counts = device_counts.data();
          p.max_selected = most;
          p.rows_per_sequence = kv_heads;
          p.out = out.data();
          p.workspace = workspace.data();
          p.workspace_bytes = workspace.size();
          check(token_attention(p, nullptr));
          std::vector<double> expected;
          for (int32_t row = 0; row < rows; ++row)
            for (int32_t head = 0; head < heads; ++head) {
              const int32_t kv = head / group, list = row * kv_heads + kv;
              const auto slot = [&](int32_t i) {
                const int32_t token = tokens[list * most + i];
                return int64_t{pages.page(row, token / 16)} * 16 + token % 16;
              };
              std::vector<double> sum(dim, 0.0);
              double weights = 0;
              for (int32_t i = 0; i < counts[list]; ++i) {
                double dot = 0;
                for (int32_t d = 0; d < dim; ++d)
                  dot += static_cast<double>(queries.values[(row * heads + head) * dim + d]) *
                         keys.key(kv, slot(i))[d];
                const double weight = std::exp(dot * 0.125);
                weights += weight;
                for (int32_t d = 0; d < dim; ++d) sum[d] += weight * values.key(kv, slot(i))[d];
              }
              for (double x : sum) expected.push_back(weights > 0 ? x / weights : 0);
            }
          EXPECT_LT(testing::relative_error(testing::to_double(type, out.download()), expected),
                    type == DataType::kBf16 ? 6e-3 : 8e-4)
              << dim << " group " << group;
        }
}

TEST(BaselineKernels, RefuseWhatTheyCannotDo) {
  EXPECT_EQ(key_summary_append(KeySummaryAppendParams{.num_tokens = 1}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(quest_score(QuestScoreParams{.batch = 1, .num_heads = 3, .num_kv_heads = 2}, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(estimate_logits(EstimateLogitsParams{.batch = 1, .num_heads = 34, .num_kv_heads = 2}, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(
      prune_tokens(PruneTokensParams{.batch = 1, .num_heads = 4, .num_kv_heads = 2, .max_selected = 65537},
                   nullptr),
      cudaErrorInvalidValue);
  EXPECT_EQ(
      token_attention(SparseDecodeAttentionParams{.batch = 1, .num_heads = 4, .num_kv_heads = 2}, nullptr),
      cudaErrorInvalidValue);
}

}  // namespace
}  // namespace spot::kernels
