// spot inspect: what a checkpoint is, what a selector adds to it, and what fits into memory.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "model/model_cache.h"
#include "report/page.h"
#include "selector/cache.h"
#include "selector/selector.h"

namespace spot::cli {
namespace {

struct InspectOptions {
  std::string model, preset = "spot", selector;
  double memory_gib = 80;
  int64_t kv_bytes = 2;
  KvCacheOptions kv_cache;
};

// Parameters of a decoder layer stack as published: embeddings, projections, norms; each linear-attention
// layer by its own shapes.
int64_t backbone_parameters(const ModelConfig& c) {
  const int64_t mlp =
      3 * c.hidden_size * c.intermediate_size + (c.mlp_bias ? 2 * c.intermediate_size + c.hidden_size : 0);
  int64_t total = c.vocab_size * c.hidden_size * (c.tie_word_embeddings ? 1 : 2) + c.hidden_size;
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    total += mlp + 2 * c.hidden_size;
    if (c.is_full_attention(layer)) {
      const int64_t q = c.num_heads * c.head_dim * (c.attention_output_gate ? 2 : 1),
                    kv = c.num_kv_heads * c.head_dim;
      total += c.hidden_size * (q + 2 * kv + c.num_heads * c.head_dim) + (c.qk_norm ? 2 * c.head_dim : 0);
      total += (c.qkv_bias ? q + 2 * kv : 0) + (c.attention_output_bias ? c.hidden_size : 0);
    } else {
      const auto& l = c.linear;
      const int64_t keys = l.num_key_heads * l.key_head_dim, values = l.num_value_heads * l.value_head_dim;
      total += c.hidden_size * (2 * keys + 2 * values + 2 * l.num_value_heads) + values * c.hidden_size;
      total += (2 * keys + values) * l.conv_kernel + 2 * l.num_value_heads + l.value_head_dim;
    }
  }
  return total;
}

// Selector parameters of one layer, for layers not in dense_layers.
int64_t selector_parameters(const SelectorConfig& s, const ModelConfig& c, int64_t layers) {
  const int64_t groups = s.scope == SelectorScope::kv_group ? c.num_kv_heads : 1;
  const int64_t norm = s.key_norm == KeyNorm::layernorm ? 2 * s.head_dim
                       : s.key_norm == KeyNorm::rmsnorm ? s.head_dim
                                                        : 0;
  return layers *
         (c.hidden_size * (s.num_heads * s.head_dim + s.key_heads * s.head_dim + groups * s.num_heads) +
          norm);
}

std::string in_gib(double bytes) {
  return fmt::format("{:.2f} GiB", bytes / (1 << 30));
}

void run_inspect(const InspectOptions& options) {
  const ModelConfig model = ModelConfig::load(options.model);
  SelectorConfig selector = SelectorConfig::from_preset(options.preset);
  if (!options.selector.empty()) selector = Selector::read_config(options.selector, options.model, model);
  const std::vector<int64_t> full = model.full_attention_layers();
  std::string with;
  int64_t selected = 0;
  for (int64_t layer : full) {
    const auto& dense = selector.selection.dense_layers;
    if (std::find(dense.begin(), dense.end(), layer) != dense.end()) continue;
    with += fmt::format("{}{}", selected ? " " : "", layer);
    ++selected;
  }
  const int64_t weights = backbone_parameters(model), extra = selector_parameters(selector, model, selected);
  fmt::print(
      "{} ({}): {} layers, hidden {}, {} query heads and {} KV heads of {} dims, vocabulary {}, positions {}\n",
      model.architecture, model.model_type, model.num_layers, model.hidden_size, model.num_heads,
      model.num_kv_heads, model.head_dim, model.vocab_size, model.max_position_embeddings);
  fmt::print("parameters: {:.1f}M; {} full-attention layers, {} linear-attention layers\n",
             static_cast<double>(weights) / 1e6, full.size(),
             model.num_layers - static_cast<int64_t>(full.size()));
  fmt::print("selector ({}): {:.2f}M parameters ({:.2f}% of the backbone), in {} layers: {}\n",
             options.selector.empty() ? "preset " + options.preset : options.selector,
             static_cast<double>(extra) / 1e6,
             100.0 * static_cast<double>(extra) / static_cast<double>(weights), selected, with);

  // The cache itself says what it holds; on no device, so that nothing is allocated.
  const int64_t kv_bytes = options.kv_cache.dtype == KvCacheDtype::fp8 ? 1 : options.kv_bytes;
  const at::ScalarType dtype = kv_bytes == 1 ? at::kByte : kv_bytes == 2 ? at::kBFloat16 : at::kFloat;
  ModelCache cache(model, 1, dtype, at::kMeta);
  const double kv = static_cast<double>(cache.pools().page_bytes()) / static_cast<double>(cache.page_size());
  const double state = static_cast<double>(cache.states().slot_bytes());
  const double memory =
      options.memory_gib * (1 << 30) - static_cast<double>((weights + extra) * options.kv_bytes) - state;
  fmt::print("KV cache: {:.0f} bytes a token, all layers ({} {} a number)", kv, kv_bytes,
             kv_bytes == 1 ? "byte" : "bytes");
  if (state > 0) fmt::print("; recurrent state {} a sequence", in_gib(state));
  fmt::print("\n\n");
  Table table{{"selector cache", "bytes/token/layer", "bytes/token", "of KV",
               fmt::format("longest context in {:g} GiB", options.memory_gib)},
              {}};
  auto row = [&](const std::string& name, double per_layer) {
    const double bytes = per_layer * static_cast<double>(selected);
    const double longest = std::floor(memory / (kv + bytes));
    table.rows.push_back({name, fmt::format("{:g}", per_layer), fmt::format("{:g}", bytes),
                          fmt::format("{:.2f}%", 100 * bytes / kv),
                          memory <= 0 ? "weights do not fit" : fmt::format("{:.0f} tokens", longest)});
  };
  row("none (dense)", 0);
  for (KeyFormat format :
       {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4}) {
    const SelectorCache one(selector, {0}, cache.pools(), format);
    row(to_string(format), one.bytes_per_token());
  }
  fmt::print("{}", table.to_text());
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App& command =
      *app.add_subcommand("inspect", "Show a checkpoint, its selector's overhead and its memory use");
  command.add_option("model", options->model, kModelHelp)->required()->transform(checkpoint_folder());
  command.add_option("--preset", options->preset, "Selector preset: spot or paper")->capture_default_str();
  command.add_option("--selector", options->selector, "A distilled selector instead of a preset");
  command.add_option("--memory", options->memory_gib, "Memory in GiB for weights and caches")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  command.add_option("--bytes", options->kv_bytes, "Bytes a number of weights and KV cache (2: bfloat16)")
      ->check(CLI::IsMember({1, 2, 4}))
      ->capture_default_str();
  options->kv_cache.add(command);
  command.callback([options, &command] {
    check_needs(command, options->selector.empty() ? std::set{Need::preset} : std::set<Need>{});
    run_inspect(*options);
  });
}

}  // namespace spot::cli
