#include "benchmark/prefill_layer.h"

#include <ATen/ops/_scaled_dot_product_flash_attention.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention/dense.h"
#include "attention/tile_prefill.h"
#include "benchmark/span_timer.h"
#include "core/error.h"
#include "kernels/query_tiles.h"
#include "ops/selector/selector.h"

namespace spot {
namespace {

const char* name_of(TileStage stage) {
  switch (stage) {
    case TileStage::none:
      return "";
    case TileStage::stage_keys:
      return "stage_keys";
    case TileStage::score:
      return "score";
    case TileStage::select:
      return "select";
    case TileStage::attend:
      return "attend";
  }
  return "";
}

// What a layer reads of the prompt; the queries serve every chunk.
struct Scene {
  at::Tensor keys, values;  // [num_kv_heads, pages, 16, head_dim]
  at::Tensor page_table;    // [1, pages] int32
  at::Tensor query;         // [chunk, num_heads, head_dim]
  at::Tensor selector_query, selector_weight;
  std::map<KeyFormat, at::Tensor> selector_keys;
};

Scene make_scene(const ModelConfig& m, const SelectorConfig& selector, const std::vector<MethodSpec>& methods,
                 const PrefillChunks& chunks, const PrefillLayerOptions& options) {
  constexpr int64_t kCommon = 128;
  const auto numbers = at::TensorOptions(options.device).dtype(options.dtype);
  const int64_t pages = (chunks.length + kBlockSize - 1) / kBlockSize,
                rows = std::min(chunks.chunk, chunks.length),
                groups = selector.scope == SelectorScope::layer ? 1 : m.num_kv_heads;
  Scene scene;
  scene.keys = at::randn({m.num_kv_heads, pages, kBlockSize, m.head_dim}, numbers);
  scene.values = at::randn_like(scene.keys);
  scene.page_table = at::arange(pages, numbers.dtype(at::kInt)).unsqueeze(0);
  scene.query = at::randn({rows, m.num_heads, m.head_dim}, numbers);
  const at::Tensor common =
      at::randn({(rows + kCommon - 1) / kCommon, selector.num_heads, selector.head_dim}, numbers)
          .repeat_interleave(kCommon, 0)
          .slice(0, 0, rows);
  scene.selector_query = (common + at::randn_like(common)) * std::sqrt(0.5);
  scene.selector_weight = at::rand({rows, groups, selector.num_heads}, numbers.dtype(at::kFloat));
  for (const MethodSpec& method : methods) {
    const KeyFormat format = method.cache_format.value_or(selector.cache_format);
    at::Tensor& pool = scene.selector_keys[format];
    if (pool.defined()) continue;
    pool = at::zeros({pages, selector.key_heads, kernels::page_head_bytes(format)}, numbers.dtype(at::kByte));
    for (int64_t start = 0; start < chunks.length; start += chunks.chunk) {
      const int64_t count = std::min(chunks.chunk, chunks.length - start);
      ops::selector_key_append({pool, at::arange(start, start + count, numbers.dtype(at::kLong)),
                                at::randn({count, selector.key_heads, selector.head_dim}, numbers), format});
    }
  }
  return scene;
}

double visible_pairs(const PrefillChunks& chunks) {
  return 0.5 * static_cast<double>(chunks.length) * static_cast<double>(chunks.length + 1);
}

using Seconds = std::map<std::string, double>;

// Rounds over the chunks that are run. attend(start, count, timer) does the work of a chunk.
Seconds measure(const PrefillChunks& chunks, const PrefillLayerOptions& options,
                const std::function<void()>& tick,
                const std::function<void(int64_t, int64_t, SpanTimer&)>& attend) {
  SpanTimer timer(options.device);
  std::vector<std::pair<double, Seconds>> rounds;
  for (int64_t round = 0; round <= options.rounds; ++round) {
    std::map<std::string, std::vector<double>> by_stage;
    for (const int64_t index : chunks.run) {
      attend(index * chunks.chunk, chunks.tokens(index), timer);
      for (const auto& [stage, seconds] : timer.take()) by_stage[stage].push_back(seconds);
      if (tick) tick();
    }
    if (round == 0) continue;
    auto& [total, whole] = rounds.emplace_back();
    for (const auto& [stage, values] : by_stage) total += whole[stage] = chunks.sum(values);
  }
  const auto middle = rounds.begin() + static_cast<std::ptrdiff_t>(rounds.size() / 2);
  std::nth_element(rounds.begin(), middle, rounds.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  return middle->second;
}

}  // namespace

double PrefillChunks::sum(const std::vector<double>& values) const {
  double total = values.empty() ? 0 : values.back();
  for (size_t i = 0; i + 1 < values.size(); ++i) {
    const auto between = static_cast<double>(run[i + 1] - run[i]);
    total += values[i] + 0.5 * (values[i] + values[i + 1]) * (between - 1);
  }
  return total;
}

PrefillChunks spread_chunks(int64_t length, int64_t chunk, int64_t most) {
  constexpr int64_t kStrip = kernels::kStripQueries;
  if (length < kStrip || length % kStrip != 0)
    fail("a prefill of {} tokens cannot be measured; give a positive multiple of {}", length, kStrip);
  if (chunk < kStrip || chunk % kStrip != 0)
    fail("chunks of {} tokens cannot be measured; give a positive multiple of {}", chunk, kStrip);
  if (most == 1) fail("one chunk does not say what a whole prefill takes; run at least 2, or all");
  PrefillChunks chunks{length, chunk, {}};
  const int64_t count = chunks.count();
  if (most <= 0 || most >= count) {
    chunks.run.resize(static_cast<size_t>(count));
    std::iota(chunks.run.begin(), chunks.run.end(), 0);
    return chunks;
  }
  if (length % chunk != 0)
    fail("{} of the chunks of {} tokens stand for all, but {} tokens are no whole number of them", most,
         chunk, length);
  for (int64_t i = 0; i < most; ++i) chunks.run.push_back(i * (count - 1) / (most - 1));
  return chunks;
}

double PrefillLayerRow::total() const {
  double sum = 0;
  for (const auto& [stage, s] : seconds) sum += s;
  return sum;
}

double attention_flop(const ModelConfig& model) {
  return 4 * static_cast<double>(model.num_heads * model.head_dim);
}
double score_flop(const SelectorConfig& selector) {
  return 2 * static_cast<double>(selector.num_heads * selector.head_dim);
}

int64_t prefill_layer_ticks(const std::vector<MethodSpec>& methods, const PrefillChunks& chunks,
                            const PrefillLayerOptions& options) {
  const auto rows = 1 + (options.flash && options.device.is_cuda()) + methods.size();
  return static_cast<int64_t>(rows * chunks.run.size()) * (options.rounds + 1);
}

std::vector<PrefillLayerRow> measure_prefill_layer(const ModelConfig& model, const SelectorConfig& selector,
                                                   const std::vector<MethodSpec>& methods,
                                                   const PrefillChunks& chunks,
                                                   const PrefillLayerOptions& options,
                                                   const std::function<void()>& tick) {
  for (const MethodSpec& method : methods)
    if (method.word != "spot")
      fail("'{}' has no prefill in tiles to measure; give spot with its settings", method.name);
  const Scene scene = make_scene(model, selector, methods, chunks, options);
  const double scale = 1 / std::sqrt(static_cast<double>(model.head_dim));
  std::vector<PrefillLayerRow> rows;

  const auto dense = [&](const char* name, const auto& attend) {
    PrefillLayerRow& row = rows.emplace_back();
    row.name = name;
    row.attended = row.visible = visible_pairs(chunks);
    row.seconds = measure(chunks, options, tick, [&](int64_t start, int64_t count, SpanTimer& timer) {
      timer.mark("attend");
      attend(scene.query.narrow(0, 0, count), view_tokens(scene.keys, 0, start + count),
             view_tokens(scene.values, 0, start + count), start);
    });
  };
  dense("dense", [&](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, int64_t start) {
    causal_attention(query, key, value, start, scale);
  });
  if (options.flash && options.device.is_cuda())
    dense("dense, flash", [&](const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                              int64_t) {
      at::_scaled_dot_product_flash_attention(query.transpose(0, 1).unsqueeze(0), key.unsqueeze(0),
                                              value.unsqueeze(0), 0.0, /*is_causal=*/true, false, scale);
    });

  for (const MethodSpec& method : methods) {
    TilePrefill prefill;
    prefill.pools = {scene.keys, scene.values};
    prefill.page_table = scene.page_table;
    prefill.scale = scale;
    prefill.format = method.cache_format.value_or(selector.cache_format);
    prefill.selector_pool = scene.selector_keys.at(prefill.format);
    prefill.rule = method.rule;
    prefill.tile_queries = method.query_tile > 0 ? method.query_tile : default_query_tile(options.device);
    const auto at_chunk = [&](int64_t start, int64_t count) {
      prefill.starts = {start}, prefill.counts = {count};
      prefill.query = scene.query.narrow(0, 0, count);
      prefill.selector_query = scene.selector_query.narrow(0, 0, count);
      prefill.selector_weight = scene.selector_weight.narrow(0, 0, count);
    };
    PrefillLayerRow& row = rows.emplace_back();
    row.name = method.name;
    row.tile = prefill.tile_queries;
    row.visible = visible_pairs(chunks);
    row.seconds = measure(chunks, options, tick, [&](int64_t start, int64_t count, SpanTimer& timer) {
      at_chunk(start, count);
      prefill_in_tiles(prefill, {}, [&](TileStage stage) { timer.mark(name_of(stage)); });
    });
    std::vector<double> attended;
    for (const int64_t index : chunks.run) {
      at_chunk(index * chunks.chunk, chunks.tokens(index));
      double& pairs = attended.emplace_back();
      prefill_in_tiles(prefill, [&](const at::Tensor& tiles, const Selection& selection) {
        pairs += count_tile_tokens(tiles, selection)[1].item<double>();
      });
    }
    row.attended = chunks.sum(attended);
  }
  return rows;
}

}  // namespace spot
