#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "attention/tile_prefill.h"
#include "core/error.h"
#include "ops/selector/selector.h"
#include "selector/cache.h"
#include "tests/attention/support.h"

using namespace spot;
using namespace spot::test;

namespace {

// A batch of chunks over scattered pages.
TilePrefill draw_prefill(int64_t groups) {
  TilePrefill p;
  int64_t width = 0, rows = 0;
  for (int i = 0; i < 3; ++i) {
    p.starts.push_back(i == 0 ? 0 : random_int(0, 150));
    p.counts.push_back(i == 1 ? random_int(0, 1) : random_int(60, 200));
    width = std::max(width, (p.starts.back() + p.counts.back() + 15) / 16);
    rows += p.counts.back();
  }
  const int64_t pages = 3 * width + 2;
  p.page_table = at::randperm(pages, at::kInt).slice(0, 0, 3 * width).view({3, width});
  p.query = at::randn({rows, 4, 32});
  p.pools.keys = at::randn({2, pages, 16, 32});
  p.pools.values = at::randn({2, pages, 16, 32});
  p.scale = 0.2;
  p.selector_query = at::randn({rows, 4, 128});
  p.selector_weight = at::randn({rows, groups, 4});
  p.selector_pool = at::zeros({pages, 1, kernels::page_head_bytes(ops::KeyFormat::bf16)}, at::kByte);
  ops::selector_key_append(
      {p.selector_pool, at::arange(pages * 16), at::randn({pages * 16, 1, 128}), ops::KeyFormat::bf16});
  p.rule.mode = SelectionMode::top_k;
  p.rule.sinks = 16;
  p.rule.recency = 0;
  p.rule.floor = 48;
  p.rule.budget = 96;
  p.tile_queries = 16 << random_int(0, 2);
  return p;
}

// Most bytes that CPU tensors of this thread have held at once since it was made.
class PeakBytes : public c10::MemoryReportingInfoBase {
 public:
  bool memoryProfilingEnabled() const override { return true; }
  void reportMemoryUsage(void*, int64_t bytes, size_t, size_t, c10::Device) override {
    now_ += bytes;
    peak = std::max(peak, now_);
  }
  int64_t peak = 0;

 private:
  int64_t now_ = 0;
};

}  // namespace

TEST(TilePrefill, EveryBlockIsDenseAttention) {
  fresh_seed();
  TilePrefill p = draw_prefill(1);
  p.rule.budget = 1 << 20;
  const at::Tensor got = prefill_in_tiles(p);
  int64_t row = 0;
  for (size_t i = 0; i < p.starts.size(); ++i) {
    const int64_t start = p.starts[i], count = p.counts[i], length = start + count;
    const auto of = [&](const at::Tensor& pool) {
      return pool.index_select(1, p.page_table[i].to(at::kLong))
          .flatten(1, 2)
          .slice(1, 0, length)
          .repeat_interleave(2, 0);
    };
    const at::Tensor mask = at::arange(length) <= at::arange(start, length).unsqueeze(1);
    const at::Tensor want = at::scaled_dot_product_attention(
        p.query.narrow(0, row, count).transpose(0, 1).to(at::kDouble),
        of(p.pools.keys.stored).to(at::kDouble), of(p.pools.values.stored).to(at::kDouble), mask, 0.0, false,
        p.scale);
    if (count > 0) {
      EXPECT_LT(largest_difference(got.narrow(0, row, count), want.transpose(0, 1)), 1e-5);
    }
    row += count;
  }
}

// Of codes the kernels get numbers in pages of their own.
TEST(TilePrefill, CodesAreReadAsTheirNumbers) {
  fresh_seed();
  for (int round = 0; round < 4; ++round) {
    TilePrefill p = draw_prefill(round % 2 + 1);
    TilePrefill codes = p;
    const auto encode = [](TokenPool& numbers, TokenPool& pool) {
      const at::Tensor scale = at::exp2(at::randint(-6, 0, {2}).to(at::kFloat)),
                       wide = scale.view({2, 1, 1, 1});
      pool = {(numbers.stored / wide).to(at::kFloat8_e4m3fn), scale, at::kFloat};
      numbers = pool.stored.to(at::kFloat) * wide;
    };
    encode(p.pools.keys, codes.pools.keys);
    encode(p.pools.values, codes.pools.values);
    EXPECT_TRUE(at::equal(prefill_in_tiles(codes), prefill_in_tiles(p)));
  }
}

TEST(TilePrefill, PiecesAndNeighboursDoNotMatterAndOwnBlocksAreKept) {
  fresh_seed();
  for (int64_t groups : {1, 2}) {
    TilePrefill p = draw_prefill(groups);
    int64_t tiles_seen = 0;
    const at::Tensor whole = prefill_in_tiles(p);
    p.most_bytes = 1;  // a strip at a time
    const at::Tensor strips = prefill_in_tiles(p, [&](const at::Tensor& tiles, const Selection& selection) {
      const auto tile = tiles.accessor<const int32_t, 2>();
      ASSERT_EQ(selection.rows(), tiles.size(0));
      tiles_seen += tiles.size(0);
      for (int64_t i = 0; i < tiles.size(0); ++i)
        for (int64_t g = 0; g < groups; ++g) {
          const at::Tensor list = selection.indices[i][g].slice(0, 0, selection.counts[i][g].item<int32_t>());
          if (tile[i][2] == 0) {
            EXPECT_EQ(list.numel(), 0);
            continue;
          }
          for (int64_t b = tile[i][3] / 16; b * 16 < tile[i][3] + tile[i][2]; ++b)
            EXPECT_TRUE(list.eq(b).any().item<bool>()) << "tile " << i << " without its own block " << b;
          EXPECT_LE(list.numel(), std::max<int64_t>(6, p.tile_queries / 16 + 2));
        }
    });
    EXPECT_TRUE(at::equal(strips, whole));
    EXPECT_EQ(tiles_seen, query_tiles(p.starts, p.counts, p.tile_queries).size(0));
    // Each sequence alone, and the first one in two chunks.
    int64_t row = 0;
    for (size_t i = 0; i < p.starts.size(); ++i) {
      const int64_t count = p.counts[i], cut = i == 0 ? count / 2 / 64 * 64 : 0;
      for (const auto& [from, to] : {std::pair<int64_t, int64_t>{0, cut}, {cut, count}}) {
        if (from == to) continue;
        TilePrefill one = p;
        const auto part = [&](const at::Tensor& x) { return x.slice(0, row + from, row + to); };
        one.query = part(p.query), one.selector_query = part(p.selector_query);
        one.selector_weight = part(p.selector_weight);
        one.page_table = p.page_table.slice(0, static_cast<int64_t>(i), static_cast<int64_t>(i) + 1);
        one.starts = {p.starts[i] + from}, one.counts = {to - from};
        EXPECT_TRUE(at::equal(prefill_in_tiles(one), part(whole))) << "sequence " << i << " from " << from;
      }
      row += count;
    }
  }
}

// Counts against the rows of every query alone, and the stages in their order.
TEST(TilePrefill, CountsWhatItsQueriesAttendTo) {
  fresh_seed();
  for (int64_t groups : {1, 2}) {
    TilePrefill p = draw_prefill(groups);
    p.most_bytes = 1;
    const int64_t floor = random_int(0, 120);
    std::vector<TileStage> stages;
    int64_t pieces = 0;
    const auto observe = [&](const at::Tensor& tiles, const Selection& selection) {
      ++pieces;
      double queries = 0, kept = 0, seen = 0;
      const auto tile = tiles.accessor<const int32_t, 2>();
      for (int64_t i = 0; i < tiles.size(0); ++i)
        for (int64_t q = tile[i][3]; q < tile[i][3] + tile[i][2]; ++q) {
          if (q < floor) continue;
          const at::Tensor visible = at::full({1}, q + 1, at::kInt);
          const Selection row = rows_of_tiles(selection, at::full({1}, i, at::kLong), visible);
          const auto [attended, all] = count_tokens(row, visible);
          queries += 1, kept += attended.item<double>(), seen += all.item<double>();
        }
      const at::Tensor counts = count_tile_tokens(tiles, selection, floor);
      EXPECT_EQ(counts[0].item<double>(), queries);
      EXPECT_NEAR(counts[1].item<double>(), kept, 1e-9 * kept);
      EXPECT_EQ(counts[2].item<double>(), seen);
    };
    prefill_in_tiles(p, observe, [&](TileStage stage) { stages.push_back(stage); });
    std::vector<TileStage> want = {TileStage::stage_keys};
    for (int64_t i = 0; i < pieces; ++i)
      for (TileStage stage : {TileStage::score, TileStage::select, TileStage::attend, TileStage::none})
        want.push_back(stage);
    EXPECT_EQ(stages, want);
  }
}

// Scores and lists stay within most_bytes, unless one strip takes more, and no further strip would have fitted.
TEST(TilePrefill, PiecesAreAsLargeAsTheirMemoryAllows) {
  fresh_seed();
  for (int trial = 0; trial < 6; ++trial) {
    const int64_t groups = random_int(1, 2);
    TilePrefill p = draw_prefill(groups);
    p.most_bytes = random_int(1, 20) * 1000;
    const int64_t per_strip = 64 / p.tile_queries;
    struct Piece {
      int64_t strips, blocks, first_blocks;  // of its longest tile, and of its first strip's
    };
    std::vector<Piece> pieces;
    prefill_in_tiles(p, [&](const at::Tensor& tiles, const Selection&) {
      const auto tile = tiles.accessor<const int32_t, 2>();
      Piece piece{tiles.size(0) / per_strip, 0, 0};
      for (int64_t i = 0; i < tiles.size(0); ++i) {
        piece.blocks = std::max<int64_t>(piece.blocks, (tile[i][3] + tile[i][2] + 15) / 16);
        if (i == per_strip - 1) piece.first_blocks = piece.blocks;
      }
      pieces.push_back(piece);
    });
    const auto bytes = [&](int64_t strips, int64_t blocks) {
      return strips * per_strip * groups * blocks * 8;
    };
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Piece& piece = pieces[i];
      EXPECT_TRUE(piece.strips == 1 || bytes(piece.strips, piece.blocks) <= p.most_bytes);
      if (i + 1 < pieces.size()) {
        EXPECT_GT(bytes(piece.strips + 1, std::max(piece.blocks, pieces[i + 1].first_blocks)), p.most_bytes);
      }
    }
  }
}

// A chunk's memory grows with the tokens before it, not with their product with its tiles.
TEST(TilePrefill, MemoryGrowsWithLengthAlone) {
  fresh_seed();
  const auto peak = [](int64_t length, int64_t rows) {
    TilePrefill p;
    const int64_t pages = length / 16;
    p.page_table = at::arange(pages, at::kInt).unsqueeze(0);
    p.query = at::randn({rows, 2, 16});
    p.pools.keys = at::randn({1, pages, 16, 16});
    p.pools.values = at::randn({1, pages, 16, 16});
    p.starts = {length - rows}, p.counts = {rows};
    p.scale = 0.25;
    p.selector_query = at::randn({rows, 4, 128});
    p.selector_weight = at::randn({rows, 1, 4});
    p.selector_pool = at::zeros({pages, 1, kernels::page_head_bytes(ops::KeyFormat::int4)}, at::kByte);
    p.format = ops::KeyFormat::int4;
    p.rule.mode = SelectionMode::top_k;
    p.rule.budget = 512;
    p.tile_queries = 16;
    p.most_bytes = 1 << 16;
    auto bytes = std::make_shared<PeakBytes>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, bytes);
    prefill_in_tiles(p);
    return static_cast<double>(bytes->peak);
  };
  const double one = peak(4096, 128);
  EXPECT_GT(one, 4096 * 128 * 2);  // the staged keys at least
  EXPECT_LT(peak(16384, 128), 4.2 * one);
  // Eight times the tiles bring their queries' own rows, nothing for each token before them.
  const double rows = 1024 * (4 * 128 + 2 * 2 * 16) * 4;
  EXPECT_LT(peak(4096, 1024), one + 2 * rows);
}

// What sparse prefill keeps of each token beside keys and values, on the shapes of bench/configs.
TEST(TilePrefill, KeepsATenthOfTheCacheAtMost) {
  int shapes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("bench/configs")) {
    const ModelConfig config = ModelConfig::load(entry.path());
    ModelCache cache(config, 1, at::kBFloat16, at::kCPU, 1);
    const int64_t dense = cache.pools().page_bytes();
    const SelectorCache keys(SelectorConfig{}, config.full_attention_layers(), cache.pools(),
                             KeyFormat::int4);
    EXPECT_LE(cache.pools().page_bytes() - dense, dense / 10) << entry.path();
    ++shapes;
  }
  EXPECT_GE(shapes, 5);
}

TEST(TilePrefill, RefusesOtherTiles) {
  EXPECT_THROW(query_tiles({0}, {10}, 8), Error);
}
