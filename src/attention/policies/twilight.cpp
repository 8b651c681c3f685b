#include "attention/policies/twilight.h"

#include <fmt/format.h>

#include <algorithm>

#include "attention/methods.h"
#include "core/error.h"

namespace spot {

TwilightPolicy::TwilightPolicy(const ModelConfig& model, PagePools& pools, const SelectionRule& rule,
                               double p)
    : QuestPolicy(model, pools, rule), p_(p) {
  if (!(p > 0 && p <= 1))
    fail("Twilight prunes to the mass p, which is {}; it must be above 0 and at most 1", p);
  if (model.head_dim % 2 != 0)
    fail("Twilight packs two 4-bit codes a byte, but head_dim is {}; use a model where it is even",
         model.head_dim);
  for (int64_t layer : model.full_attention_layers()) {
    const auto add = [&](const char* name, int64_t width, at::ScalarType dtype) {
      return pools.add(name, layer, {{model.num_kv_heads}, {pools.page_size(), width}}, dtype).flatten(1, 2);
    };
    codes_[layer] = add("twilight_codes", model.head_dim / 2, at::kByte);
    ranges_[layer] = add("twilight_ranges", 2, at::kHalf);
  }
}

void TwilightPolicy::append(const AttentionInputs& inputs) {
  append_summaries(inputs, codes_.at(inputs.layer), ranges_.at(inputs.layer));
}

ops::PrunedTokens TwilightPolicy::surviving_tokens(int64_t layer, const at::Tensor& query,
                                                   const at::Tensor& page_table, const at::Tensor& lengths,
                                                   double scale, const Selection& blocks) const {
  const int64_t rows = query.size(0), width = blocks.indices.size(2) * kBlockSize, floor = rule(layer).floor;
  // In parts, so that the logits of a chunk's queries stay small; a decode step is one.
  const int64_t step =
      std::min(std::max<int64_t>(1, (int64_t{1} << 26) / std::max<int64_t>(1, query.size(1) * width)),
               ops::kMaxAttentionParts / query.size(1));
  std::vector<at::Tensor> positions, counts;
  for (int64_t done = 0; done < rows; done += step) {
    auto part = [&](const at::Tensor& x) { return x.narrow(0, done, std::min(step, rows - done)); };
    const at::Tensor logits =
        ops::estimate_logits({part(query), codes_.at(layer), ranges_.at(layer), part(page_table),
                              part(lengths), part(blocks.indices), part(blocks.counts), scale});
    const ops::PrunedTokens kept =
        ops::prune_tokens({logits, part(blocks.indices), part(blocks.counts), part(lengths), p_, floor});
    positions.push_back(kept.positions);
    counts.push_back(kept.counts);
  }
  if (positions.size() == 1) return {positions[0], counts[0]};
  return {at::cat(positions), at::cat(counts)};
}

AttentionMethod twilight_method() {
  AttentionMethod method{.word = "twilight", .summary = "Twilight's pruning of what Quest proposes"};
  method.make = [](const MethodSpec& spec, const ModelConfig& model, const Selector*, PagePools& pools) {
    return Policy{nullptr, std::make_unique<TwilightPolicy>(model, pools, spec.rule, spec.rule.p)};
  };
  method.decodes_on_device = true;
  method.reads_stored_keys = true;
  // The defaults of its paper: Quest proposes a quarter of the context, and 95% of its weight is kept.
  method.adapt = [](MethodSpec& spec, const MethodSettings& settings) {
    spec.rule.mode = SelectionMode::top_k;
    if (!settings.budget && !settings.share) spec.rule.budget_fraction = 0.25;
    if (!settings.p) spec.rule.p = 0.95;
  };
  // The same bounds and codes; p is the pruner's own.
  method.same_stores = [](const MethodSpec& a, const MethodSpec& b, const Selector*) {
    return a.rule.p == b.rule.p;
  };
  method.describe = [](const MethodSpec& spec) {
    return fmt::format("{} pruned to {:g}", describe(spec.rule), spec.rule.p);
  };
  method.settings = {"p", "k", "k%", "sinks", "recency", "floor", "dense", "prefill", "tile"};
  return method;
}

}  // namespace spot
