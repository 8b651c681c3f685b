// Options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>

#include "engine/attention_choice.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot::cli {

inline constexpr const char* kModelHelp =
    "Folder of a Hugging Face checkpoint, or ORG/NAME that the local hub cache holds";
// Turns what --model was given into a folder (find_checkpoint).
CLI::Validator checkpoint_folder();

// --model, --device, --dtype, --threads
struct ModelOptions {
  std::string folder, device = "auto", dtype = "auto";
  int threads = 0;
  int local_rank = 0;  // which of the machine's GPUs "auto" and "cuda" mean

  void add(CLI::App& app);
  at::Device resolve_device() const;
  at::ScalarType resolve_dtype(const ModelConfig& config) const;  // what load() would use
  Backbone load(const Shards& shards = {}) const;
};

// --selector
struct SelectorOptions {
  std::string name;

  void add(CLI::App& app);
  // Empty when no selector was named.
  std::optional<Selector> load(const ModelOptions& model, const Backbone& backbone) const;
};

// --top-p | --threshold | --top-k-tokens | --top-k-share, and the reserved tiers. Twilight takes p together with one of the
// others.
struct RuleOptions {
  std::optional<double> p, threshold, share, temperature;
  std::optional<int32_t> budget, sinks, recency, floor, cap;  // tokens
  std::optional<std::string> cache_format;
  int64_t dense_layers = 0;  // the first layers, which then do not select

  void add(CLI::App& app);
  // The selector's defaults (or the method's, without one) with what was given on the command line.
  SelectionRule rule(const Selector* selector) const;
  // Throws Error when options do not go together.
  AttentionSpec spec(AttentionKind kind, const Selector* selector) const;
};

}  // namespace spot::cli
