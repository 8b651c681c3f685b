// kernels/attend_tiles.h and score_tiles.h, on the GPU (both kernels) or emulated (the portable ones), against
// their formulas in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/attend_tiles.h"
#include "kernels/score_tiles.h"
#include "tests/kernels/device.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::kEmulated;
using testing::Typed;

// A batch: of each sequence the queries at positions starts[i] .. starts[i] + counts[i] - 1, rows one after the
// other; tiles strip by strip.
struct Batch {
  int tile_queries;
  std::vector<int> starts, counts, first_rows;
  int rows = 0, longest = 0;
  std::vector<QueryTile> tiles;

  Batch(int tile_queries_, const std::vector<int>& starts_, const std::vector<int>& counts_)
      : tile_queries(tile_queries_), starts(starts_), counts(counts_) {
    for (size_t i = 0; i < starts.size(); ++i) {
      first_rows.push_back(rows);
      const int end = starts[i] + counts[i];
      longest = std::max(longest, end);
      if (counts[i] > 0)
        for (int strip = starts[i] / kStripQueries * kStripQueries; strip < end; strip += kStripQueries)
          for (int tile = strip; tile < strip + kStripQueries; tile += tile_queries) {
            const int from = std::max(tile, starts[i]), to = std::min(tile + tile_queries, end);
            tiles.push_back(from < to
                                ? QueryTile{static_cast<int32_t>(i), rows + from - starts[i], to - from, from}
                                : QueryTile{0, 0, 0, 0});
          }
      rows += counts[i];
    }
  }
  int last(const QueryTile& tile) const { return tile.start + tile.count - 1; }
};

class PrefillKernels : public ::testing::Test {
 protected:
  void SetUp() override { random_.seed(testing::fresh_seed()); }
  std::vector<float> normals(size_t count, double scale = 1) {
    std::vector<float> v(count);
    for (float& x : v) x = static_cast<float>(scale * std::normal_distribution<double>()(random_));
    return v;
  }
  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  Batch draw_batch(int tile_queries, int sequences, int longest, int most) {
    std::vector<int> starts, counts;
    for (int i = 0; i < sequences; ++i) {
      counts.push_back(draw(1, most));
      starts.push_back(draw(0, std::max(0, longest - counts.back())));
    }
    starts[0] = 0;
    return Batch(tile_queries, starts, counts);
  }
  // Pages of each sequence, [sequences, width], scattered over a pool of *pool pages.
  std::vector<int32_t> draw_pages(const Batch& batch, int* width, int* pool) {
    *width = (batch.longest + kPageTokens - 1) / kPageTokens;
    *pool = *width * static_cast<int>(batch.starts.size()) + 3;
    std::vector<int32_t> pages(*pool);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), random_);
    pages.resize(*width * batch.starts.size());
    return pages;
  }
  std::mt19937 random_;
};

// ---- attention

struct AttendCase {
  Batch batch;
  DataType type;
  int num_heads, num_kv_heads, head_dim, rows_per_tile;
  int pool = 0, width = 0;
  float scale = 0;
  std::vector<int32_t> pages, selected, counts;
  int max_selected = 0;
  std::vector<float> query, key, value;  // as rounded; pools [kv heads, pool, 16, dim]

  size_t at(int head, int sequence, int position) const {
    const int page = pages[static_cast<size_t>(sequence) * width + position / kPageTokens];
    return ((static_cast<size_t>(head) * pool + page) * kPageTokens + position % kPageTokens) * head_dim;
  }
};

// What a run gives: out and log-sum-exps.
struct Attended {
  std::vector<uint16_t> bits;
  std::vector<float> log_sum_exp;
};

Attended run(const AttendCase& c, const std::vector<QueryTile>& tiles, const std::vector<int32_t>& selected,
             const std::vector<int32_t>& counts, const Typed& query, const Typed& key, const Typed& value,
             bool portable) {
  const Buffer<QueryTile> device_tiles(tiles);
  const Buffer<uint8_t> q(query.bytes), k(key.bytes), v(value.bytes);
  const Buffer<int32_t> pages(c.pages), list(selected), list_counts(counts);
  const size_t rows = static_cast<size_t>(c.batch.rows) * c.num_heads;
  const Buffer<uint16_t> out(rows * c.head_dim);
  const Buffer<float> log_sum_exp(rows);
  AttendTilesParams p;
  p.type = c.type;
  p.num_tiles = static_cast<int32_t>(tiles.size());
  p.tile_queries = c.batch.tile_queries;
  p.tiles = device_tiles.data();
  p.num_heads = c.num_heads, p.num_kv_heads = c.num_kv_heads, p.head_dim = c.head_dim;
  p.scale = c.scale;
  p.queries = q.data();
  p.query_row_stride = c.num_heads * c.head_dim, p.query_head_stride = c.head_dim;
  p.keys = k.data(), p.values = v.data();
  p.num_pages = c.pool;
  p.token_stride = c.head_dim, p.page_stride = kPageTokens * c.head_dim;
  p.head_stride = static_cast<int64_t>(c.pool) * p.page_stride;
  p.page_table = pages.data(), p.page_table_stride = c.width;
  p.selected = list.data(), p.counts = list_counts.data();
  p.max_selected = c.max_selected;
  p.rows_per_tile = c.rows_per_tile;
  p.out = out.data();
  p.log_sum_exp = log_sum_exp.data();
  p.portable = portable;
  check(attend_tiles(p, nullptr));
  return {out.download(), log_sum_exp.download()};
}

class AttendTiles : public PrefillKernels {
 protected:
  // share: of its blocks that a list has; 1: all of them; 0: none.
  AttendCase draw_case(const Batch& batch, DataType type, int num_heads, int num_kv_heads, int dim,
                       bool per_head, double share) {
    AttendCase c{batch, type, num_heads, num_kv_heads, dim, per_head ? num_kv_heads : 1, 0, 0, 0, {}, {},
                 {},    0,    {},        {},           {}};
    c.pages = draw_pages(batch, &c.width, &c.pool);
    c.scale = static_cast<float>(1.5 / std::sqrt(dim));
    c.max_selected = c.width;
    for (const QueryTile& tile : batch.tiles)
      for (int r = 0; r < c.rows_per_tile; ++r) {
        std::vector<int32_t> list;
        if (tile.count > 0)
          for (int b = 0; b <= batch.last(tile) / kPageTokens; ++b)
            if (std::uniform_real_distribution<>()(random_) < share) list.push_back(b);
        c.counts.push_back(static_cast<int32_t>(list.size()));
        list.resize(c.width, -1);
        c.selected.insert(c.selected.end(), list.begin(), list.end());
      }
    c.query = normals(static_cast<size_t>(batch.rows) * num_heads * dim);
    // What no query sees, within pages and without, is not a number.
    const size_t numbers = static_cast<size_t>(num_kv_heads) * c.pool * kPageTokens * dim;
    c.key.assign(numbers, std::nanf("")), c.value.assign(numbers, std::nanf(""));
    for (int h = 0; h < num_kv_heads; ++h)
      for (size_t i = 0; i < batch.starts.size(); ++i)
        for (int t = 0; t < batch.starts[i] + batch.counts[i]; ++t) {
          const std::vector<float> k = normals(dim), v = normals(dim);
          std::copy(k.begin(), k.end(),
                    c.key.begin() + static_cast<int64_t>(c.at(h, static_cast<int>(i), t)));
          std::copy(v.begin(), v.end(),
                    c.value.begin() + static_cast<int64_t>(c.at(h, static_cast<int>(i), t)));
        }
    return c;
  }

  void expect_attended(const AttendCase& c, bool portable) {
    SCOPED_TRACE(std::string(c.type == DataType::kBf16 ? "bf16" : "f16") + ", tiles of " +
                 std::to_string(c.batch.tile_queries) + ", heads " + std::to_string(c.num_heads) + "/" +
                 std::to_string(c.num_kv_heads) + " of " + std::to_string(c.head_dim) + ", lists " +
                 std::to_string(c.rows_per_tile) + (portable ? ", portable" : ""));
    const Typed query(c.type, c.query), key(c.type, c.key), value(c.type, c.value);
    const Attended got = run(c, c.batch.tiles, c.selected, c.counts, query, key, value, portable);
    const std::vector<double> out = testing::to_double(c.type, got.bits);
    const int group = c.num_heads / c.num_kv_heads, dim = c.head_dim;
    double difference = 0, norm = 0, lse_difference = 0;
    for (size_t i = 0; i < c.batch.tiles.size(); ++i) {
      const QueryTile& tile = c.batch.tiles[i];
      for (int q = 0; q < tile.count; ++q)
        for (int h = 0; h < c.num_heads; ++h) {
          const size_t row = static_cast<size_t>(tile.first_row + q) * c.num_heads + h;
          const size_t list = i * c.rows_per_tile + (c.rows_per_tile == 1 ? 0 : h / group);
          std::vector<double> logits;
          std::vector<size_t> places;
          for (int j = 0; j < c.counts[list]; ++j)
            for (int t = 0; t < kPageTokens; ++t) {
              const int position = c.selected[list * c.max_selected + j] * kPageTokens + t;
              if (position > tile.start + q) continue;
              places.push_back(c.at(h / group, tile.sequence, position));
              double dot = 0;
              for (int d = 0; d < dim; ++d)
                dot += static_cast<double>(query.values[row * dim + d]) * key.values[places.back() + d];
              logits.push_back(dot * c.scale);
            }
          const double largest = logits.empty() ? 0 : *std::max_element(logits.begin(), logits.end());
          double sum = 0;
          for (double x : logits) sum += std::exp(x - largest);
          std::vector<double> want(dim, 0.0);
          for (size_t k = 0; k < places.size(); ++k)
            for (int d = 0; d < dim; ++d)
              want[d] += std::exp(logits[k] - largest) / sum * value.values[places[k] + d];
          for (int d = 0; d < dim; ++d) {
            const double x = out[row * dim + d];
            ASSERT_TRUE(std::isfinite(x)) << "row " << row << " dim " << d;
            difference += (x - want[d]) * (x - want[d]), norm += want[d] * want[d];
          }
          if (logits.empty())
            ASSERT_EQ(got.log_sum_exp[row], -std::numeric_limits<float>::infinity());
          else
            lse_difference =
                std::max(lse_difference, std::abs(got.log_sum_exp[row] - largest - std::log(sum)));
        }
    }
    EXPECT_LE(std::sqrt(difference), (c.type == DataType::kBf16 ? 5e-3 : 1e-3) * std::sqrt(norm));
    EXPECT_LT(lse_difference, 1e-4);
  }
};

// Values of `portable` that choose a kernel each.
std::vector<bool> kernels() {
#if defined(SPOT_EMULATED)
  return {true};
#else
  return {true, false};
#endif
}

TEST_F(AttendTiles, MatchFloat64OfEveryHeadLayout) {
  const int longest = kEmulated ? 150 : 700, most = kEmulated ? 70 : 300;
  struct Layout {
    int num_heads, num_kv_heads, dim;
  };
  for (const Layout& l :
       {Layout{4, 1, 128}, {8, 2, 64}, {6, 2, 128}, {8, 1, 128}, {2, 2, 128}, {4, 1, 256}}) {
    const Batch batch = draw_batch(16 << draw(0, 2), 3, longest, most);
    for (const bool portable : kernels()) {
      const bool per_head = draw(0, 1) == 1;
      expect_attended(draw_case(batch, draw(0, 1) ? DataType::kBf16 : DataType::kF16, l.num_heads,
                                l.num_kv_heads, l.dim, per_head, 0.5),
                      portable);
    }
  }
}

// Dense attention, lists without the tile's own blocks, lists of a few blocks, no blocks at all.
TEST_F(AttendTiles, MatchFloat64OfAnyListLength) {
  for (const double share : {1.0, 0.1, 0.02, 0.0})
    for (const bool portable : kernels())
      expect_attended(draw_case(draw_batch(32, 2, kEmulated ? 140 : 900, kEmulated ? 50 : 300),
                                DataType::kBf16, 4, 1, 128, false, share),
                      portable);
}

// A tile alone, before keys that came later are written, gives the bits it gives in the batch.
TEST_F(AttendTiles, DependOnNothingButTheTileAndItsPast) {
  for (const bool portable : kernels())
    for (const int dim : {64, 128, 256}) {
      AttendCase c = draw_case(draw_batch(32, 2, kEmulated ? 120 : 600, kEmulated ? 60 : 200),
                               DataType::kBf16, 4, 2, dim, true, 0.6);
      const Typed query(c.type, c.query);
      const Attended all = run(c, c.batch.tiles, c.selected, c.counts, query, Typed(c.type, c.key),
                               Typed(c.type, c.value), portable);
      for (int i : {0, draw(0, static_cast<int>(c.batch.tiles.size()) - 1),
                    static_cast<int>(c.batch.tiles.size()) - 1}) {
        const QueryTile tile = c.batch.tiles[i];
        std::vector<float> key = c.key, value = c.value;
        for (int h = 0; h < c.num_kv_heads; ++h)
          for (int t = c.batch.last(tile) + 1; t < c.width * kPageTokens; ++t)
            for (int d = 0; d < dim; ++d)
              key[c.at(h, tile.sequence, t) + d] = value[c.at(h, tile.sequence, t) + d] = std::nanf("");
        const auto part = [&](const std::vector<int32_t>& v, int width) {
          const auto begin = v.begin() + static_cast<int64_t>(i) * c.rows_per_tile * width;
          return std::vector<int32_t>(begin, begin + c.rows_per_tile * width);
        };
        const Attended alone = run(c, {tile}, part(c.selected, c.max_selected), part(c.counts, 1), query,
                                   Typed(c.type, key), Typed(c.type, value), portable);
        const size_t first = static_cast<size_t>(tile.first_row) * c.num_heads,
                     rows = tile.count * c.num_heads;
        EXPECT_TRUE(std::equal(alone.bits.begin() + first * dim, alone.bits.begin() + (first + rows) * dim,
                               all.bits.begin() + first * dim));
        EXPECT_TRUE(std::equal(alone.log_sum_exp.begin() + first, alone.log_sum_exp.begin() + first + rows,
                               all.log_sum_exp.begin() + first));
      }
    }
}

TEST_F(AttendTiles, RefuseWhatTheyDoNotServe) {
  AttendTilesParams p;
  p.num_kv_heads = 2, p.num_heads = 8, p.num_pages = 1;
  EXPECT_EQ(attend_tiles(p, nullptr), cudaSuccess);  // nothing to do
  p.num_tiles = 2;
  EXPECT_EQ(attend_tiles(p, nullptr), cudaErrorInvalidValue);  // no pointers
  p.num_tiles = 0;
  for (auto change :
       {+[](AttendTilesParams& x) { x.tile_queries = 24; }, +[](AttendTilesParams& x) { x.num_heads = 7; },
        +[](AttendTilesParams& x) { x.rows_per_tile = 3; }}) {
    AttendTilesParams bad = p;
    change(bad);
    EXPECT_EQ(attend_tiles(bad, nullptr), cudaErrorInvalidValue);
  }
}

// ---- scores

class ScoreTiles : public PrefillKernels {
 protected:
  struct Case {
    Batch batch;
    int key_heads, groups;
    std::vector<int32_t> key_begins;
    int key_tokens = 0, stride = 0;
    std::vector<float> query, key, weights;
  };
  Case draw_case(const Batch& batch, int key_heads, int groups) {
    Case c{batch, key_heads, groups, {}, 0, 0, {}, {}, {}};
    for (size_t i = 0; i < batch.starts.size(); ++i) {
      c.key_begins.push_back(c.key_tokens);
      c.key_tokens += batch.starts[i] + batch.counts[i];
    }
    c.stride = (batch.longest + kPageTokens - 1) / kPageTokens + draw(0, 3);
    c.query = normals(static_cast<size_t>(batch.rows) * kSelectorHeads * kKeyDim);
    c.key = normals(static_cast<size_t>(key_heads) * c.key_tokens * kKeyDim);
    c.weights = normals(static_cast<size_t>(batch.rows) * groups * kSelectorHeads, 0.05);
    return c;
  }
  std::vector<float> run(const Case& c, const std::vector<QueryTile>& tiles, const Typed& query,
                         const Typed& key, bool portable) {
    const Buffer<QueryTile> device_tiles(tiles);
    const Buffer<uint8_t> q(query.bytes), k(key.bytes);
    const Buffer<float> weights(c.weights), scores(tiles.size() * c.groups * c.stride);
    const Buffer<int32_t> begins(c.key_begins);
    ScoreTilesParams p;
    p.num_tiles = static_cast<int32_t>(tiles.size());
    p.tile_queries = c.batch.tile_queries;
    p.tiles = device_tiles.data();
    p.key_heads = c.key_heads, p.groups = c.groups;
    p.queries = q.data(), p.query_row_stride = kSelectorHeads * kKeyDim;
    p.weights = weights.data();
    p.keys = k.data(), p.key_tokens = c.key_tokens, p.key_begins = begins.data();
    p.longest = c.batch.longest;
    p.scores = scores.data(), p.score_stride = c.stride;
    p.portable = portable;
    check(score_tiles(p, nullptr));
    return scores.download();
  }
};

TEST_F(ScoreTiles, MatchFloat64) {
  for (const int key_heads : {1, kSelectorHeads})
    for (const int groups : {1, 2, 8})
      for (const bool portable : kernels()) {
        const Case c = draw_case(
            draw_batch(16 << draw(0, 2), 2, kEmulated ? 150 : 2500, kEmulated ? 90 : 400), key_heads, groups);
        SCOPED_TRACE("key heads " + std::to_string(key_heads) + ", groups " + std::to_string(groups) +
                     ", tiles of " + std::to_string(c.batch.tile_queries) + (portable ? ", portable" : ""));
        const Typed query(DataType::kBf16, c.query), key(DataType::kBf16, c.key);
        const std::vector<float> got = run(c, c.batch.tiles, query, key, portable);
        double largest_error = 0;
        for (size_t i = 0; i < c.batch.tiles.size(); ++i) {
          const QueryTile& tile = c.batch.tiles[i];
          for (int g = 0; g < groups; ++g)
            for (int b = 0; b < c.stride; ++b) {
              const float score = got[(i * groups + g) * c.stride + b];
              double want = -INFINITY;
              for (int q = 0; q < tile.count; ++q)
                for (int t = b * kPageTokens; t < (b + 1) * kPageTokens && t <= tile.start + q; ++t) {
                  const size_t row = tile.first_row + q;
                  double sum = 0;
                  for (int h = 0; h < kSelectorHeads; ++h) {
                    double dot = 0;
                    const size_t head = key_heads == 1 ? 0 : h;
                    for (int d = 0; d < kKeyDim; ++d)
                      dot +=
                          static_cast<double>(query.values[(row * kSelectorHeads + h) * kKeyDim + d]) *
                          key.values[(head * c.key_tokens + c.key_begins[tile.sequence] + t) * kKeyDim + d];
                    sum += c.weights[(row * groups + g) * kSelectorHeads + h] * std::max(dot, 0.0);
                  }
                  want = std::max(want, sum);
                }
              if (tile.count == 0 || b > c.batch.last(tile) / kPageTokens) {
                ASSERT_TRUE(std::isnan(score)) << "written past the tile's last block";
                continue;
              }
              ASSERT_TRUE(std::isfinite(score)) << "tile " << i << " group " << g << " block " << b;
              largest_error = std::max(largest_error, std::abs(score - want));
            }
        }
        EXPECT_LT(largest_error, 2e-5);
      }
}

// A tile beside others, or in a batch of its own, gives the same bits.
TEST_F(ScoreTiles, DependOnNothingButTheTile) {
  for (const bool portable : kernels())
    for (const int groups : {1, 3}) {
      const Case c = draw_case(draw_batch(32, 3, kEmulated ? 150 : 1500, kEmulated ? 90 : 300), 1, groups);
      const Typed query(DataType::kBf16, c.query), key(DataType::kBf16, c.key);
      const std::vector<float> all = run(c, c.batch.tiles, query, key, portable);
      const int per_strip = kStripQueries / 32, strips = static_cast<int>(c.batch.tiles.size()) / per_strip;
      const int strip = draw(0, strips - 1);
      std::vector<QueryTile> tiles(c.batch.tiles.begin() + strip * per_strip,
                                   c.batch.tiles.begin() + (strip + 1) * per_strip);
      const std::vector<float> alone = run(c, tiles, query, key, portable);
      EXPECT_EQ(
          std::memcmp(alone.data(), all.data() + static_cast<size_t>(strip) * per_strip * groups * c.stride,
                      alone.size() * 4),
          0);
    }
}

TEST_F(ScoreTiles, StagedKeysAreTheDecodedOnes) {
  for (const KeyFormat format :
       {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4})
    for (const int key_heads : {1, kSelectorHeads}) {
      const std::vector<int32_t> lengths = {draw(1, 80), 0, draw(1, 80)}, begins = {0, 90, 100};
      const int pool = 20, width = 6, key_tokens = 190;
      std::vector<int32_t> table(3 * width);
      std::iota(table.begin(), table.end(), 0);
      std::shuffle(table.begin(), table.end(), random_);
      const float global_scale = format == KeyFormat::nvfp4 ? 0.37f : 1.0f;
      std::vector<uint8_t> pages(static_cast<size_t>(pool) * page_bytes(format, key_heads), 0xff);
      std::vector<float> want(static_cast<size_t>(key_heads) * key_tokens * kKeyDim, std::nanf(""));
      for (int s = 0; s < 3; ++s)
        for (int t = 0; t < lengths[s]; ++t)
          for (int h = 0; h < key_heads; ++h) {
            uint8_t* page =
                pages.data() + (static_cast<size_t>(table[s * width + t / kPageTokens]) * key_heads + h) *
                                   page_head_bytes(format);
            encode_key(format, normals(kKeyDim).data(), t % kPageTokens, page, global_scale);
            decode_key(format, page, t % kPageTokens,
                       want.data() + (static_cast<size_t>(h) * key_tokens + begins[s] + t) * kKeyDim,
                       global_scale);
          }
      const Buffer<uint8_t> device_pages(pages);
      const Buffer<int32_t> device_table(table), device_lengths(lengths), device_begins(begins);
      const Buffer<uint16_t> keys(want.size());
      StageKeysParams p;
      p.format = format, p.key_heads = key_heads, p.pages = device_pages.data(),
      p.global_scale = global_scale;
      p.sequences = 3, p.page_table = device_table.data(), p.page_table_stride = width;
      p.lengths = device_lengths.data(), p.longest = 80, p.key_begins = device_begins.data();
      p.keys = keys.data(), p.key_tokens = key_tokens;
      check(stage_keys(p, nullptr));
      const std::vector<uint16_t> got = keys.download();
      for (size_t i = 0; i < want.size(); ++i)
        ASSERT_EQ(got[i], std::isnan(want[i]) ? 0xffff : float_to_bf16(want[i]))
            << static_cast<int>(format) << " " << i;
    }
}

}  // namespace
}  // namespace spot::kernels
