// Options that several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "attention/kv_scales.h"
#include "attention/methods.h"
#include "engine/sampling.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot::cli {

inline constexpr const char* kModelHelp =
    "Folder of a Hugging Face checkpoint, or ORG/NAME that the local hub cache holds";
// Turns what --model was given into a folder (find_checkpoint).
CLI::Validator checkpoint_folder();
// Refuses what a report would replace: a device, a pipe (refuse_special).
CLI::Validator output_file();

// --model, --device, --dtype, --threads
struct ModelOptions {
  std::string folder, device = "auto", dtype = "auto";
  int threads = 0;
  int local_rank = 0;  // which of the machine's GPUs "auto" and "cuda" mean

  // `name`: how the folder is given.
  void add(CLI::App& app, const std::string& name = "--model");
  at::Device resolve_device() const;
  at::ScalarType resolve_dtype(const ModelConfig& config) const;  // what load() would use
  // Sets the number of threads and reads config.json: what can be wrong is found before the weights are read. Throws
  // Error when the device is not there or the threads cannot be started.
  ModelConfig prepare() const;
  Backbone load(const Shards& shards = {}) const;
};

// --selector
struct SelectorOptions {
  std::string name;

  void add(CLI::App& app);
  // What the selector says of itself, read without its weights; empty when no selector was named.
  std::optional<SelectorConfig> read_config(const ModelOptions& model, const ModelConfig& config) const;
  // Empty when no selector was named. Warns when it was distilled on other weights than the backbone's.
  std::optional<Selector> load(const ModelOptions& model, const Backbone& backbone) const;
};

// The settings of attention methods as flags: what a method's own text does not say (attention/methods.h).
struct MethodOptions : MethodSettings {
  void add(CLI::App& app);
  // --prefill, of commands that read prompts.
  CLI::Option* add_prefill(CLI::App& app);
  // parse_method; Error, too, when the method needs a selector and there is none.
  MethodSpec parse(const std::string& text, const SelectorConfig* selector) const;
  // Throws UsageError when an option of these was given that none of `methods` reads, nor the command itself.
  static void check_read(const CLI::App& command, const std::vector<MethodSpec>& methods,
                         const std::set<std::string>& read_by_command = {});
};

// --kv-cache-dtype
struct KvCacheOptions {
  KvCacheDtype dtype = KvCacheDtype::automatic;

  void add(CLI::App& app);
  // Throws Error when the cache does not serve one of the methods.
  void check(const std::vector<MethodSpec>& methods) const;
};

// The sampler's settings: the checkpoint's generation_config.json, and above it what was given on the command line.
struct SamplingFlags {
  std::optional<double> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int64_t> top_k;
  std::vector<std::string> logit_bias;  // ID=BIAS
  uint64_t seed = 42;

  void add(CLI::App& app);
  SamplingOptions resolve(const std::filesystem::path& model_folder) const;
};

}  // namespace spot::cli
