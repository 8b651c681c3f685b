#include "cli/eval_options.h"

#include "core/error.h"

namespace spot::cli {
namespace {

// "spot:p=0.9" -> the method; without a rule the command line's (or the selector's) holds.
EvalMethod parse_method(const std::string& word, const RuleOptions& base, const Selector* selector) {
  const size_t colon = word.find(':');
  RuleOptions rule = base;
  if (colon != std::string::npos) {
    const std::string text = word.substr(colon + 1);
    auto refuse = [&] {
      fail("method '{}': the rule '{}' is not p=SHARE, k=TOKENS or k=PERCENT%", word, text);
    };
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
    if (text[0] == 'p')
      rule.p = value;
    else if (percent)
      rule.share = value / 100;
    else
      rule.budget = static_cast<int64_t>(value);
  }
  return {word, rule.spec(attention_kind_from_string(word.substr(0, colon)), selector)};
}

}  // namespace

CLI::Option* EvalOptions::add(CLI::App& command) {
  model.add(command);
  selector.add(command);
  rule.add(command);
  command
      .add_option("--methods", methods,
                  "Comma-separated attentions, each with an optional rule: spot:p=0.9, spot:k=1024, "
                  "streaming:k=1024, oracle:p=0.8, "
                  "quest:k=10% (default: spot as its selector says, streaming and oracle at 1024 tokens)")
      ->delimiter(',');
  command.add_option("--out", out, "Folder for report.html and report.json");
  return command.add_option("--text", text_files, "Text files");
}

std::vector<EvalMethod> EvalOptions::parse_methods(const Selector* selector, bool with_dense) const {
  std::vector<std::string> words = methods;
  if (words.empty()) {
    words = {"streaming:k=1024", "oracle:k=1024"};
    if (selector) words.insert(words.begin(), {"spot", "spot:k=1024"});
  }
  std::vector<EvalMethod> parsed;
  if (with_dense) parsed.push_back({"dense", AttentionSpec{}});
  for (const std::string& word : words) {
    if (word != "dense") parsed.push_back(parse_method(word, rule, selector));
  }
  return parsed;
}

std::string EvalOptions::read_text() const {
  std::string text;
  for (const std::string& file : text_files) text += read_file(file) + "\n";
  return text;
}

}  // namespace spot::cli
