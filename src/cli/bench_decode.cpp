// spot bench decode: one layer's decode attention, stage by stage, beside dense attention, Quest and
// Twilight; on synthetic
// attention or on what a model's layers read.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "benchmark/decode_methods.h"
#include "benchmark/decode_record.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/text_file.h"
#include "report/page.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

struct BenchDecodeOptions {
  std::vector<int64_t> lengths = {8192, 16384, 32768, 65536, 131072, 262144, 524288}, batches = {1, 4, 16};
  std::vector<std::string> shapes;
  int64_t budget = 4096, rounds = 15, sets = 8;
  double candidates = 0.25, mass = 0.9, twilight_p = 0.95;
  AttentionStatistics statistics;
  std::string device = "auto", out, page, model, selector, text;
  uint64_t seed = 1;
};

// What is recorded from, where a model was named.
struct Source {
  Backbone backbone;
  Selector selector;
  std::vector<int32_t> text;
};

// Bytes that a set must touch in each call so that a last-level cache of 50 MB does not hold several.
constexpr double kCold = 150e6;

struct Run {
  DecodeMethod method;
  std::map<std::string, double> us;  // by stage
};

struct Setting {
  DecodeShape shape;
  int64_t length, batch;
};

// All methods of one setting, measured together.
std::vector<Run> measure(const BenchDecodeOptions& options, const DecodeScene& scene, at::Device device) {
  std::vector<DecodeMethod> methods;
  if (device.is_cuda()) {
    methods.push_back(dense_torch(scene, "flash"));
    methods.push_back(dense_torch(scene, "cudnn"));
  } else {
    methods.push_back(dense_torch(scene, "sdpa"));
  }
  methods.push_back(dense_ours(scene));
  const int64_t budget = std::min(options.budget, scene.length());
  const SelectionRule& tiers = scene.tiers();
  const auto candidates =
      static_cast<int64_t>(options.candidates * static_cast<double>(scene.length())) / 16 * 16;
  std::vector<std::pair<const char*, std::optional<DecodeMethod>>> equal;
  for (const int64_t key_heads : {1, 4}) {
    if (!scene.has_selector(key_heads)) continue;
    methods.push_back(spot_method(scene, key_heads, top_k_rule(budget, tiers)));
    for (const double p : {0.7, 0.9}) {
      methods.push_back(spot_method(scene, key_heads, top_p_rule(p, tiers)));
      methods.back().name += fmt::format(", top-p {:g}", p);
    }
    equal.emplace_back(key_heads == 1 ? "spot, shared INT4" : "spot, per-head INT4",
                       spot_at_mass(scene, key_heads, options.mass));
  }
  methods.push_back(quest_method(scene, top_k_rule(budget, tiers)));
  methods.push_back(twilight_method(scene, top_k_rule(candidates, tiers), options.twilight_p));
  equal.emplace_back("Quest", quest_at_mass(scene, options.mass));
  equal.emplace_back("Twilight on Quest", twilight_at_mass(scene, options.mass));
  for (const auto& [name, method] : equal) {
    if (method)
      methods.push_back(*method);
    else
      fmt::print("{} does not reach mass {:g} with any setting\n", name, options.mass);
  }

  StageTimer timer(device, scene.sets(), options.rounds);
  std::vector<Run> runs;
  for (DecodeMethod& method : methods) {
    try {
      for (const DecodeStage& stage : method.stages) timer.add(method.name + "/" + stage.name, stage.work);
      runs.push_back({std::move(method), {}});
    } catch (const c10::OutOfMemoryError&) {
      throw;
    } catch (const c10::Error& e) {
      fmt::print("{}: not here ({})\n", method.name, std::string(e.what_without_backtrace()).substr(0, 160));
    }
  }
  const auto us = timer.measure();
  for (Run& run : runs)
    for (const DecodeStage& stage : run.method.stages)
      run.us[stage.name] = us.at(run.method.name + "/" + stage.name);
  return runs;
}

const Run* find(const std::vector<Run>& runs, const std::string& name) {
  for (const Run& run : runs)
    if (run.method.name == name) return &run;
  return nullptr;
}

std::string ratio_to(const std::vector<Run>& runs, const std::string& name, double us) {
  const Run* other = find(runs, name);
  return other ? fmt::format("{:.2f}x", other->us.at("step") / us) : "-";
}

// The mean over sets; for a model's layers with the least and the most.
std::string over_sets(double mean, const std::vector<double>& values, bool layers, int digits,
                      bool percent = false) {
  auto number = [&](double x) {
    return percent ? fmt::format("{:.{}f}%", 100 * x, digits) : fmt::format("{:.{}f}", x, digits);
  };
  const std::string text = number(mean);
  if (!layers || values.empty()) return text;
  const auto [least, most] = std::minmax_element(values.begin(), values.end());
  return fmt::format("{} ({} to {})", text, number(*least), number(*most));
}

Table stage_table(const std::vector<Run>& runs, const Bandwidth& bandwidth, const std::string& mass_suffix,
                  bool layers) {
  const bool gpu = find(runs, "dense, torch sdpa") == nullptr;
  Table table{{"method", "setting", "tokens", "mass", "stage", "us", "MB", "of read peak",
               gpu ? "flash /" : "sdpa /", "cuDNN /", "Quest /", "Twilight /"},
              {}};
  for (const Run& run : runs) {
    // Methods that were brought to one mass are compared with those of the same mass.
    const std::string same = run.method.name.find(" @ ") != std::string::npos ? mass_suffix : "";
    for (const DecodeStage& stage : run.method.stages) {
      const double us = run.us.at(stage.name);
      const bool step = stage.name == "step";
      auto over = [&](const std::string& name) { return step ? ratio_to(runs, name, us) : std::string(); };
      table.rows.push_back({run.method.name, step ? run.method.setting : "",
                            step ? over_sets(run.method.tokens, run.method.set_tokens, layers, 0) : "",
                            step ? over_sets(run.method.mass, run.method.set_mass, layers, 3) : "",
                            stage.name, fmt::format("{:.2f}", us), fmt::format("{:.2f}", stage.bytes * 1e-6),
                            fmt::format("{:.0f}%", 100 * stage.bytes / us * 1e6 / bandwidth.read),
                            over(gpu ? "dense, torch flash" : "dense, torch sdpa"),
                            over("dense, torch cudnn"), over("Quest" + same),
                            over("Twilight on Quest" + same)});
    }
  }
  return table;
}

nlohmann::json to_json(const Setting& setting, const DecodeScene& scene,
                       const std::vector<double>& concentration, const std::vector<Run>& runs) {
  nlohmann::json json = {{"shape", setting.shape.name},
                         {"num_heads", setting.shape.num_heads},
                         {"num_kv_heads", setting.shape.num_kv_heads},
                         {"head_dim", setting.shape.head_dim},
                         {"length", setting.length},
                         {"batch", setting.batch},
                         {"sets", scene.sets()},
                         {"share_of_tokens_holding_90_percent", mean(concentration)},
                         {"share_by_set", concentration},
                         {"methods", nlohmann::json::array()}};
  for (const Run& run : runs) {
    nlohmann::json stages;
    for (const DecodeStage& stage : run.method.stages)
      stages[stage.name] = {{"us", run.us.at(stage.name)}, {"bytes", stage.bytes}};
    json["methods"].push_back({{"name", run.method.name},
                               {"setting", run.method.setting},
                               {"tokens", run.method.tokens},
                               {"mass", run.method.mass},
                               {"tokens_by_set", run.method.set_tokens},
                               {"mass_by_set", run.method.set_mass},
                               {"stages", stages}});
  }
  return json;
}

// Speed over the faster dense back end against length, a line a method; one chart a shape and batch.
void add_charts(Page& page, const std::vector<std::pair<Setting, std::vector<Run>>>& all) {
  std::map<std::pair<std::string, int64_t>, LineChart> charts;
  for (const auto& [setting, runs] : all) {
    double dense = 0;
    for (const Run& run : runs)
      if (run.method.name.rfind("dense, torch", 0) == 0)
        dense = dense == 0 ? run.us.at("step") : std::min(dense, run.us.at("step"));
    LineChart& chart = charts[{setting.shape.name, setting.batch}];
    chart = {fmt::format("{}, batch {}: decode attention over the fastest dense of torch", setting.shape.name,
                         setting.batch),
             "tokens",
             "times as fast",
             std::move(chart.series),
             true,
             false,
             true};
    for (const Run& run : runs) {
      if (dense == 0 || run.method.name.rfind("dense", 0) == 0) continue;
      auto found = std::find_if(chart.series.begin(), chart.series.end(),
                                [&](const Series& s) { return s.name == run.method.name; });
      if (found == chart.series.end())
        found = chart.series.insert(
            found, {run.method.name, {}, {}, run.method.name.find('@') != std::string::npos});
      found->x.push_back(static_cast<double>(setting.length));
      found->y.push_back(dense / run.us.at("step"));
    }
  }
  for (const auto& [key, chart] : charts) page.chart(chart);
}

std::optional<Source> load_source(const BenchDecodeOptions& options, const ModelOptions& where) {
  if (options.model.empty()) return {};
  const ModelConfig config = where.prepare();
  const SelectorOptions selector{options.selector};
  selector.read_config(where, config);
  auto text = Tokenizer::load(where.folder).encode(read_text_file(options.text));
  for (const int64_t length : options.lengths)
    for (const int64_t batch : options.batches)
      check_recording(config, static_cast<int64_t>(text.size()), length, batch);
  const Backbone backbone = where.load();
  return Source{backbone, *selector.load(where, backbone), std::move(text)};
}

// What the methods attend to, for the header.
std::string describe_data(const BenchDecodeOptions& options, const std::optional<Source>& source) {
  const AttentionStatistics& s = options.statistics;
  if (!source)
    return fmt::format(
        "Synthetic keys: logits of sigma {:g}, {:.0f}% of the variance common to all heads, {:.0f}% of the keys' to a block, selector "
        "correlation {:g}.",
        s.sigma, 100 * s.shared, 100 * s.local, s.fidelity);
  return fmt::format(
      "Recorded from {}, selector {} ({} INT4), text {} ({} tokens): what the {} layers with a selector read in a dense decode step of each "
      "stretch's last token, one step a sequence. Times, tokens and mass are means over these layers, each with its own budget under top-p; in brackets the "
      "least and the most of a layer.",
      options.model, options.selector, source->selector.config().key_heads == 1 ? "shared" : "per-head",
      options.text, source->text.size(), source->selector.layers().size());
}

// Empty, with a word why, where memory is not enough for one set.
std::optional<DecodeScene> make_scene(const BenchDecodeOptions& options, const std::optional<Source>& source,
                                      const Setting& setting, const std::string& title, int64_t wanted_sets,
                                      at::ScalarType dtype, at::Device device) {
  const auto& [shape, length, batch] = setting;
  if (source) return record_decode(source->backbone, source->selector, source->text, length, batch);
  const int64_t one = DecodeScene::set_bytes(shape, length, batch, dtype);
  const int64_t scratch =
      4 * shape.num_heads * batch * length * 4 + (int64_t{3} << 30);  // logits, and graphs' own pools
  const int64_t room = free_bytes(device) - (device.is_cuda() ? scratch : 0);
  const int64_t sets = std::min(wanted_sets, room / one);
  if (sets < 1) {
    fmt::print("\n{}: left out, it needs {:.1f} GB\n", title, static_cast<double>(one + scratch) * 1e-9);
    return {};
  }
  return DecodeScene(shape, length, batch, sets, options.statistics, dtype, device, options.seed);
}

void run_bench_decode(const BenchDecodeOptions& options) {
  const c10::InferenceMode inference;
  ModelOptions where;
  where.device = options.device;
  where.folder = options.model;
  const std::optional<Source> source = load_source(options, where);
  const at::Device device = where.resolve_device();
  const at::ScalarType dtype = source             ? source->backbone.dtype()
                               : device.is_cuda() ? at::kBFloat16
                                                  : at::kFloat;
  std::vector<DecodeShape> shapes;
  if (source) {
    const ModelConfig& c = source->backbone.config();
    const std::filesystem::path folder =
        std::filesystem::path(options.model) / "";  // so that a name lies before the last slash
    shapes.push_back({folder.parent_path().filename().string(), c.num_heads, c.num_kv_heads, c.head_dim});
  } else {
    for (const DecodeShape& shape : decode_shapes())
      if (options.shapes.empty() ||
          std::find(options.shapes.begin(), options.shapes.end(), shape.name) != options.shapes.end())
        shapes.push_back(shape);
  }
  const Bandwidth bandwidth = measure_bandwidth(device);
  const std::string what = fmt::format(
      "Decode attention of one layer on {}, {}; {}; medians of {} rounds, all stages in turn. Read bandwidth {:.0f} GB/s (a sum), copy {:.0f} GB/s (read + "
      "written). 'step' is everything but append, in one {}; append runs inside a layer's other kernels or alone. {} 'mass' is what the attended tokens "
      "hold of the exact attention, '@ mass {:g}' the cheapest setting that holds it. Twilight's candidates: {:.0f}% of the tokens; at that mass, the share "
      "of the context that makes the fewest bytes.",
      describe_device(device), c10::toString(dtype),
      device.is_cuda()
          ? source
                ? "CUDA events around graph replays over all layers"
                : "CUDA events around graph replays over several sets of buffers, more bytes than the L2 holds"
          : "wall time",
      options.rounds, bandwidth.read * 1e-9, bandwidth.copy * 1e-9, device.is_cuda() ? "graph" : "call",
      describe_data(options, source), options.mass, 100 * options.candidates);
  fmt::print("{}\n", what);
  Page page("Decode attention");
  page.paragraph(what);
  nlohmann::json json = {{"device", describe_device(device)},
                         {"dtype", std::string(c10::toString(dtype))},
                         {"description", what},
                         {"read_gbps", bandwidth.read * 1e-9},
                         {"copy_gbps", bandwidth.copy * 1e-9},
                         {"settings", nlohmann::json::array()}};
  if (source)
    json["recorded"] = {{"model", options.model},
                        {"selector", options.selector},
                        {"text", options.text},
                        {"layers", source->selector.layers()}};
  std::vector<std::pair<Setting, std::vector<Run>>> all;
  std::vector<std::pair<std::string, Table>> tables;
  for (const DecodeShape& shape : shapes)
    for (int64_t batch : options.batches)
      for (int64_t length : options.lengths) {
        const Setting setting{shape, length, batch};
        const std::string title =
            fmt::format("{}: {} heads on {} of {}, {} tokens, batch {}", shape.name, shape.num_heads,
                        shape.num_kv_heads, shape.head_dim, length, batch);
        // As many sets as keep caches cold, as far as memory goes; the whole of a dense pass is cold by
        // itself.
        const double touched =
            static_cast<double>(batch) *
            (static_cast<double>(length) * 72 +
             static_cast<double>(std::min(options.budget, length) * shape.num_kv_heads * shape.head_dim * 4));
        const int64_t cold = static_cast<int64_t>(kCold / touched) + 1,
                      wanted = source ? cold : std::clamp(cold, int64_t{1}, options.sets);
        try {
          const std::optional<DecodeScene> scene =
              make_scene(options, source, setting, title, wanted, dtype, device);
          if (!scene) continue;
          std::vector<double> concentration;
          for (int64_t i = 0; i < scene->sets(); ++i) concentration.push_back(scene->tokens_holding(0.9, i));
          const std::string facts = fmt::format(
              "{}; {} {}{}; 90% of a head's mass is on {} of the tokens", title, scene->sets(),
              source ? "layers" : "sets", scene->sets() < wanted ? " (fewer than keep caches cold)" : "",
              over_sets(mean(concentration), concentration, source.has_value(), 2, true));
          fmt::print("\n{}\n", facts);
          std::vector<Run> runs = measure(options, *scene, device);
          const Table table =
              stage_table(runs, bandwidth, fmt::format(" @ mass {:g}", options.mass), source.has_value());
          fmt::print("{}", table.to_text());
          std::fflush(stdout);
          tables.emplace_back(facts, table);
          json["settings"].push_back(to_json(setting, *scene, concentration, runs));
          for (Run& run : runs) run.method.stages.clear();  // they hold the scene
          all.emplace_back(setting, std::move(runs));
          if (!options.out.empty())
            write_file_atomically(options.out, json.dump(1) + "\n");  // what a later fault must not take
        } catch (const c10::OutOfMemoryError&) {
          fmt::print("\n{}: left out, memory was not enough\n", title);
        }
      }
  if (!options.page.empty()) {
    add_charts(page, all);
    for (const auto& [heading, table] : tables) {
      page.heading(heading);
      page.add(table);
    }
    write_file_atomically(options.page, page.html());
  }
}

}  // namespace

void add_bench_decode(CLI::App& parent) {
  auto options = std::make_shared<BenchDecodeOptions>();
  CLI::App& command = *parent.add_subcommand(
      "decode", "One layer's decode attention, stage by stage: spot, dense, Quest, Twilight");
  std::vector<std::string> names;
  for (const DecodeShape& shape : decode_shapes()) names.push_back(shape.name);
  command.add_option("--shapes", options->shapes, "Attention shapes (default: all)")
      ->delimiter(',')
      ->check(CLI::IsMember(names));
  CLI::Option* model =
      command.add_option("--model", options->model,
                         "Folder of a checkpoint whose attention is recorded (default: synthetic attention)");
  CLI::Option* selector = command.add_option("--selector", options->selector,
                                             "Folder of its selector, or the NAME of one in MODEL/selectors");
  CLI::Option* text = command.add_option(
      "--text", options->text, "Text file that it reads, cut into stretches of the lengths, one a sequence");
  model->needs(selector)->needs(text);
  selector->needs(model);
  text->needs(model);
  command.add_option("--lengths", options->lengths, "Tokens in the cache, multiples of 16")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 30))
      ->capture_default_str();
  command.add_option("--batch", options->batches, "Sequences")
      ->delimiter(',')
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command.add_option("--top-k-tokens", options->budget, "Tokens attended with a fixed budget")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--mass", options->mass, "Attention mass at which methods are compared")
      ->check(CLI::Range(0.01, 0.999))
      ->capture_default_str();
  command
      .add_option("--candidates", options->candidates,
                  "Share of the tokens that Quest proposes to Twilight beside the fixed budgets")
      ->check(CLI::Range(0.001, 1.0))
      ->capture_default_str();
  command.add_option("--twilight-p", options->twilight_p, "Twilight's p beside the fixed budgets")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str();
  command
      .add_option("--sigma", options->statistics.sigma,
                  "Standard deviation of the logits: how concentrated attention is")
      ->check(CLI::Range(0.0, 20.0))
      ->capture_default_str();
  command
      .add_option("--shared", options->statistics.shared,
                  "Share of the logits' variance that all heads have in common")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      .add_option("--local", options->statistics.local,
                  "Share of the keys' variance that a block of 16 tokens has in common")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      .add_option("--fidelity", options->statistics.fidelity,
                  "Correlation of the selector's keys with what heads have in common")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--rounds", options->rounds, "Rounds that medians are taken over")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--sets", options->sets, "Most sets of buffers taken in turn")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--seed", options->seed, "Of the random data")->capture_default_str();
  command.add_option("--device", options->device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  for (const char* name : {"--shapes", "--sigma", "--shared", "--local", "--fidelity", "--sets", "--seed"})
    model->excludes(command.get_option(name));
  command.add_option("--out", options->out, "JSON file for the numbers")->check(output_file());
  command.add_option("--page", options->page, "HTML file with tables and charts")->check(output_file());
  command.callback([options, &command] {
    check_needs(command, {});
    for (int64_t length : options->lengths)
      if (length % 16 != 0)
        throw CLI::ValidationError("--lengths", fmt::format("{} is not a multiple of 16", length));
    run_bench_decode(*options);
  });
}

}  // namespace spot::cli
