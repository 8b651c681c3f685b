// spot bench: end-to-end time and memory of prefill and decode on this machine.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "benchmark/device.h"
#include "benchmark/noise.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/progress.h"
#include "engine/engine.h"
#include "report/page.h"

namespace spot::cli {
namespace {

struct BenchOptions {
  ModelOptions model;
  MethodOptions method;
  KvCacheOptions kv_cache;
  std::vector<std::string> attentions = {"dense", "spot"};
  std::string preset = "spot", out;
  int64_t context = 32768, batch = 1, steps = 32, chunk = 4096;
  bool random = false, eager = false, engine = false;
};

struct Measurement {
  std::string attention, rule;
  double prefill_seconds = 0, decode_ms = 0, peak_gib = 0;
  double engine_tokens = 0;  // a second, of all sequences
};

double seconds_between(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

void prefill(Runner& runner, const std::vector<int64_t>& sequences, const std::vector<int32_t>& prompt,
             int64_t chunk, const std::string& label) {
  const auto total = static_cast<int64_t>(prompt.size());
  Progress progress(label, total * static_cast<int64_t>(sequences.size()));
  int64_t done = 0;
  for (int64_t sequence : sequences) {
    for (int64_t start = 0; start < total; start += chunk) {
      const int64_t end = std::min(total, start + chunk);
      runner.run({{.tokens = {.sequence = sequence,
                              .tokens = {prompt.begin() + start, prompt.begin() + end},
                              .decode = false,
                              .logits = end == total},
                   .route = {.context = total}}});
      progress.update(done += end - start);
    }
  }
}

// Tokens a second of decode through the engine, as `spot generate` runs it: scheduling, sampling and events included.
double measure_engine(const BenchOptions& options, const Backbone& backbone, const Selector* selector,
                      const MethodSpec& spec, const std::shared_ptr<const KvScales>& scales) {
  const int64_t room = options.context + options.steps + 8;
  AttentionStack stack(backbone, selector, {spec},
                       {.num_pages = options.batch * (room / kBlockSize + 1),
                        .num_sequences = options.batch,
                        .kv_scales = scales});
  Engine engine(backbone, stack,
                {.max_step_tokens = std::max(options.chunk, kBlockSize) + options.batch,
                 .max_sequences = options.batch,
                 .max_tokens = room,
                 .prefix_cache = false,
                 .graphs = !options.eager});
  engine.capture(0, options.batch);
  std::vector<Request> requests(static_cast<size_t>(options.batch));
  for (size_t r = 0; r < requests.size(); ++r) {
    requests[r].max_new_tokens = options.steps;
    for (int64_t i = 0; i < options.context; ++i)
      requests[r].prompt.push_back(static_cast<int32_t>((static_cast<size_t>(i) * 7919 + 13 + r) %
                                                        static_cast<size_t>(backbone.config().vocab_size)));
  }
  Progress progress(fmt::format("engine, {}", spec.name), options.context * options.batch);
  int64_t alone = 0, decoded = 0;
  double seconds = 0;
  generate(engine, requests, {}, [&] {
    const EngineStatistics now = engine.statistics();
    progress.update(now.read_tokens);
    if (now.decode_seconds > seconds) alone += now.decode_tokens - decoded;
    seconds = now.decode_seconds, decoded = now.decode_tokens;
  });
  const EngineStatistics done = engine.statistics();
  // Of steps that decode alone: with several sequences some tokens come while another prompt is read.
  return static_cast<double>(alone) / done.decode_seconds;
}

bool reads_selector(const std::string& attention) {
  return attention.substr(0, attention.find(':')) == "spot";
}

Measurement measure(const BenchOptions& options, const Backbone& backbone, const std::string& attention) {
  const c10::InferenceMode inference;
  const at::Device device = backbone.device();
  const auto scales = kv_scales(options.kv_cache.dtype, backbone);
  reset_peak(device);
  std::optional<Selector> selector;
  if (reads_selector(attention)) {
    selector.emplace(SelectorConfig::from_preset(options.preset), backbone.config(), device,
                     backbone.dtype());
    selector->join(backbone);
  }
  const MethodSpec spec = options.method.parse(attention, selector ? &selector->config() : nullptr);
  Measurement result{attention, spec.describe()};
  if (options.engine)
    result.engine_tokens = measure_engine(options, backbone, selector ? &*selector : nullptr, spec, scales);
  const int64_t room = options.context + options.steps + 8;
  AttentionStack stack(backbone, selector ? &*selector : nullptr, {spec},
                       {.num_pages = options.batch * (room / kBlockSize + 1),
                        .num_sequences = options.batch,
                        .kv_scales = scales});
  Runner runner(backbone, stack,
                {.graphs = !options.eager, .max_sequences = options.batch, .max_tokens = room});
  std::vector<int64_t> sequences;
  for (int64_t i = 0; i < options.batch; ++i) sequences.push_back(stack.cache().open_sequence());

  auto start = std::chrono::steady_clock::now();
  if (options.method.prefill) {
    std::vector<int32_t> prompt(static_cast<size_t>(options.context));
    for (size_t i = 0; i < prompt.size(); ++i)
      prompt[i] = static_cast<int32_t>((i * 7919 + 13) % static_cast<size_t>(backbone.config().vocab_size));
    prefill(runner, sequences, prompt, options.chunk, fmt::format("prefill, {}", attention));
    synchronize(device);
    result.prefill_seconds = seconds_between(start, std::chrono::steady_clock::now());
  } else {
    for (const int64_t sequence : sequences)
      for (int64_t start = 0; start < options.context; start += options.chunk)
        fill_with_noise(backbone, stack, sequence, std::min(options.chunk, options.context - start));
  }

  std::vector<StepEntry> step;
  for (int64_t sequence : sequences)
    step.push_back({.tokens = {.sequence = sequence, .tokens = {1}, .decode = true}});
  for (int i = 0; i < 3; ++i) runner.run(step);
  synchronize(device);
  std::vector<double> times;
  for (int64_t i = 0; i < options.steps; ++i) {
    start = std::chrono::steady_clock::now();
    runner.run(step);
    synchronize(device);
    times.push_back(1000 * seconds_between(start, std::chrono::steady_clock::now()));
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  result.decode_ms = times[times.size() / 2];
  result.peak_gib = peak_gib(device);
  return result;
}

void run_bench(const BenchOptions& options, const CLI::App& command) {
  const ModelConfig config = options.model.prepare();
  const SelectorConfig selector = SelectorConfig::from_preset(options.preset);
  std::vector<MethodSpec> methods;
  std::set<Need> met;
  for (const std::string& attention : join_methods(options.attentions)) {
    if (reads_selector(attention)) met.insert(Need::spot);
    methods.push_back(options.method.parse(attention, reads_selector(attention) ? &selector : nullptr));
  }
  check_needs(command, met);
  MethodOptions::check_read(command, methods, {"--prefill"});
  options.kv_cache.check(methods);
  if (options.context > config.max_position_embeddings - options.steps - 3)
    fail(
        "{} tokens of context, {} steps and 3 before them pass the model's limit of {} positions; ask for less",
        options.context, options.steps, config.max_position_embeddings);
  const auto begin = std::chrono::steady_clock::now();
  const Backbone backbone = options.random ? [&] {
    return Backbone::random(config, options.model.resolve_device(), options.model.resolve_dtype(config), 1);
  }()
                                           : options.model.load();
  const at::Device device = backbone.device();
  synchronize(device);
  const double load_seconds = seconds_between(begin, std::chrono::steady_clock::now());
  Table table{{"attention", "keeps", "prefill s", "decode ms/step", "tokens/s", "engine tokens/s", "vs first",
               "peak GiB"},
              {}};
  nlohmann::json json = {{"context", options.context},
                         {"batch", options.batch},
                         {"device", device.str()},
                         {"dtype", std::string(c10::toString(backbone.dtype()))},
                         {"kv_cache_dtype", to_string(options.kv_cache.dtype)},
                         {"load_seconds", load_seconds},
                         {"random_weights", options.random},
                         {"cuda_graph", device.is_cuda() && !options.eager}};
  double first = 0;
  for (const std::string& attention : join_methods(options.attentions)) {
    const Measurement m = measure(options, backbone, attention);
    if (first == 0) first = m.decode_ms;
    table.rows.push_back({m.attention, m.rule.empty() ? "-" : m.rule,
                          options.method.prefill ? fmt::format("{:.2f}", m.prefill_seconds) : "-",
                          fmt::format("{:.3f}", m.decode_ms),
                          fmt::format("{:.1f}", 1000.0 * static_cast<double>(options.batch) / m.decode_ms),
                          m.engine_tokens > 0 ? fmt::format("{:.1f} ({:.2f}x)", m.engine_tokens,
                                                            m.engine_tokens * m.decode_ms /
                                                                (1000.0 * static_cast<double>(options.batch)))
                                              : "-",
                          fmt::format("{:.2f}x", first / m.decode_ms), fmt::format("{:.2f}", m.peak_gib)});
    json["runs"].push_back({{"attention", m.attention},
                            {"rule", m.rule},
                            {"prefill_seconds", m.prefill_seconds},
                            {"decode_ms", m.decode_ms},
                            {"engine_tokens_per_second", m.engine_tokens},
                            {"peak_gib", m.peak_gib}});
  }
  fmt::print("{} on {}, {}, {} in {:.1f} s, context {}, batch {}{}\n{}", backbone.config().architecture,
             device.str(), c10::toString(backbone.dtype()), options.random ? "random weights" : "loaded",
             load_seconds, options.context, options.batch,
             options.method.prefill ? "" : ", random keys and values instead of a prefill", table.to_text());
  if (!options.out.empty()) write_file_atomically(options.out, json.dump(1) + "\n");
}

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App& command =
      *app.add_subcommand("bench", "Measure prefill and decode of a whole model, medians of single steps");
  add_bench_decode(command);
  add_bench_distill(command);
  add_bench_prefill(command);
  options->model.add(command);
  command.get_option("--model")->required(false);  // the subcommands have none
  options->method.add(command);
  options->kv_cache.add(command);
  command.add_flag("--random", options->random, "Random weights of the shapes in MODEL/config.json");
  command
      .add_option("--attention", options->attentions,
                  "Attentions to compare, " + attention_words() +
                      ", as in `spot generate`; the first is the reference")
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--preset", options->preset, "Preset of the (untrained) selector")
      ->capture_default_str();
  command.add_option("--context", options->context, "Tokens in the cache of each sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--batch", options->batch, "Sequences")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command.add_option("--steps", options->steps, "Decode steps that are timed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--prefill-chunk", options->chunk, "Tokens a forward call of prefill")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  options->method.add_prefill(command)->description(
      "Run and time the prefill, read dense, sparse or auto as in `spot generate`, instead of filling the cache with random "
      "numbers");
  command.add_flag("--engine", options->engine,
                   "Also the tokens a second of the engine that `spot generate` runs, after a prefill");
  command.add_flag("--eager", options->eager, "No CUDA graph");
  command.add_option("--out", options->out, "JSON file for the numbers")->check(output_file());
  command.callback([options, &command] {
    if (!command.get_subcommands().empty()) return;
    if (options->model.folder.empty()) throw CLI::RequiredError("--model");
    run_bench(*options, command);
  });
}

}  // namespace spot::cli
