// spot eval: how sparse attention compares with dense attention, on text and on retrieval.
#include <memory>

#include "cli/commands.h"
#include "cli/eval_options.h"
#include "cli/usage.h"
#include "eval/needle_eval.h"
#include "eval/text_eval.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

void add_text(CLI::App& parent) {
  auto options = std::make_shared<EvalOptions>();
  auto eval = std::make_shared<TextEvalOptions>();
  CLI::App& command =
      *parent.add_subcommand("text", "Perplexity, captured attention mass and calibration on running text");
  options->add(command)->required();
  command.add_option("--length", eval->length, "Tokens a sequence")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--sequences", eval->sequences, "Sequences")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--skip", eval->skip, "First position that is scored")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--chunk", eval->chunk, "Tokens a forward call")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--measured-queries", eval->measured_queries,
                  "Queries a chunk whose true attention is computed")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.callback([options, eval, &command] {
    const ModelConfig config = options->model.prepare();
    const auto methods = options->checked_methods(command, config, false);
    check_needs(command, methods.empty() ? std::set<Need>{} : std::set{Need::sparse});
    const auto tokens = Tokenizer::load(options->model.folder).encode(options->read_text());
    eval->kv_cache = options->kv_cache.dtype;
    check_text_eval(*eval, static_cast<int64_t>(tokens.size()), config);
    const FolderLock lock = prepare_output(options->out, "spot eval text");
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    const TextEvalResult result =
        evaluate_text(backbone, selector ? &*selector : nullptr, tokens, methods, *eval);
    deliver(result, "spot eval text", options->out);
    judge_captured(backbone, selector, methods, [&](size_t i) { return result.methods[i].captured_mass(); });
  });
}

void add_needle(CLI::App& parent) {
  auto options = std::make_shared<EvalOptions>();
  auto needle = std::make_shared<NeedleOptions>();
  auto lengths = std::make_shared<std::vector<int64_t>>(1, needle->length);
  CLI::App& command = *parent.add_subcommand(
      "needle",
      "Multi-key needle retrieval, every method after the same dense prefill (or its own sparse one: --prefill)");
  options->add(command)->required();
  command
      .add_option("--length", *lengths,
                  "Tokens a prompt; several, comma-separated, give heat maps of depth by length")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--samples", needle->samples,
                  "Prompts a length; their needles lie at up to ten depths, evenly spread")
      ->check(CLI::Range(int64_t{1}, kMostSamples))
      ->capture_default_str();
  command.add_option("--distractors", needle->distractors, "Needles with other keys")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--seed", needle->seed, "Seed of the prompts")->capture_default_str();
  command.callback([options, needle, lengths, &command] {
    const ModelConfig config = options->model.prepare();
    const auto methods = options->checked_methods(command, config, true);
    check_needs(command, methods.size() < 2 ? std::set<Need>{} : std::set{Need::sparse});
    needle->kv_cache = options->kv_cache.dtype;
    std::vector<NeedleOptions> sweeps(lengths->size(), *needle);
    for (size_t i = 0; i < sweeps.size(); ++i) {
      sweeps[i].length = (*lengths)[i];
      check_needle_eval(sweeps[i], config);
    }
    const Tokenizer tokenizer = Tokenizer::load(options->model.folder);
    const std::string filler = options->read_text();
    for (NeedleOptions first : sweeps) {
      first.samples = 1;
      make_needle_prompts(tokenizer, filler, first);  // what has no room is met before the weights are read
    }
    const FolderLock lock = prepare_output(options->out, "spot eval needle");
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    NeedleSweep sweep;
    for (const NeedleOptions& one : sweeps) {
      const auto prompts = make_needle_prompts(tokenizer, filler, one);
      sweep.lengths.push_back(
          evaluate_needles(backbone, selector ? &*selector : nullptr, tokenizer, prompts, one, methods));
    }
    deliver(sweep, "spot eval needle", options->out);
    judge_captured(backbone, selector, methods, [&](size_t i) { return sweep.captured_mass(i); });
  });
}

}  // namespace

void add_eval(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("eval", "Compare sparse attention with dense attention");
  command.require_subcommand(1);
  add_text(command);
  add_needle(command);
  add_eval_ruler(command);
}

}  // namespace spot::cli
