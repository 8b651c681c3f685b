// spot bench prefill: one layer's prefill attention, stage by stage, and a whole model's time to the first token, dense
// and sparse.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "benchmark/device.h"
#include "benchmark/prefill_layer.h"
#include "benchmark/prefill_model.h"
#include "benchmark/stage_timer.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/progress.h"
#include "report/page.h"

namespace spot::cli {
namespace {

struct BenchPrefillOptions {
  ModelOptions model;
  std::vector<int64_t> lengths = {16384, 32768, 65536, 131072, 262144, 524288};
  std::vector<std::string> attentions = {"spot:k=4096"};
  int64_t chunk = 8192, chunks = 0, rounds = 2;
  std::string preset = "spot", out, page;
  bool random = false, flash = false, no_model = false, no_layer = false;
};

// One length: what a layer and the whole model took.
struct Measured {
  PrefillChunks chunks;
  std::vector<PrefillLayerRow> layer;
  std::vector<PrefillModelRow> model;
};

// What rates are told by.
struct Yardstick {
  double tflops = 0;            // of a large product
  double attention, score;      // operations of a pair of query and token
  double products;              // of a token
  double products_seconds = 0;  // of a chunk's tokens
};

double tera(double operations, double seconds) {
  return seconds > 0 ? 1e-12 * operations / seconds : 0;
}

std::string times(double reference, double seconds) {
  return fmt::format("{:.2f}x", reference / seconds);
}

std::string milliseconds(const std::map<std::string, double>& seconds, const char* stage) {
  const auto found = seconds.find(stage);
  return found == seconds.end() ? "-" : fmt::format("{:.3f}", 1e3 * found->second);
}

double of(const std::map<std::string, double>& seconds, const char* stage) {
  const auto found = seconds.find(stage);
  return found == seconds.end() ? 0 : found->second;
}

std::string tokens_run(const PrefillChunks& chunks) {
  return chunks.whole()
             ? fmt::format("{}", chunks.length)
             : fmt::format("{} ({} of {} chunks)", chunks.length, chunks.run.size(), chunks.count());
}

Table layer_table(const std::vector<Measured>& all, const Yardstick& yard) {
  Table table{{"tokens", "attention of a layer", "tile", "density", "stage keys ms", "score ms", "TFLOP/s",
               "select ms", "attend ms", "TFLOP/s", "of peak", "together ms", "dense /"},
              {}};
  for (const Measured& m : all)
    for (const PrefillLayerRow& row : m.layer) {
      const double rate = tera(yard.attention * row.attended, of(row.seconds, "attend")),
                   score = tera(yard.score * row.visible, of(row.seconds, "score"));
      table.rows.push_back(
          {tokens_run(m.chunks), row.name, row.tile > 0 ? fmt::format("{}", row.tile) : "-",
           fmt::format("{:.1f}%", 100 * row.density()), milliseconds(row.seconds, "stage_keys"),
           milliseconds(row.seconds, "score"), row.tile > 0 ? fmt::format("{:.4g}", score) : "-",
           milliseconds(row.seconds, "select"), milliseconds(row.seconds, "attend"),
           fmt::format("{:.4g}", rate), fmt::format("{:.0f}%", 100 * rate / yard.tflops),
           fmt::format("{:.3f}", 1e3 * row.total()), times(m.layer.front().total(), row.total())});
    }
  return table;
}

Table model_table(const std::vector<Measured>& all, const Yardstick& yard) {
  Table table{{"tokens", "prefill", "first token s", "tokens/s", "attention s", "rest s", "rest's share",
               "products TFLOP/s", "of peak", "peak GiB", "dense /"},
              {}};
  for (const Measured& m : all)
    for (const PrefillModelRow& row : m.model) {
      const double length = static_cast<double>(m.chunks.length),
                   rate = tera(yard.products * length, row.rest);
      table.rows.push_back({tokens_run(m.chunks), row.name, fmt::format("{:.3f}", row.seconds),
                            fmt::format("{:.0f}", length / row.seconds), fmt::format("{:.3f}", row.attention),
                            fmt::format("{:.3f}", row.rest),
                            fmt::format("{:.0f}%", 100 * row.rest / row.seconds), fmt::format("{:.4g}", rate),
                            fmt::format("{:.0f}%", 100 * rate / yard.tflops),
                            row.peak_gib > 0 ? fmt::format("{:.2f}", row.peak_gib) : "-",
                            times(m.model.front().seconds, row.seconds)});
    }
  return table;
}

nlohmann::json to_json(const Measured& m, const Yardstick& yard) {
  nlohmann::json json = {{"tokens", m.chunks.length},
                         {"chunks", m.chunks.count()},
                         {"chunks_run", m.chunks.run.size()},
                         {"layer", nlohmann::json::array()},
                         {"model", nlohmann::json::array()}};
  for (const PrefillLayerRow& row : m.layer)
    json["layer"].push_back(
        {{"name", row.name},
         {"tile", row.tile},
         {"density", row.density()},
         {"seconds", row.seconds},
         {"together_seconds", row.total()},
         {"score_tflops", tera(yard.score * row.visible, of(row.seconds, "score"))},
         {"attend_tflops", tera(yard.attention * row.attended, of(row.seconds, "attend"))},
         {"over_dense", m.layer.front().total() / row.total()}});
  for (const PrefillModelRow& row : m.model)
    json["model"].push_back(
        {{"name", row.name},
         {"sparse_prefill", row.sparse},
         {"first_token_seconds", row.seconds},
         {"attention_seconds", row.attention},
         {"rest_seconds", row.rest},
         {"rest_tflops", tera(yard.products * static_cast<double>(m.chunks.length), row.rest)},
         {"peak_gib", row.peak_gib},
         {"over_dense", m.model.front().seconds / row.seconds}});
  return json;
}

// Times as fast as dense, against length: a line a method.
template <typename Row, typename Seconds>
LineChart chart(const std::vector<Measured>& all, const std::string& title, std::vector<Row> Measured::* rows,
                Seconds seconds) {
  LineChart chart{title, "tokens", "times as fast as dense", {}, true, false, true};
  for (const Measured& m : all)
    for (size_t i = 1; i < (m.*rows).size(); ++i) {
      const Row &dense = (m.*rows)[0], &row = (m.*rows)[i];
      auto found = std::find_if(chart.series.begin(), chart.series.end(),
                                [&](const Series& series) { return series.name == row.name; });
      if (found == chart.series.end()) found = chart.series.insert(found, {row.name, {}, {}, false});
      found->x.push_back(static_cast<double>(m.chunks.length));
      found->y.push_back(seconds(dense) / seconds(row));
    }
  return chart;
}

void write(const BenchPrefillOptions& options, const std::string& description, nlohmann::json json,
           const std::vector<Measured>& all, const Yardstick& yard) {
  for (const Measured& m : all) json["lengths"].push_back(to_json(m, yard));
  if (!options.out.empty()) write_file_atomically(options.out, json.dump(1) + "\n");
  if (options.page.empty()) return;
  Page page("Prefill");
  page.paragraph(description);
  const auto part = [&](const char* heading, const LineChart& lines, const Table& table) {
    if (table.rows.empty()) return;
    page.heading(heading);
    if (!lines.series.empty()) page.chart(lines);
    page.add(table);
  };
  part("Attention of one layer",
       chart(all, "Attention of a layer, selection included", &Measured::layer,
             [](const PrefillLayerRow& row) { return row.total(); }),
       layer_table(all, yard));
  part("Time to the first token",
       chart(all, "Whole model, time to the first token", &Measured::model,
             [](const PrefillModelRow& row) { return row.seconds; }),
       model_table(all, yard));
  write_file_atomically(options.page, page.html());
}

std::vector<MethodSpec> parse_methods(const BenchPrefillOptions& options, const SelectorConfig& selector) {
  std::vector<MethodSpec> methods;
  for (const std::string& text : join_methods(options.attentions)) {
    MethodSettings base;
    base.prefill = PrefillMode::sparse;
    const MethodSpec& method = methods.emplace_back(parse_method(text, base, &selector));
    if (method.word != "spot" || method.prefill != PrefillMode::sparse)
      throw UsageError(fmt::format(
          "--attention {}: only spot's sparse prefill is measured, beside dense attention", text));
  }
  return methods;
}

void run_bench_prefill(BenchPrefillOptions options) {
  const c10::InferenceMode inference;
  ModelConfig config = options.model.prepare();
  const SelectorConfig selector_config = SelectorConfig::from_preset(options.preset);
  const std::vector<MethodSpec> methods = parse_methods(options, selector_config);
  std::vector<Measured> all;
  for (const int64_t length : options.lengths) {
    if (length > config.max_position_embeddings && options.random)
      config.max_position_embeddings = length;  // the shapes are what is measured
    if (length > config.max_position_embeddings)
      fail("{} tokens pass the model's limit of {} positions; ask for less, or for --random weights", length,
           config.max_position_embeddings);
    all.push_back({spread_chunks(length, std::min(options.chunk, length), options.chunks), {}, {}});
  }
  const at::Device device = options.model.resolve_device();
  const at::ScalarType dtype = options.model.resolve_dtype(config);
  const PrefillLayerOptions layer{
      .dtype = dtype, .device = device, .rounds = options.rounds, .flash = options.flash};
  Yardstick yard{.tflops = matmul_tflops(device, dtype),
                 .attention = attention_flop(config),
                 .score = score_flop(selector_config),
                 .products = products_flop(config)};
  const int64_t tokens =
      std::min(options.chunk, *std::max_element(options.lengths.begin(), options.lengths.end()));
  yard.products_seconds = measure_products(config, tokens, dtype, device);
  const double products_rate = tera(yard.products * static_cast<double>(tokens), yard.products_seconds);
  const std::string description = fmt::format(
      "Prefill of {} shapes ({} of {} layers with attention: {} heads on {} of {}) on {}, {}, chunks of {} tokens. A "
      "product of large square matrices: {:.4g} TFLOP/s; the model's own, {} tokens at once: {:.4g} TFLOP/s ({:.0f}%), "
      "{:.4g} s a prompt of 131072. A layer's attention on random data, the median of {} rounds; dense is what dense "
      "prefill runs{}. TFLOP/s of attention count the pairs of query and token that are attended. Time to the first "
      "token: the faster of {} rounds, {} weights; attention holds the selector's work, the rest everything else.",
      config.architecture, config.full_attention_layers().size(), config.num_layers, config.num_heads,
      config.num_kv_heads, config.head_dim, describe_device(device), c10::toString(dtype), options.chunk,
      yard.tflops, tokens, products_rate, 100 * products_rate / yard.tflops,
      yard.products_seconds * 131072 / static_cast<double>(tokens), options.rounds,
      device.is_cuda() ? " (cuDNN where torch has it)" : "", options.rounds,
      options.random ? "random" : "the checkpoint's");
  fmt::print("{}\n", description);
  std::fflush(stdout);
  nlohmann::json json = {{"device", describe_device(device)},
                         {"dtype", std::string(c10::toString(dtype))},
                         {"description", description},
                         {"model", options.model.folder},
                         {"chunk", options.chunk},
                         {"matmul_tflops", yard.tflops},
                         {"products_tflops", products_rate},
                         {"products_seconds_a_token", yard.products_seconds / static_cast<double>(tokens)},
                         {"lengths", nlohmann::json::array()}};
  // The layer before the model: its shapes' plans are made by then.
  const auto keep = [&] { write(options, description, json, all, yard); };
  if (!options.no_layer) {
    for (Measured& m : all) {
      Progress progress(fmt::format("a layer, {} tokens", m.chunks.length),
                        prefill_layer_ticks(methods, m.chunks, layer));
      int64_t done = 0;
      m.layer = measure_prefill_layer(config, selector_config, methods, m.chunks, layer,
                                      [&] { progress.update(++done); });
      keep();
    }
    fmt::print("\n{}", layer_table(all, yard).to_text());
    std::fflush(stdout);
  }
  if (!options.no_model) {
    const Backbone backbone =
        options.random ? Backbone::random(config, device, dtype, 1) : options.model.load();
    Selector selector(selector_config, backbone.config(), device, dtype);
    selector.join(backbone);
    for (Measured& m : all) {
      Progress progress(fmt::format("first token, {} tokens", m.chunks.length),
                        static_cast<int64_t>((methods.size() + 1) * m.chunks.run.size()) * options.rounds);
      int64_t done = 0;
      const auto tick = [&] { progress.update(++done); };
      m.model.push_back(
          measure_prefill_model(backbone, &selector, MethodSpec{}, m.chunks, options.rounds, tick));
      for (const MethodSpec& method : methods)
        m.model.push_back(measure_prefill_model(backbone, &selector, method, m.chunks, options.rounds, tick));
      keep();
    }
    fmt::print("\n{}", model_table(all, yard).to_text());
  }
  keep();
}

}  // namespace

void add_bench_prefill(CLI::App& parent) {
  auto options = std::make_shared<BenchPrefillOptions>();
  CLI::App& command = *parent.add_subcommand(
      "prefill",
      "Prefill, dense and sparse: a layer's attention by stages, a model's time to the first token");
  options->model.add(command);
  command.add_flag("--random", options->random, "Random weights of the shapes in MODEL/config.json");
  command.add_option("--lengths", options->lengths, "Tokens of the prompt, multiples of 64")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 30))
      ->capture_default_str();
  command.add_option("--chunk", options->chunk, "Tokens a forward call, a multiple of 64")
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 24))
      ->capture_default_str();
  command
      .add_option(
          "--chunks", options->chunks,
          "Run so many chunks of a longer prompt, evenly spread, and tell the others' times by them (0: all)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option(
          "--attention", options->attentions,
          "Settings of spot to measure beside dense attention: spot:k=4096, spot:k=10%,tile=64 ... (" +
              method_grammar() + ")")
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--preset", options->preset, "Preset of the (untrained) selector")
      ->capture_default_str();
  command.add_option("--rounds", options->rounds, "Rounds of each measurement, after what warms up")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_flag("--flash", options->flash, "On a GPU torch's flash attention too");
  auto* no_model = command.add_flag("--no-model", options->no_model, "The layer alone");
  command.add_flag("--no-layer", options->no_layer, "The whole model alone")->excludes(no_model);
  command.add_option("--out", options->out, "JSON file for the numbers")->check(output_file());
  command.add_option("--page", options->page, "HTML file with tables and charts")->check(output_file());
  command.callback([options, &command] {
    check_needs(command, {});
    run_bench_prefill(*options);
  });
}

}  // namespace spot::cli
