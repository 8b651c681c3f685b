#include "cli/options.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <algorithm>
#include <cstdio>
#include <future>
#include <system_error>
#include <thread>

#include "checkpoint/hub.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/notice.h"
#include "engine/self_check.h"
#include "ops/device.h"

namespace spot::cli {
namespace {

constexpr int kMostThreads = 1024;

// OpenMP ends the process where a thread cannot be started, in the middle of the work: tried here first.
void set_threads(int count) {
  if (count == 0) return;
  std::promise<void> all_started;
  const std::shared_future<void> go = all_started.get_future().share();
  std::vector<std::thread> trial;
  std::string why;
  try {
    for (int i = 1; i < count; ++i) trial.emplace_back([go] { go.wait(); });
  } catch (const std::system_error& e) {
    why = e.code().message();
  }
  all_started.set_value();
  for (std::thread& thread : trial) thread.join();
  if (!why.empty())
    fail("--threads {}: only {} can be started here ({}); give fewer", count, trial.size() + 1, why);
  at::set_num_threads(count);
}

}  // namespace

CLI::Validator checkpoint_folder() {
  return CLI::Validator(
      [](std::string& given) {
        given = find_checkpoint(given).string();
        return std::string();
      },
      "");
}

CLI::Validator output_file() {
  return CLI::Validator(
      [](const std::string& given) {
        refuse_special(given);
        return std::string();
      },
      "");
}

void ModelOptions::add(CLI::App& app, const std::string& name) {
  app.add_option(name, folder, kModelHelp)->required()->transform(checkpoint_folder());
  app.add_option("--device", device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--dtype", dtype,
                 "auto, float32, bfloat16 or float16 (auto: float32 on CPU, the checkpoint's on CUDA)")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16"}))
      ->capture_default_str();
  app.add_option("--threads", threads, "CPU threads (0: all cores)")
      ->check(CLI::Range(0, kMostThreads))
      ->capture_default_str();
}

at::Device ModelOptions::resolve_device() const {
  std::string name = device;
  if (name == "auto") name = at::globalContext().hasCUDA() ? "cuda" : "cpu";
  if (name != "cpu" && name.rfind("cuda", 0) != 0)
    fail("device '{}' is unknown; give auto, cpu, cuda or cuda:N", device);
  if (name != "cpu" && !at::globalContext().hasCUDA())
    fail("device '{}': this machine (or this build of torch) has no CUDA; use --device cpu", device);
  if (name == "cuda" && local_rank >= at::detail::getCUDAHooks().deviceCount())
    fail(
        "process {} of this machine finds {} GPUs, one each is needed; start fewer processes, or use --device cpu",
        local_rank, static_cast<int>(at::detail::getCUDAHooks().deviceCount()));
  const at::Device resolved(name == "cuda" ? fmt::format("cuda:{}", local_rank) : name);
  if (const std::string refusal = ops::device_refusal(resolved); !refusal.empty())
    fail("device '{}': {}", resolved.str(), refusal);
  return resolved;
}

at::ScalarType ModelOptions::resolve_dtype(const ModelConfig& config) const {
  std::string name = dtype;
  if (name == "auto") name = resolve_device().is_cpu() ? "float32" : config.torch_dtype;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  return at::kFloat;
}

ModelConfig ModelOptions::prepare() const {
  set_threads(threads);
  resolve_device();
  return ModelConfig::load(folder);
}

Backbone ModelOptions::load(const Shards& shards) const {
  const ModelConfig config = prepare();
  return Backbone::load(folder, config, resolve_device(), resolve_dtype(config), shards);
}

void SelectorOptions::add(CLI::App& app) {
  app.add_option("--selector", name, "Folder of a selector, or the NAME of one in MODEL/selectors");
}

std::optional<SelectorConfig> SelectorOptions::read_config(const ModelOptions& model,
                                                           const ModelConfig& config) const {
  if (name.empty()) return {};
  return Selector::read_config(name, model.folder, config);
}

std::optional<Selector> SelectorOptions::load(const ModelOptions& model, const Backbone& backbone) const {
  if (name.empty()) return {};
  Selector selector =
      Selector::load(name, model.folder, backbone.config(), backbone.device(), backbone.dtype());
  if (const std::string text = foreign_weights(selector, backbone); !text.empty())
    notice("warning: {}: {}\n", name, text);
  selector.join(backbone);
  return selector;
}

void MethodOptions::add(CLI::App& app) {
  app.add_option(
      "--top-p", p,
      "Dual top-p: nucleus mass over the residual blocks, in (0, 1]; twilight: mass kept by its pruner");
  app.add_option(
      "--threshold", threshold,
      "Every block that holds this share of all attention, by the selector's estimate, in (0, 1] (other methods: of their own scores' "
      "residual mass)");
  app.add_option(
      "--mass", mass,
      "The threshold that captured this share of all attention on the text that the selector was calibrated on");
  app.add_option("--top-k-tokens", budget,
                 "Fixed budget: tokens attended by each query; twilight: tokens that it prunes");
  app.add_option("--top-k-share", share,
                 "Fixed budget as a share of the context, in (0, 1]; twilight: default 0.25");
  app.add_option("--sinks", sinks, "Reserved tokens at the start of the context");
  app.add_option("--recency", recency, "Reserved tokens at its end");
  app.add_option("--floor", floor, "Fewest tokens attended; shorter contexts are dense");
  app.add_option("--cap", cap, "Most tokens attended under --top-p, --threshold or --mass (0: no cap)");
  app.add_option("--selection-temperature", temperature,
                 "Divides block scores before the nucleus, times the fitted one");
  app.add_option("--cache-format", cache_format, "Selector keys: f32, bf16, int8, int4, mxfp4 or nvfp4");
  app.add_option("--dense-layers", dense_layers,
                 "The first N layers attend densely (Quest's and Twilight's authors: 2)")
      ->check(CLI::NonNegativeNumber);
}

CLI::Option* MethodOptions::add_prefill(CLI::App& app) {
  return app
      .add_option_function<std::string>(
          "--prefill", [this](const std::string& word) { prefill = prefill_mode(word); },
          fmt::format(
              "How prompts are read: dense, sparse (a block set for each tile of queries), or auto: sparse from "
              "{} tokens on (default: dense)",
              kSparsePrefillFrom))
      ->check(CLI::IsMember({"dense", "sparse", "auto"}));
}

MethodSpec MethodOptions::parse(const std::string& text, const SelectorConfig* selector) const {
  MethodSpec spec = parse_method(text, *this, selector);
  check_selector(attention_method(spec.word), selector != nullptr);
  return spec;
}

void MethodOptions::check_read(const CLI::App& command, const std::vector<MethodSpec>& methods,
                               const std::set<std::string>& read_by_command) {
  static constexpr std::pair<const char*, const char*> kFlags[] = {{"p", "--top-p"},
                                                                   {"t", "--threshold"},
                                                                   {"m", "--mass"},
                                                                   {"k", "--top-k-tokens"},
                                                                   {"k%", "--top-k-share"},
                                                                   {"sinks", "--sinks"},
                                                                   {"recency", "--recency"},
                                                                   {"floor", "--floor"},
                                                                   {"cap", "--cap"},
                                                                   {"temperature", "--selection-temperature"},
                                                                   {"cache", "--cache-format"},
                                                                   {"dense", "--dense-layers"},
                                                                   {"prefill", "--prefill"}};
  std::string names;
  for (const MethodSpec& spec : methods) names += (names.empty() ? "" : "; ") + spec.name;
  for (const auto& [key, flag] : kFlags) {
    const CLI::Option* option = command.get_option_no_throw(flag);
    const bool zero = key == std::string("dense") && option && option->count() > 0 && option->as<int>() == 0;
    if (!option || option->count() == 0 || zero || read_by_command.contains(flag)) continue;
    if (std::none_of(methods.begin(), methods.end(),
                     [&](const MethodSpec& spec) { return spec.from_base.contains(key); }))
      throw UsageError(fmt::format("{} has no effect: no attention here reads it ({}); leave it out", flag,
                                   names.empty() ? "dense" : names));
  }
}

void KvCacheOptions::add(CLI::App& app) {
  app.add_option_function<std::string>(
         "--kv-cache-dtype", [this](const std::string& word) { dtype = *kv_cache_dtype(word); },
         "Keys and values in the cache: auto (the model's dtype) or fp8 (E4M3, a scale a layer and KV head)")
      ->check(CLI::IsMember({"auto", "fp8"}))
      ->default_str("auto");
}

void KvCacheOptions::check(const std::vector<MethodSpec>& methods) const {
  for (const MethodSpec& method : methods) check_kv_cache(dtype, method);
}

void SamplingFlags::add(CLI::App& app) {
  app.add_option("--temperature", temperature,
                 "0: greedy (this and the next ones: default as in the model's generation_config.json)");
  app.add_option("--sampling-top-p", top_p, "Nucleus of the sampler");
  app.add_option("--sampling-top-k", top_k, "Candidates of the sampler (0: all)");
  app.add_option("--sampling-min-p", min_p, "Least probability of a candidate, relative to the likeliest");
  app.add_option("--repetition-penalty", repetition_penalty,
                 "Divides logits of tokens seen before (1: none)");
  app.add_option("--presence-penalty", presence_penalty, "Subtracted from logits of tokens written before");
  app.add_option("--frequency-penalty", frequency_penalty, "The same for each time they were written");
  app.add_option("--logit-bias", logit_bias, "ID=BIAS, added to the logit of a token")->delimiter(',');
  app.add_option("--seed", seed, "Seed of the sampler")->capture_default_str();
}

SamplingOptions SamplingFlags::resolve(const std::filesystem::path& model_folder) const {
  SamplingOptions options = SamplingOptions::from_generation_config(model_folder);
  const auto set = [](const auto& flag, auto& field) {
    if (flag) field = *flag;
  };
  set(temperature, options.temperature), set(top_p, options.top_p), set(top_k, options.top_k);
  set(min_p, options.min_p), set(repetition_penalty, options.repetition_penalty);
  set(presence_penalty, options.presence_penalty), set(frequency_penalty, options.frequency_penalty);
  for (const std::string& text : logit_bias) {
    int id = 0;
    double bias = 0;
    char extra = 0;
    if (std::sscanf(text.c_str(), "%d=%lf%c", &id, &bias, &extra) != 2)
      fail("--logit-bias is '{}'; give ID=BIAS, such as 42=-5", text);
    const auto names = [&](const std::pair<int32_t, double>& other) { return other.first == id; };
    if (std::any_of(options.logit_bias.begin(), options.logit_bias.end(), names))
      fail("--logit-bias names token {} twice; give one bias", id);
    options.logit_bias.emplace_back(id, bias);
  }
  options.seed = seed;
  return options;
}

}  // namespace spot::cli
