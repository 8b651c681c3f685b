#include "cli/eval_options.h"

#include <csignal>

#include "core/error.h"
#include "core/notice.h"
#include "core/text_file.h"
#include "engine/self_check.h"

namespace spot::cli {

CLI::Option* EvalOptions::add(CLI::App& command) {
  model.add(command);
  selector.add(command);
  method.add(command);
  method.add_prefill(command);
  kv_cache.add(command);
  command
      .add_option(
          "--methods", methods,
          "Comma-separated attentions (" + attention_words() +
              "), each with settings of its own if wanted (" + method_grammar() +
              "): spot:p=0.9, spot:m=0.9, spot:t=0.001, spot:k=1024,cache=mxfp4, streaming:k=1024, quest:k=10%,dense=2, twilight:p=0.95,k=25% "
              "(Quest proposes k, p is kept of it); spot:k=10%,prefill=sparse reads the context sparsely too, one block "
              "set for each tile of queries. Default: spot as its selector says, streaming and oracle at 1024 tokens")
      ->delimiter(',');
  command.add_option("--out", out, "Folder for report.html and report.json");
  return command.add_option("--text", text_files, "Text files");
}

std::vector<MethodSpec> EvalOptions::parse_methods(const SelectorConfig* selector, bool with_dense) const {
  std::vector<std::string> words = join_methods(methods);
  if (words.empty()) {
    words = {"streaming:k=1024", "oracle:k=1024"};
    if (selector) words.insert(words.begin(), {"spot", "spot:k=1024"});
  }
  std::vector<MethodSpec> parsed;
  if (with_dense) parsed.emplace_back();
  for (const std::string& word : words) {
    MethodSpec spec = method.parse(word, selector);
    if (!spec.is_dense()) parsed.push_back(std::move(spec));
  }
  return parsed;
}

std::vector<MethodSpec> EvalOptions::checked_methods(const CLI::App& command, const ModelConfig& config,
                                                     bool with_dense) const {
  const std::optional<SelectorConfig> said = selector.read_config(model, config);
  const auto parsed = parse_methods(said ? &*said : nullptr, with_dense);
  MethodOptions::check_read(command, parsed);
  kv_cache.check(parsed);
  return parsed;
}

std::string EvalOptions::read_text() const {
  std::string text;
  for (const std::string& file : text_files) text += read_text_file(file) + "\n";
  return text;
}

void judge_captured(const Backbone& backbone, const std::optional<Selector>& selector,
                    const std::vector<MethodSpec>& methods, const std::function<double(size_t)>& captured) {
  if (!selector || selector->made_for(backbone.fingerprint())) return;
  for (size_t i = 0; i < methods.size(); ++i) {
    if (!attention_method(methods[i].word).needs_selector) continue;
    if (const std::string text = low_mass(methods[i].name, captured(i)); !text.empty())
      notice("warning: {}\n", text);
  }
}

FolderLock prepare_output(const std::string& out, const std::string& command) {
  // A reader of the progress lines that goes away must not end hours of work; writes fail instead.
  std::signal(SIGPIPE, SIG_IGN);
  if (out.empty()) return {};
  make_folder(out);
  FolderLock lock(out, command);
  const std::filesystem::path probe = std::filesystem::path(out) / ".writable";
  write_file_atomically(probe, std::string(4096, ' '));
  std::filesystem::remove(probe);
  return lock;
}

}  // namespace spot::cli
