// spot bench: end-to-end time and memory of prefill and decode on this machine.
#include <ATen/DeviceAccelerator.h>
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/files.h"
#include "core/progress.h"
#include "engine/decode_step.h"
#include "engine/generator.h"
#include "report/page.h"

namespace spot::cli {
namespace {

struct Options {
  ModelOptions model;
  RuleOptions rule;
  std::vector<std::string> attentions = {"dense", "spot"};
  std::string preset = "spot", out;
  int64_t context = 32768, batch = 1, steps = 32, chunk = 4096;
  bool random = false, prefill = false, eager = false;
};

struct Measurement {
  std::string attention;
  double prefill_seconds = 0, decode_ms = 0, attended_share = 1, peak_gib = 0;
};

double seconds_between(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

void synchronize(const at::Device& device) {
  if (device.is_cuda()) at::accelerator::synchronizeDevice(device.index());
}

// Most bytes that torch's allocator held on the device since the last reset; 0 on the CPU.
double peak_gib(const at::Device& device) {
  if (!device.is_cuda()) return 0;
  return static_cast<double>(at::accelerator::getDeviceStats(device.index()).allocated_bytes[0].peak) /
         (1 << 30);
}

// A context without the cost of its prefill: keys and values are drawn at random (so are selector keys,
// through random
// hidden states), which decode cannot tell apart by time.
void fill_with_noise(const Backbone& backbone, AttentionRun& run, const std::vector<int64_t>& sequences,
                     int64_t context, int64_t chunk) {
  const ModelConfig& config = backbone.config();
  PagedCache& cache = run.cache();
  for (int64_t sequence : sequences) {
    for (int64_t start = 0; start < context; start += chunk) {
      const int64_t count = std::min(chunk, context - start);
      const Batch batch =
          make_batch(cache, {sequence}, {std::vector<int32_t>(static_cast<size_t>(count), 0)});
      const auto options = at::TensorOptions().device(backbone.device()).dtype(backbone.dtype());
      for (int64_t layer : config.full_attention_layers()) {
        const AttentionInputs inputs{layer,
                                     at::randn({count, config.hidden_size}, options),
                                     at::Tensor(),
                                     at::randn({count, config.num_kv_heads, config.head_dim}, options),
                                     at::randn({count, config.num_kv_heads, config.head_dim}, options),
                                     1.0,
                                     batch};
        write_tokens(cache.pools().get("keys", layer), batch.slots, inputs.key);
        write_tokens(cache.pools().get("values", layer), batch.slots, inputs.value);
        if (run.sparse() && run.sparse()->policy().covers(layer)) run.sparse()->policy().append(inputs);
      }
    }
  }
}

Measurement measure(const Options& options, const Backbone& backbone, const std::string& attention) {
  const c10::InferenceMode inference;
  const AttentionKind kind = attention_kind_from_string(attention);
  const at::Device device = backbone.device();
  if (device.is_cuda()) at::accelerator::resetPeakStats(device.index());
  std::optional<Selector> selector;
  if (kind == AttentionKind::spot) {
    selector.emplace(SelectorConfig::from_preset(options.preset), backbone.config(), device,
                     backbone.dtype());
    selector->join(backbone);
  }
  AttentionSpec spec = options.rule.spec(kind, selector ? &*selector : nullptr);
  spec.sparse.count = false;
  const int64_t room = options.context + options.steps + 8;
  AttentionRun run(spec, backbone, selector ? &*selector : nullptr, room * options.batch, options.batch);
  Measurement result{attention};
  std::vector<int64_t> sequences;
  for (int64_t i = 0; i < options.batch; ++i) sequences.push_back(run.cache().open_sequence());

  auto start = std::chrono::steady_clock::now();
  if (options.prefill) {
    std::vector<int32_t> prompt(static_cast<size_t>(options.context));
    for (size_t i = 0; i < prompt.size(); ++i)
      prompt[i] = static_cast<int32_t>((i * 7919 + 13) % static_cast<size_t>(backbone.config().vocab_size));
    for (int64_t sequence : sequences)
      prefill(backbone, run.backend(), run.cache(), sequence, prompt, options.chunk,
              fmt::format("prefill, {}", attention));
    synchronize(device);
    result.prefill_seconds = seconds_between(start, std::chrono::steady_clock::now());
  } else {
    fill_with_noise(backbone, run, sequences, options.context, options.chunk);
  }

  DecodeStep step(backbone, run.backend(), run.cache(), sequences, room);
  const std::vector<int32_t> tokens(sequences.size(), 1);
  if (device.is_cuda() && !options.eager) step.capture();
  for (int i = 0; i < 3; ++i) step.run(tokens);
  synchronize(device);
  std::vector<double> times;
  for (int64_t i = 0; i < options.steps; ++i) {
    start = std::chrono::steady_clock::now();
    step.run(tokens);
    synchronize(device);
    times.push_back(1000 * seconds_between(start, std::chrono::steady_clock::now()));
  }
  std::nth_element(times.begin(), times.begin() + static_cast<int64_t>(times.size() / 2), times.end());
  result.decode_ms = times[times.size() / 2];
  result.peak_gib = peak_gib(device);
  return result;
}

void run(const Options& options) {
  const auto begin = std::chrono::steady_clock::now();
  const Backbone backbone = options.random ? [&] {
    const ModelConfig config = ModelConfig::load(options.model.folder);
    return Backbone::random(config, options.model.resolve_device(), options.model.resolve_dtype(config), 1);
  }()
                                           : options.model.load();
  const at::Device device = backbone.device();
  synchronize(device);
  const double load_seconds = seconds_between(begin, std::chrono::steady_clock::now());
  Table table{{"attention", "prefill s", "decode ms/step", "tokens/s", "vs first", "peak GiB"}, {}};
  nlohmann::json json = {{"context", options.context},
                         {"batch", options.batch},
                         {"device", device.str()},
                         {"dtype", std::string(c10::toString(backbone.dtype()))},
                         {"rule", describe(options.rule.rule(nullptr))},
                         {"load_seconds", load_seconds},
                         {"random_weights", options.random},
                         {"cuda_graph", device.is_cuda() && !options.eager}};
  double first = 0;
  for (const std::string& attention : options.attentions) {
    const Measurement m = measure(options, backbone, attention);
    if (first == 0) first = m.decode_ms;
    table.rows.push_back({m.attention, options.prefill ? fmt::format("{:.2f}", m.prefill_seconds) : "-",
                          fmt::format("{:.3f}", m.decode_ms),
                          fmt::format("{:.1f}", 1000.0 * static_cast<double>(options.batch) / m.decode_ms),
                          fmt::format("{:.2f}x", first / m.decode_ms), fmt::format("{:.2f}", m.peak_gib)});
    json["runs"].push_back({{"attention", m.attention},
                            {"prefill_seconds", m.prefill_seconds},
                            {"decode_ms", m.decode_ms},
                            {"peak_gib", m.peak_gib}});
  }
  fmt::print("{} on {}, {}, {} in {:.1f} s, context {}, batch {}, {}{}\n{}", backbone.config().architecture,
             device.str(), c10::toString(backbone.dtype()), options.random ? "random weights" : "loaded",
             load_seconds, options.context, options.batch, describe(options.rule.rule(nullptr)),
             options.prefill ? "" : ", random keys and values instead of a prefill", table.to_text());
  if (!options.out.empty()) write_file_atomically(options.out, json.dump(1) + "\n");
}

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App& command =
      *app.add_subcommand("bench", "Measure prefill and decode of a whole model, medians of single steps");
  add_bench_decode(command);
  add_bench_distill(command);
  options->model.add(command);
  command.get_option("--model")->required(false);  // the subcommands have none
  options->rule.add(command);
  command.add_flag("--random", options->random, "Random weights of the shapes in MODEL/config.json");
  command.add_option("--attention", options->attentions, "Attentions to compare; the first is the reference")
      ->delimiter(',')
      ->capture_default_str();
  command.add_option("--preset", options->preset, "Preset of the (untrained) selector")
      ->capture_default_str();
  command.add_option("--context", options->context, "Tokens in the cache of each sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--batch", options->batch, "Sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--steps", options->steps, "Decode steps that are timed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--prefill-chunk", options->chunk, "Tokens a forward call of prefill")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_flag("--prefill", options->prefill,
                   "Run and time the prefill instead of filling the cache with random numbers");
  command.add_flag("--eager", options->eager, "No CUDA graph");
  command.add_option("--out", options->out, "JSON file for the numbers");
  command.callback([options, &command] {
    if (!command.get_subcommands().empty()) return;
    if (options->model.folder.empty()) throw CLI::RequiredError("--model");
    run(*options);
  });
}

}  // namespace spot::cli
