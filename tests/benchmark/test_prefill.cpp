#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <set>
#include <thread>

#include "benchmark/prefill_layer.h"
#include "benchmark/prefill_model.h"
#include "benchmark/span_timer.h"
#include "core/error.h"
#include "model/weights.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

using namespace spot;
using test::random_int;

namespace {

MethodSpec spot_with(int32_t budget, int64_t tile = 0) {
  MethodSettings settings;
  settings.budget = budget, settings.sinks = 16, settings.recency = 32, settings.floor = 64;
  settings.prefill = PrefillMode::sparse;
  if (tile > 0) settings.tile = tile;
  return make_spec("spot", settings, nullptr);
}

}  // namespace

TEST(PrefillChunks, SomeStandForAllWhereTimesLieOnALine) {
  test::fresh_seed();
  for (int trial = 0; trial < 50; ++trial) {
    const int64_t chunk = 64 * random_int(1, 5), count = random_int(3, 40), most = random_int(2, 45);
    const PrefillChunks chunks = spread_chunks(chunk * count, chunk, most);
    ASSERT_EQ(static_cast<int64_t>(chunks.run.size()), std::min(most, count));
    EXPECT_EQ(chunks.run.front(), 0);
    EXPECT_EQ(chunks.run.back(), count - 1);
    EXPECT_EQ(std::set<int64_t>(chunks.run.begin(), chunks.run.end()).size(), chunks.run.size());
    EXPECT_EQ(chunks.whole(), most >= count);
    const auto time = [](int64_t index) { return 3.25 + 0.5 * static_cast<double>(index); };
    std::vector<double> run;
    double want = 0;
    for (const int64_t index : chunks.run) run.push_back(time(index));
    for (int64_t index = 0; index < count; ++index) want += time(index);
    EXPECT_NEAR(chunks.sum(run), want, 1e-9 * want);
  }
  const PrefillChunks ragged = spread_chunks(320, 128, 0);
  EXPECT_EQ(ragged.run, (std::vector<int64_t>{0, 1, 2}));
  EXPECT_EQ(ragged.tokens(1), 128);
  EXPECT_EQ(ragged.tokens(2), 64);
  EXPECT_EQ(ragged.sum({1, 10, 100}), 111);
}

TEST(PrefillChunks, RefusesWhatCannotBeMeasured) {
  EXPECT_THROW(spread_chunks(100, 64, 0), Error);
  EXPECT_THROW(spread_chunks(0, 64, 0), Error);
  EXPECT_THROW(spread_chunks(128, 96, 0), Error);
  EXPECT_THROW(spread_chunks(1024, 64, 1), Error);
  EXPECT_THROW(spread_chunks(320, 128, 2), Error);
}

TEST(SpanTimer, AddsUpTheSpansOfAName) {
  SpanTimer timer(at::kCPU);
  const auto sleep = [](int milliseconds) {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  };
  timer.mark("a"), sleep(4);
  timer.mark(""), sleep(40);
  timer.mark("b"), sleep(2);
  timer.mark("a"), sleep(4);
  const auto seconds = timer.take();
  ASSERT_EQ(seconds.size(), 2u);
  EXPECT_GE(seconds.at("a"), 0.008);
  EXPECT_GE(seconds.at("b"), 0.002);
  EXPECT_TRUE(timer.take().empty());
}

// Rows of the matrices as a checkpoint has them.
TEST(PrefillModel, CountsTheProductsOfEveryLayer) {
  for (const ModelConfig& config :
       {spot::testing::small_qwen3(), spot::testing::small_qwen3_5(), spot::testing::small_qwen2()}) {
    double want = 0;
    for (const TensorSpec& spec : tensor_specs(config))
      if (spec.shape.size() == 2 && spec.name.find("layers.") != std::string::npos)
        want += 2 * static_cast<double>(spec.shape[0] * spec.shape[1]);
    EXPECT_EQ(products_flop(config), want) << config.architecture;
    EXPECT_GT(measure_products(config, 64, at::kFloat, at::kCPU), 0);
  }
}

TEST(PrefillLayer, EveryRowHasItsStagesAndPairs) {
  test::fresh_seed();
  const ModelConfig config = spot::testing::small_qwen3();
  const int64_t length = 64 * random_int(9, 14), chunk = 64 * random_int(2, 4);
  const PrefillChunks chunks = spread_chunks(length, chunk, 0);
  const PrefillLayerOptions options{.dtype = at::kFloat, .rounds = 1};
  const std::vector<MethodSpec> methods = {spot_with(96), spot_with(96, 64), spot_with(1 << 20, 32)};
  int64_t ticks = 0;
  const auto rows =
      measure_prefill_layer(config, SelectorConfig{}, methods, chunks, options, [&] { ++ticks; });
  EXPECT_EQ(ticks, prefill_layer_ticks(methods, chunks, options));
  ASSERT_EQ(rows.size(), 4u);
  const double all = 0.5 * static_cast<double>(length * (length + 1));
  for (const PrefillLayerRow& row : rows) {
    double sum = 0;
    for (const auto& [stage, seconds] : row.seconds) {
      EXPECT_GT(seconds, 0) << row.name << " " << stage;
      sum += seconds;
    }
    EXPECT_EQ(row.seconds.size(), row.tile > 0 ? 4u : 1u) << row.name;
    EXPECT_NEAR(row.total(), sum, 1e-12);
    EXPECT_EQ(row.visible, all);
  }
  EXPECT_EQ(rows[0].name, "dense");
  EXPECT_EQ(rows[0].density(), 1);
  for (size_t i = 1; i < rows.size(); ++i) {
    EXPECT_EQ(rows[i].tile, (std::vector<int64_t>{16, 64, 32})[i - 1]);
    EXPECT_EQ(rows[i].name, methods[i - 1].name);
  }
  // With every block all pairs; with 96 tokens a tile no query more than these and its own tile.
  EXPECT_DOUBLE_EQ(rows[3].attended, all);
  for (size_t i : {1, 2}) {
    EXPECT_GT(rows[i].density(), 0);
    EXPECT_LE(rows[i].attended, static_cast<double>(length * std::max<int64_t>(96, 16 + rows[i].tile + 32)));
  }
  EXPECT_THROW(measure_prefill_layer(config, SelectorConfig{}, {MethodSpec{}}, chunks, options), Error);
}

TEST(PrefillModel, TimesAreOfTheWholePrompt) {
  const uint64_t seed = test::fresh_seed();
  for (const ModelConfig& config : {spot::testing::small_qwen3(), spot::testing::small_qwen3_5()}) {
    const Backbone backbone = Backbone::random(config, at::kCPU, at::kFloat, seed);
    const Selector selector(SelectorConfig{}, config, at::kCPU, at::kFloat, seed);
    for (const int64_t most : {0, 2}) {
      const PrefillChunks chunks = spread_chunks(256, 64, most);
      for (const MethodSpec& method : {MethodSpec{}, spot_with(96)}) {
        int64_t ticks = 0;
        const PrefillModelRow row =
            measure_prefill_model(backbone, &selector, method, chunks, 2, [&] { ++ticks; });
        EXPECT_EQ(ticks, 2 * (most == 0 ? 4 : 2));
        EXPECT_EQ(row.name, method.name);
        EXPECT_EQ(row.sparse, !method.is_dense());
        EXPECT_GT(row.attention, 0);
        EXPECT_GT(row.rest, 0);
        EXPECT_NEAR(row.seconds, row.attention + row.rest, 1e-9);
      }
    }
  }
}
