// What the subcommands of `spot eval` share.
#pragma once

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "cli/options.h"
#include "core/files.h"
#include "core/folder_lock.h"
#include "report/page.h"

namespace spot::cli {

inline constexpr int64_t kMostSamples = 1'000'000;

struct EvalOptions {
  ModelOptions model;
  SelectorOptions selector;
  MethodOptions method;
  KvCacheOptions kv_cache;
  std::vector<std::string> methods, text_files;
  std::string out;

  // Returns the option --text.
  CLI::Option* add(CLI::App& command);
  // The methods named on the command line (or the default ones), dense first if asked for.
  std::vector<MethodSpec> parse_methods(const SelectorConfig* selector, bool with_dense) const;
  // parse_methods, before any weights are read. Throws UsageError on a flag that no method reads, Error on a method that
  // the cache does not serve.
  std::vector<MethodSpec> checked_methods(const CLI::App& command, const ModelConfig& config,
                                          bool with_dense) const;
  // The text files, one after the other.
  std::string read_text() const;
};

// Where the selector was distilled on other weights than the backbone's: warns of each method that reads it and captured
// too little. captured(i) is what method i captured as measured, not a number where nothing was.
void judge_captured(const Backbone& backbone, const std::optional<Selector>& selector,
                    const std::vector<MethodSpec>& methods, const std::function<double(size_t)>& captured);

// Makes the folder of the reports, locks it and writes a file there, so that a full disk is met before the work. Empty:
// nothing.
FolderLock prepare_output(const std::string& out, const std::string& command);

// Writes report.json and report.html into `out` unless that is empty, and prints the summary.
template <typename Result>
void deliver(const Result& result, const std::string& title, const std::string& out) {
  const std::filesystem::path folder = out;
  if (!out.empty()) {
    Page page(title);
    result.add_to(page);
    write_file_atomically(folder / "report.html", page.html());
    write_file_atomically(folder / "report.json", result.to_json().dump(1) + "\n");
  }
  fmt::print("{}", result.summary().to_text());
  if (!out.empty()) fmt::print("report: {}\n", (folder / "report.html").string());
}

}  // namespace spot::cli
