#include "cli/eval_options.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "core/error.h"

namespace spot::cli {
namespace {

// A number, or with '%' at its end a hundredth of one; nothing else.
std::optional<double> parse_number(std::string text) {
  const double unit = !text.empty() && text.back() == '%' ? 0.01 : 1;
  if (unit != 1) text.pop_back();
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  return value * unit;
}

// Sets one KEY=VALUE of a method; false when it is not one of ours.
bool set_option(RuleOptions& rule, const std::string& key, const std::string& value) {
  if (key == "cache") {
    rule.cache_format = value;
    return true;
  }
  const std::optional<double> number = parse_number(value);
  const bool percent = value.back() == '%';
  if (!number || (percent && key != "k")) return false;
  if (key == "p")
    rule.p = *number;
  else if (key == "t")
    rule.threshold = *number;
  else if (key == "k" && percent)
    rule.share = *number;
  else if (key == "k")
    rule.budget = static_cast<int32_t>(std::clamp(*number, 0.0, 1e9));
  else if (key == "dense")
    rule.dense_layers = static_cast<int64_t>(*number);
  else
    return false;
  return true;
}

// "spot:p=0.9,cache=int8" -> the method; what it does not say is as on the command line (or in the selector).
EvalMethod parse_method(const std::string& word, const RuleOptions& base, const Selector* selector) {
  const size_t colon = word.find(':');
  RuleOptions rule = base;
  bool sparse_prefill = false;
  std::string rest = colon == std::string::npos ? "" : word.substr(colon + 1);
  // A method with a rule of its own has that alone.
  if (rest.find("p=") != std::string::npos || rest.find("k=") != std::string::npos ||
      rest.find("t=") != std::string::npos)
    rule.p.reset(), rule.threshold.reset(), rule.budget.reset(), rule.share.reset();
  while (!rest.empty()) {
    const std::string option = rest.substr(0, rest.find(','));
    rest.erase(0, option.size() + 1);
    const size_t equals = option.find('=');
    if (option == "prefill=sparse") {
      sparse_prefill = true;
      continue;
    }
    if (equals == std::string::npos || equals + 1 == option.size() ||
        !set_option(rule, option.substr(0, equals), option.substr(equals + 1)))
      fail(
          "method '{}': '{}' is not p=SHARE, t=THRESHOLD, k=TOKENS, k=PERCENT%, dense=LAYERS, cache=FORMAT or prefill=sparse",
          word, option);
  }
  const AttentionKind kind = attention_kind_from_string(word.substr(0, colon));
  if (kind != AttentionKind::spot && rule.cache_format != base.cache_format)
    fail("method '{}': only spot has a cache of selector keys; leave out cache=", word);
  EvalMethod method{word, rule.spec(kind, selector)};
  // As `spot generate --sparse-prefill` does it.
  if (sparse_prefill)
    method.spec.sparse.prefill = PrefillMode::sparse, method.spec.sparse.query_tile = kBlockSize;
  return method;
}

// Commas separate methods and the options of one: what has no name of an attention goes on with the one
// before.
std::vector<std::string> join_options(const std::vector<std::string>& words) {
  std::vector<std::string> joined;
  for (const std::string& word : words) {
    if (!joined.empty() && word.find('=') != std::string::npos && word.find(':') == std::string::npos)
      joined.back() += (joined.back().find(':') == std::string::npos ? ":" : ",") + word;
    else
      joined.push_back(word);
  }
  return joined;
}

}  // namespace

CLI::Option* EvalOptions::add(CLI::App& command) {
  model.add(command);
  selector.add(command);
  rule.add(command);
  command
      .add_option(
          "--methods", methods,
          "Comma-separated attentions, each with an optional rule, format of selector keys and number of "
          "dense first layers: spot:p=0.9, spot:t=0.001, spot:k=1024,cache=mxfp4, streaming:k=1024, oracle:p=0.8, "
          "quest:k=10%,dense=2, twilight:p=0.95,k=25% (Quest proposes k, p is kept of it); in eval ruler "
          "spot:k=10%,prefill=sparse reads the context sparsely too, one block set per 16 queries. Default: "
          "spot as its selector says, streaming and oracle at 1024 tokens")
      ->delimiter(',');
  command.add_option("--out", out, "Folder for report.html and report.json");
  return command.add_option("--text", text_files, "Text files");
}

std::vector<EvalMethod> EvalOptions::parse_methods(const Selector* selector, bool with_dense,
                                                   bool may_prefill) const {
  std::vector<std::string> words = join_options(methods);
  if (words.empty()) {
    words = {"streaming:k=1024", "oracle:k=1024"};
    if (selector) words.insert(words.begin(), {"spot", "spot:k=1024"});
  }
  std::vector<EvalMethod> parsed;
  if (with_dense) parsed.push_back({"dense", AttentionSpec{}});
  for (const std::string& word : words) {
    if (word == "dense") continue;
    parsed.push_back(parse_method(word, rule, selector));
    const AttentionSpec& spec = parsed.back().spec;
    if (spec.sparse.prefill == PrefillMode::sparse && (!may_prefill || spec.kind == AttentionKind::dense))
      fail("method '{}': only the sparse methods of `spot eval ruler` have prefill=sparse; leave it out",
           word);
  }
  return parsed;
}

std::string EvalOptions::read_text() const {
  std::string text;
  for (const std::string& file : text_files) text += read_file(file) + "\n";
  return text;
}

void prepare_output(const std::string& out) {
  if (out.empty()) return;
  make_folder(out);
  const std::filesystem::path probe = std::filesystem::path(out) / ".writable";
  write_file_atomically(probe, std::string(4096, ' '));
  std::filesystem::remove(probe);
}

}  // namespace spot::cli
