// spot eval: how sparse attention compares with dense attention, on text and on retrieval.
#include <memory>

#include "cli/commands.h"
#include "cli/eval_options.h"
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
  command.callback([options, eval] {
    prepare_output(options->out);
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    const Selector* chosen = selector ? &*selector : nullptr;
    const auto tokens = Tokenizer::load(options->model.folder).encode(options->read_text());
    deliver(evaluate_text(backbone, chosen, tokens, options->parse_methods(chosen, false), *eval),
            "spot eval text", options->out);
  });
}

void add_needle(CLI::App& parent) {
  auto options = std::make_shared<EvalOptions>();
  auto needle = std::make_shared<NeedleOptions>();
  auto lengths = std::make_shared<std::vector<int64_t>>(1, needle->length);
  CLI::App& command = *parent.add_subcommand(
      "needle", "Multi-key needle retrieval, every method after the same dense prefill");
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
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--distractors", needle->distractors, "Needles with other keys")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--seed", needle->seed, "Seed of the prompts")->capture_default_str();
  command.callback([options, needle, lengths] {
    prepare_output(options->out);
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    const Selector* chosen = selector ? &*selector : nullptr;
    const Tokenizer tokenizer = Tokenizer::load(options->model.folder);
    const std::string filler = options->read_text();
    const auto methods = options->parse_methods(chosen, true);
    NeedleSweep sweep;
    for (int64_t length : *lengths) {
      NeedleOptions one = *needle;
      one.length = length;
      const auto prompts = make_needle_prompts(tokenizer, filler, one);
      sweep.lengths.push_back(evaluate_needles(backbone, chosen, tokenizer, prompts, one, methods));
    }
    deliver(sweep, "spot eval needle", options->out);
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
