#include "cli/options.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include "checkpoint/hub.h"
#include "core/error.h"

namespace spot::cli {

CLI::Validator checkpoint_folder() {
  return CLI::Validator(
      [](std::string& given) {
        given = find_checkpoint(given).string();
        return std::string();
      },
      "");
}

void ModelOptions::add(CLI::App& app) {
  app.add_option("--model", folder, kModelHelp)->required()->transform(checkpoint_folder());
  app.add_option("--device", device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--dtype", dtype,
                 "auto, float32, bfloat16 or float16 (auto: float32 on CPU, the checkpoint's on CUDA)")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16"}))
      ->capture_default_str();
  app.add_option("--threads", threads, "CPU threads (0: all cores)")
      ->check(CLI::NonNegativeNumber)
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
  return at::Device(name == "cuda" ? fmt::format("cuda:{}", local_rank) : name);
}

at::ScalarType ModelOptions::resolve_dtype(const ModelConfig& config) const {
  std::string name = dtype;
  if (name == "auto") name = resolve_device().is_cpu() ? "float32" : config.torch_dtype;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  return at::kFloat;
}

Backbone ModelOptions::load(const Shards& shards) const {
  if (threads > 0) at::set_num_threads(threads);
  const ModelConfig config = ModelConfig::load(folder);
  return Backbone::load(folder, config, resolve_device(), resolve_dtype(config), shards);
}

void SelectorOptions::add(CLI::App& app) {
  app.add_option("--selector", name, "Folder of a selector, or the NAME of one in MODEL/selectors");
}

std::optional<Selector> SelectorOptions::load(const ModelOptions& model, const Backbone& backbone) const {
  if (name.empty()) return {};
  Selector selector = Selector::load(name, model.folder, backbone.config(), backbone.fingerprint(),
                                     backbone.device(), backbone.dtype());
  selector.join(backbone);
  return selector;
}

void RuleOptions::add(CLI::App& app) {
  app.add_option(
      "--top-p", p,
      "Dual top-p: nucleus mass over the residual blocks, in (0, 1]; twilight: mass kept by its pruner");
  app.add_option(
      "--threshold", threshold,
      "Every block that holds this share of the residual mass, by the selector's estimate, in (0, 1]");
  app.add_option("--top-k-tokens", budget,
                 "Fixed budget: tokens attended by each query; twilight: tokens that it prunes");
  app.add_option("--top-k-share", share,
                 "Fixed budget as a share of the context, in (0, 1]; twilight: default 0.25");
  app.add_option("--sinks", sinks, "Reserved tokens at the start of the context");
  app.add_option("--recency", recency, "Reserved tokens at its end");
  app.add_option("--floor", floor, "Fewest tokens attended; shorter contexts are dense");
  app.add_option("--cap", cap, "Most tokens attended under --top-p or --threshold (0: no cap)");
  app.add_option("--selection-temperature", temperature,
                 "Divides block scores before the nucleus, times the fitted one");
  app.add_option("--cache-format", cache_format, "Selector keys: f32, bf16, int8, int4, mxfp4 or nvfp4");
  app.add_option("--dense-layers", dense_layers,
                 "The first N layers attend densely (Quest's and Twilight's authors: 2)")
      ->check(CLI::NonNegativeNumber);
}

SelectionRule RuleOptions::rule(const Selector* selector) const {
  SelectionRule rule = selector ? selector->config().selection.rule : SelectionRule{};
  if (budget && *budget < 1) fail("--top-k-tokens is {}; it must be at least 1 token", *budget);
  if (share && !(*share > 0 && *share <= 1))
    fail("--top-k-share is {}; it must be above 0 and at most 1", *share);
  if (p) rule.mode = SelectionMode::top_p, rule.p = *p;
  if (threshold) rule.mode = SelectionMode::threshold, rule.threshold = *threshold;
  if (budget) rule.mode = SelectionMode::top_k, rule.budget = *budget;
  if (share) rule.mode = SelectionMode::top_k, rule.budget_fraction = *share;
  if (sinks) rule.sinks = *sinks;
  if (recency) rule.recency = *recency;
  if (floor) rule.floor = *floor;
  if (cap) rule.cap = *cap;
  if (temperature) rule.temperature = *temperature;
  validate(rule);
  return rule;
}

AttentionSpec RuleOptions::spec(AttentionKind kind, const Selector* selector) const {
  AttentionSpec spec;
  spec.kind = kind;
  if (budget && share)
    fail("a fixed budget is given in tokens ({}) and as a share ({}); give one of them", *budget, *share);
  if (kind != AttentionKind::twilight && p && (budget || share))
    fail("attention '{}' takes top-p ({}) or a fixed budget, not both; give one of them", to_string(kind),
         *p);
  if (threshold && (p || budget || share))
    fail("attention '{}' takes a threshold ({}) or another rule, not both; give one of them", to_string(kind),
         *threshold);
  if (threshold && kind == AttentionKind::twilight)
    fail("twilight prunes what Quest proposes by a fixed budget; leave out the threshold ({})", *threshold);
  spec.rule = rule(selector);
  if (kind == AttentionKind::twilight) {
    // The defaults of its paper: Quest proposes a quarter of the context, and 95% of its weight is kept.
    spec.rule.mode = SelectionMode::top_k;
    if (!budget && !share) spec.rule.budget_fraction = 0.25;
    if (!p) spec.rule.p = 0.95;
  }
  for (int64_t layer = 0; layer < dense_layers; ++layer) spec.sparse.dense_layers.insert(layer);
  if (cache_format) spec.cache_format = key_format_from_string(*cache_format);
  return spec;
}

}  // namespace spot::cli
