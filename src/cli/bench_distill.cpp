// spot bench distill: a distillation step beside the frozen forward pass that it cannot do without.
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "attention/dense.h"
#include "benchmark/device.h"
#include "benchmark/stage_timer.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "distill/distill_attention.h"
#include "distill/optimizer.h"
#include "report/page.h"

namespace spot::cli {
namespace {

struct BenchDistillOptions {
  ModelOptions model;
  std::string preset = "spot", loss, teacher_scope, out;
  int64_t length = 16384, sequences = 1, documents = 1, steps = 3;
  double peak_tflops = 0;
  bool random = false;
};

// The least operations of a sequence, 2 a multiplication and addition: matrices of the layers and causal
// attention (recurrences and norms left out), and what the selector adds: projections and their gradients,
// the teacher's products again, scores and the two gradients of scores.
struct Work {
  double forward = 0, distillation = 0;
};
Work count_work(const ModelConfig& m, const Selector& selector, int64_t length, int64_t documents) {
  const auto tokens = static_cast<double>(length);
  const double pairs = tokens * tokens / 2 / static_cast<double>(documents);
  const auto attended = static_cast<double>(m.num_heads * m.head_dim);
  Work work;
  for (int64_t layer = 0; layer < m.num_layers; ++layer) {
    int64_t weights = 3 * m.hidden_size * m.intermediate_size;
    if (m.is_full_attention(layer)) {
      weights +=
          m.hidden_size * m.head_dim * ((m.attention_output_gate ? 3 : 2) * m.num_heads + 2 * m.num_kv_heads);
      work.forward += 4 * pairs * attended;
    } else {
      const auto& l = m.linear;
      weights += m.hidden_size * (2 * l.num_key_heads * l.key_head_dim +
                                  3 * l.num_value_heads * l.value_head_dim + 2 * l.num_value_heads);
    }
    work.forward += 2 * tokens * static_cast<double>(weights);
  }
  const auto layers = static_cast<double>(selector.layers().size());
  const auto scored = static_cast<double>(selector.config().num_heads * selector.config().head_dim);
  const SelectionDefaults& selection = selector.config().selection;
  const bool residual = selector.config().distillation.teacher_scope == TeacherScope::residual;
  const double seen =
      std::max(0.0, tokens / static_cast<double>(documents) -
                        static_cast<double>(residual ? selection.rule.sinks + selection.rule.recency : 0));
  // A projection takes two products: the hidden states' gradient is not wanted.
  work.distillation =
      layers * seen * seen / 2 * static_cast<double>(documents) * (2 * attended + 3 * 2 * scored) +
      2 * 2 * tokens * static_cast<double>(selector.num_parameters());
  return work;
}

// The frozen pass alone.
class FrozenAttention : public AttentionBackend {
 public:
  at::Tensor forward(const AttentionInputs& inputs) override {
    at::Tensor output = at::empty_like(inputs.query);
    int64_t first = 0;
    for (const int64_t count : inputs.batch.query_lengths) {
      const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, count).transpose(0, 1); };
      output.narrow(0, first, count)
          .copy_(causal_attention(inputs.query.narrow(0, first, count), part(inputs.key), part(inputs.value),
                                  0, inputs.scale));
      first += count;
    }
    return output;
  }
};

void run_bench_distill(const BenchDistillOptions& options) {
  if (options.documents > options.length)
    fail("--documents is {}, there are {} tokens", options.documents, options.length);
  const ModelConfig prepared = options.model.prepare();
  if (options.length > prepared.max_position_embeddings)
    fail("--length is {}, the model has {} positions; ask for less", options.length,
         prepared.max_position_embeddings);
  SelectorConfig::from_preset(options.preset);
  const Backbone backbone = options.random ? [&] {
    return Backbone::random(prepared, options.model.resolve_device(), options.model.resolve_dtype(prepared),
                            1);
  }()
                                           : options.model.load();
  const ModelConfig& model = backbone.config();
  const at::Device device = backbone.device();
  nlohmann::json shape = SelectorConfig::from_preset(options.preset).to_json();
  if (!options.loss.empty()) shape["distillation"]["loss"] = options.loss;
  if (!options.teacher_scope.empty()) shape["distillation"]["teacher_scope"] = options.teacher_scope;
  shape["distillation"]["k_train"] = std::max<int64_t>(options.length / 2, kBlockSize);
  const SelectorConfig config = SelectorConfig::from_json(shape, "command line");
  Selector selector(config, model, device, at::kFloat);

  std::vector<int32_t> tokens(static_cast<size_t>(options.length));
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<int32_t>((i * 7919 + 13) % static_cast<size_t>(model.vocab_size));
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < options.documents; ++i) starts.push_back(i * options.length / options.documents);

  const double peak = options.peak_tflops > 0 ? options.peak_tflops : matmul_tflops(device, backbone.dtype());
  FrozenAttention frozen;
  const double forward_ms = median_ms(device, options.steps, [&] {
    const at::NoGradGuard no_grad;
    for (int64_t i = 0; i < options.sequences; ++i) forward_sequence(backbone, frozen, tokens, starts);
  });

  const TrainConfig train;
  SelectorOptimizer optimizer(selector, train);
  DistillAttention attention(selector, loss_options(config, train));
  const double share = 1.0 / static_cast<double>(options.sequences);
  double loss = 0;
  reset_peak(device);
  const double step_ms = median_ms(device, options.steps, [&] {
    optimizer.zero_gradients();
    for (int64_t i = 0; i < options.sequences; ++i) {
      attention.begin(share, {});
      forward_sequence(backbone, attention, tokens, starts);
    }
    loss = (attention.take_sums() * share).select(1, 0).mean().item<double>();
    optimizer.step(train.final_lr);
  });
  if (!std::isfinite(loss)) fail("bench distill: the loss is {}", loss);
  const double gib = peak_gib(device);

  const auto sequences = static_cast<double>(options.sequences);
  const Work work = count_work(model, selector, options.length, options.documents);
  const auto tflops = [&](double operations, double ms) { return sequences * operations / ms / 1e9; };
  const double forward_tflops = tflops(work.forward, forward_ms),
               step_tflops = tflops(work.forward + work.distillation, step_ms);
  const auto rate = [&](double ms) { return 1000 * sequences * static_cast<double>(options.length) / ms; };
  Table table{{"", "ms", "ratio", "tokens/s", "TFLOP/s", "of matmul peak"}, {}};
  const auto row = [&](const std::string& name, double ms, double tf) {
    table.rows.push_back({name, fmt::format("{:.1f}", ms), fmt::format("{:.2f}x", ms / forward_ms),
                          fmt::format("{:.0f}", rate(ms)), fmt::format("{:.2f}", tf),
                          fmt::format("{:.0f}%", 100 * tf / peak)});
  };
  row("frozen forward", forward_ms, forward_tflops);
  row("distillation step", step_ms, step_tflops);
  fmt::print(
      "{} on {}, {}, {} sequences of {} tokens ({} documents each), preset {}, {} loss, teacher scope {}, matmul peak {:.1f} "
      "TFLOP/s ({}), peak memory {:.2f} GiB, loss {:.4f}\n{}",
      model.architecture, describe_device(device), c10::toString(backbone.dtype()), options.sequences,
      options.length, options.documents, options.preset, shape["distillation"]["loss"].get<std::string>(),
      shape["distillation"]["teacher_scope"].get<std::string>(), peak,
      options.peak_tflops > 0 ? "given" : "measured", gib, loss, table.to_text());
  if (options.out.empty()) return;
  const nlohmann::json json = {{"architecture", model.architecture},
                               {"device", describe_device(device)},
                               {"dtype", std::string(c10::toString(backbone.dtype()))},
                               {"random_weights", options.random},
                               {"length", options.length},
                               {"sequences", options.sequences},
                               {"documents", options.documents},
                               {"preset", options.preset},
                               {"loss_kind", shape["distillation"]["loss"]},
                               {"teacher_scope", shape["distillation"]["teacher_scope"]},
                               {"loss", loss},
                               {"forward_ms", forward_ms},
                               {"step_ms", step_ms},
                               {"ratio", step_ms / forward_ms},
                               {"tokens_per_second", rate(step_ms)},
                               {"forward_tflops", forward_tflops},
                               {"step_tflops", step_tflops},
                               {"peak_tflops", peak},
                               {"peak_share", step_tflops / peak},
                               {"peak_gib", gib}};
  write_file_atomically(options.out, json.dump(1) + "\n");
}

}  // namespace

void add_bench_distill(CLI::App& parent) {
  auto options = std::make_shared<BenchDistillOptions>();
  CLI::App& command =
      *parent.add_subcommand("distill", "Time a distillation step and the frozen forward pass alone");
  options->model.add(command);
  command.add_flag("--random", options->random, "Random weights of the shapes in MODEL/config.json");
  command.add_option("--preset", options->preset, "Preset of the selector, which starts from random weights")
      ->capture_default_str();
  command.add_option("--loss", options->loss, "dense or sparse; the preset's by default")
      ->check(CLI::IsMember({"dense", "sparse"}));
  command.add_option("--teacher-scope", options->teacher_scope, "all or residual; the preset's by default")
      ->check(CLI::IsMember({"all", "residual"}));
  command.add_option("--length", options->length, "Tokens of a sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--documents", options->documents, "Documents of a sequence, which do not see each other")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--sequences", options->sequences, "Sequences of a step")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--steps", options->steps, "Steps that are timed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--peak-tflops", options->peak_tflops,
                  "The device's matmul peak; measured with a large product by default")
      ->check(CLI::PositiveNumber);
  command.add_option("--out", options->out, "JSON file for the numbers")->check(output_file());
  command.callback([options, &command] {
    check_needs(command, {});
    run_bench_distill(*options);
  });
}

}  // namespace spot::cli
