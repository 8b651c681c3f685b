// spot eval: how sparse attention compares with dense attention, on text and on retrieval.
#include <fmt/format.h>

#include <filesystem>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/files.h"
#include "eval/needle_eval.h"
#include "eval/text_eval.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

// What `spot eval text` and `spot eval needle` share.
struct Options {
  ModelOptions model;
  SelectorOptions selector;
  RuleOptions rule;
  std::vector<std::string> methods, text_files;
  std::string out;

  void add(CLI::App& command) {
    model.add(command);
    selector.add(command);
    rule.add(command);
    command.add_option("--methods", methods,
                       "Comma-separated attentions, each with an optional rule: spot:p=0.9, spot:k=1024, streaming:k=1024, oracle:p=0.8, "
                       "quest:k=10% (default: spot as its selector says, streaming and oracle at 1024 tokens)")
        ->delimiter(',');
    command.add_option("--text", text_files, "Text files")->required();
    command.add_option("--out", out, "Folder for report.html and report.json");
  }
};

// "spot:p=0.9" -> the method; without a rule the command line's (or the selector's) holds.
EvalMethod parse_method(const std::string& word, const RuleOptions& base, const Selector* selector) {
  const size_t colon = word.find(':');
  RuleOptions rule = base;
  if (colon != std::string::npos) {
    const std::string text = word.substr(colon + 1);
    auto refuse = [&] { fail("method '{}': the rule '{}' is not p=SHARE, k=TOKENS or k=PERCENT%", word, text); };
    if (text.size() < 3 || text[1] != '=' || (text[0] != 'p' && text[0] != 'k')) refuse();
    const bool percent = text.back() == '%';
    double value = 0;
    try {
      size_t used = 0;
      value = std::stod(text.substr(2), &used);
      if (used + 2 + (percent ? 1 : 0) != text.size()) refuse();
    } catch (const std::logic_error&) {
      refuse();
    }
    rule.p.reset(), rule.budget.reset(), rule.share.reset();
    if (text[0] == 'p') rule.p = value;
    else if (percent) rule.share = value / 100;
    else rule.budget = static_cast<int64_t>(value);
  }
  return {word, rule.spec(attention_kind_from_string(word.substr(0, colon)), selector)};
}

std::vector<EvalMethod> parse_methods(const Options& options, const Selector* selector, bool with_dense) {
  std::vector<std::string> words = options.methods;
  if (words.empty()) {
    words = {"streaming:k=1024", "oracle:k=1024"};
    if (selector) words.insert(words.begin(), {"spot", "spot:k=1024"});
  }
  std::vector<EvalMethod> methods;
  if (with_dense) methods.push_back({"dense", AttentionSpec{}});
  for (const std::string& word : words) {
    if (word != "dense") methods.push_back(parse_method(word, options.rule, selector));
  }
  return methods;
}

std::string read_text(const std::vector<std::string>& files) {
  std::string text;
  for (const std::string& file : files) text += read_file(file) + "\n";
  return text;
}

template <typename Result>
void deliver(const Result& result, const std::string& title, const std::string& out) {
  fmt::print("{}", result.summary().to_text());
  if (out.empty()) return;
  make_folder(out);
  Page page(title);
  result.add_to(page);
  const std::filesystem::path folder = out;
  write_file_atomically(folder / "report.json", result.to_json().dump(1) + "\n");
  write_file_atomically(folder / "report.html", page.html());
  fmt::print("report: {}\n", (folder / "report.html").string());
}

void add_text(CLI::App& parent) {
  auto options = std::make_shared<Options>();
  auto eval = std::make_shared<TextEvalOptions>();
  CLI::App& command = *parent.add_subcommand("text", "Perplexity, captured attention mass and calibration on running text");
  options->add(command);
  command.add_option("--length", eval->length, "Tokens a sequence")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--sequences", eval->sequences, "Sequences")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--skip", eval->skip, "First position that is scored")->check(CLI::NonNegativeNumber)->capture_default_str();
  command.add_option("--chunk", eval->chunk, "Tokens a forward call")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--measured-queries", eval->measured_queries, "Queries a chunk whose true attention is computed")
      ->check(CLI::PositiveNumber)->capture_default_str();
  command.callback([options, eval] {
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    const Selector* chosen = selector ? &*selector : nullptr;
    const auto tokens = Tokenizer::load(options->model.folder).encode(read_text(options->text_files));
    deliver(evaluate_text(backbone, chosen, tokens, parse_methods(*options, chosen, false), *eval), "spot eval text", options->out);
  });
}

void add_needle(CLI::App& parent) {
  auto options = std::make_shared<Options>();
  auto needle = std::make_shared<NeedleOptions>();
  CLI::App& command = *parent.add_subcommand("needle", "Multi-key needle retrieval, every method after the same dense prefill");
  options->add(command);
  command.add_option("--length", needle->length, "Tokens a prompt")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--samples", needle->samples, "Prompts")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--distractors", needle->distractors, "Needles with other keys")->check(CLI::NonNegativeNumber)->capture_default_str();
  command.add_option("--seed", needle->seed, "Seed of the prompts")->capture_default_str();
  command.callback([options, needle] {
    const Backbone backbone = options->model.load();
    const std::optional<Selector> selector = options->selector.load(options->model, backbone);
    const Selector* chosen = selector ? &*selector : nullptr;
    const Tokenizer tokenizer = Tokenizer::load(options->model.folder);
    const auto prompts = make_needle_prompts(tokenizer, read_text(options->text_files), *needle);
    const auto methods = parse_methods(*options, chosen, true);
    deliver(evaluate_needles(backbone, chosen, tokenizer, prompts, *needle, methods), "spot eval needle", options->out);
  });
}

}  // namespace

void add_eval(CLI::App& app) {
  CLI::App& command = *app.add_subcommand("eval", "Compare sparse attention with dense attention");
  command.require_subcommand(1);
  add_text(command);
  add_needle(command);
}

}  // namespace spot::cli
