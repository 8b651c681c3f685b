#include "benchmark/decode_methods.h"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "core/error.h"
#include "ops/baselines/baselines.h"
#include "ops/selector/selector.h"
#include "ops/settled_history.h"
#include "selection/selection.h"

namespace spot {
namespace {

// Sizes that bytes are counted with. Row-wise figures are of the whole batch.
struct Sizes {
  double batch, blocks, kv_heads, heads, dim, number;
  explicit Sizes(const DecodeScene& s)
      : batch(static_cast<double>(s.batch())),
        blocks(static_cast<double>(s.length()) / 16),
        kv_heads(static_cast<double>(s.shape().num_kv_heads)),
        heads(static_cast<double>(s.shape().num_heads)),
        dim(static_cast<double>(s.shape().head_dim)),
        number(static_cast<double>(c10::elementSize(s.set(0).keys.scalar_type()))) {}
  double kv(double tokens) const { return batch * tokens * kv_heads * dim * 2 * number; }
  double bounds(double pages) const { return batch * pages * kv_heads * dim * 2 * number; }
  double four_bits(double tokens) const { return batch * tokens * kv_heads * (dim / 2 + 4); }
};

template <typename Tensors>
std::shared_ptr<std::vector<Tensors>> for_every_set(const DecodeScene& scene,
                                                    const std::function<Tensors(int64_t)>& make) {
  auto made = std::make_shared<std::vector<Tensors>>();
  for (int64_t i = 0; i < scene.sets(); ++i) made->push_back(make(i));
  return made;
}

// Tokens and mass of every set's selection.
void describe(const DecodeScene& scene, DecodeMethod& method,
              const std::function<Selection(int64_t)>& chosen) {
  for (int64_t i = 0; i < scene.sets(); ++i) {
    Selection of_set = chosen(i);
    const at::Tensor counts = of_set.token_counts.defined() ? of_set.token_counts : of_set.counts * 16;
    method.set_tokens.push_back(counts.to(at::kDouble).mean().item<double>());
    if (of_set.token_counts.defined()) of_set.tokens = token_flags(of_set);
    method.set_mass.push_back(scene.covered_mass(token_mask(of_set, scene.length()), i));
  }
  method.tokens = mean(method.set_tokens);
  method.mass = mean(method.set_mass);
}

std::string setting(const SelectionRule& rule) {
  if (rule.mode == SelectionMode::threshold) return fmt::format("threshold {:.2g}", rule.threshold);
  return rule.mode == SelectionMode::top_p ? fmt::format("top-p {:.3f}", rule.p)
                                           : fmt::format("{} tokens", rule.budget);
}

// Select, attend and the whole step of a method whose blocks come from `score`.
void add_block_stages(const DecodeScene& scene, DecodeMethod& method,
                      const std::function<at::Tensor(int64_t)>& score, double score_bytes,
                      const std::function<SelectionRule(int64_t)>& rule) {
  const Sizes sizes(scene);
  const auto scores = for_every_set<at::Tensor>(scene, score);
  const auto chosen = for_every_set<Selection>(scene, [&](int64_t i) {
    auto [indices, counts, share] = ops::select_blocks({(*scores)[i], scene.set(i).lengths, rule(i)});
    return Selection{indices, counts, share, scene.set(i).lengths};
  });
  describe(scene, method, [&](int64_t i) { return (*chosen)[i]; });
  const double attend_bytes = sizes.kv(method.tokens);
  method.stages.push_back({"score", [=](int64_t i) { score(i); }, score_bytes});
  method.stages.push_back(
      {"select",
       [=, &scene](int64_t i) { ops::select_blocks({(*scores)[i], scene.set(i).lengths, rule(i)}); },
       4.0 * static_cast<double>((*scores)[0].numel())});
  method.stages.push_back({"attend",
                           [=, &scene](int64_t i) {
                             const DecodeSet& s = scene.set(i);
                             ops::sparse_decode_attention({s.query, s.keys, s.values, s.page_table, s.lengths,
                                                           scene.scale(), (*chosen)[i].indices,
                                                           (*chosen)[i].counts});
                           },
                           attend_bytes});
  method.stages.push_back({"step",
                           [=, &scene](int64_t i) {
                             const DecodeSet& s = scene.set(i);
                             const at::Tensor scores = score(i);
                             const ops::SettledHistory settled(true);
                             ops::select_and_attend({.scores = scores,
                                                     .query = s.query,
                                                     .key_pool = s.keys,
                                                     .value_pool = s.values,
                                                     .page_table = s.page_table,
                                                     .lengths = s.lengths,
                                                     .scale = scene.scale(),
                                                     .rule = rule(i),
                                                     .with_mass = false});
                           },
                           score_bytes + attend_bytes});
}

at::Tensor scores_of_quest(const DecodeScene& scene, int64_t i) {
  const DecodeSet& s = scene.set(i);
  return ops::quest_score({s.query, s.bounds, s.page_table, s.lengths, scene.scale(), true});
}

// Bisects x of [low, high] for the least whose method covers the mass.
std::optional<DecodeMethod> at_mass(double low, double high, double step, double mass,
                                    const std::function<DecodeMethod(double)>& make) {
  DecodeMethod best = make(high);
  if (best.mass < mass) return {};
  while (high - low > step) {
    const double middle = (low + high) / 2;
    DecodeMethod tried = make(middle);
    if (tried.mass >= mass) {
      high = middle;
      best = std::move(tried);
    } else {
      low = middle;
    }
  }
  best.name += fmt::format(" @ mass {:g}", mass);
  return best;
}

}  // namespace

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

DecodeMethod dense_torch(const DecodeScene& scene, const std::string& backend) {
  const int64_t heads = scene.shape().num_kv_heads, dim = scene.shape().head_dim, batch = scene.batch(),
                length = scene.length();
  DecodeMethod method{"dense, torch " + backend, "all tokens", {}, {}, {}, static_cast<double>(length), 1};
  // The pools' memory read as contiguous keys and values: other numbers than the pages', as many bytes.
  auto step = [=, &scene](int64_t i) {
    const DecodeSet& s = scene.set(i);
    const at::Tensor query = s.query.unsqueeze(2), key = s.keys.view({batch, heads, length, dim}),
                     value = s.values.view({batch, heads, length, dim});
    if (backend == "flash")
      at::_scaled_dot_product_flash_attention(query, key, value, 0.0, false, false, scene.scale());
    else if (backend == "cudnn")
      at::_scaled_dot_product_cudnn_attention(query, key, value, std::nullopt, false, 0.0, false, false,
                                              scene.scale());
    else
      at::scaled_dot_product_attention(query, key, value, std::nullopt, 0.0, false, scene.scale(), true);
  };
  method.stages.push_back({"step", step, Sizes(scene).kv(method.tokens)});
  return method;
}

DecodeMethod dense_ours(const DecodeScene& scene) {
  DecodeMethod method{"dense, our kernel", "all tokens", {}, {}, {}, static_cast<double>(scene.length()), 1};
  method.stages.push_back({"step",
                           [&scene](int64_t i) {
                             const DecodeSet& s = scene.set(i);
                             ops::sparse_decode_attention(
                                 {s.query, s.keys, s.values, s.page_table, s.lengths, scene.scale()});
                           },
                           Sizes(scene).kv(method.tokens)});
  return method;
}

DecodeMethod spot_method(const DecodeScene& scene, int64_t key_heads, const SelectionRule& rule) {
  const int kind = key_heads == 1 ? 0 : 1;
  DecodeMethod method{key_heads == 1 ? "spot, shared INT4" : "spot, per-head INT4", setting(rule), {}};
  const double key_bytes =
      static_cast<double>(kernels::page_head_bytes(KeyFormat::int4)) / 16 * static_cast<double>(key_heads);
  method.stages.push_back({"append",
                           [=, &scene](int64_t i) {
                             const DecodeSet& s = scene.set(i);
                             ops::selector_key_append(
                                 {s.selector_keys[kind], s.slots, s.new_keys[kind], KeyFormat::int4});
                           },
                           static_cast<double>(scene.batch()) *
                               (key_bytes + 128.0 * static_cast<double>(key_heads) * Sizes(scene).number)});
  auto score = [=, &scene](int64_t i) {
    const DecodeSet& s = scene.set(i);
    // As in a decode step, where the kernel before has written nothing but the newest key.
    const ops::SettledHistory settled(true);
    return ops::score_blocks({s.selector_query, s.selector_weight, s.selector_keys[kind], s.page_table,
                              s.lengths, KeyFormat::int4});
  };
  auto of_set = [=, &scene](int64_t i) { return scene.set(i).fitted(rule); };
  add_block_stages(scene, method, score, static_cast<double>(scene.batch() * scene.length()) * key_bytes,
                   of_set);
  return method;
}

DecodeMethod quest_method(const DecodeScene& scene, const SelectionRule& rule) {
  const Sizes sizes(scene);
  DecodeMethod method{"Quest", setting(rule), {}};
  method.stages.push_back({"append",
                           [&scene](int64_t i) {
                             const DecodeSet& s = scene.set(i);
                             ops::key_summary_append({s.bounds, {}, {}, s.keys, s.slots});
                           },
                           sizes.kv(8) + sizes.bounds(1)});
  add_block_stages(
      scene, method, [&scene](int64_t i) { return scores_of_quest(scene, i); }, sizes.bounds(sizes.blocks),
      [=](int64_t) { return rule; });
  return method;
}

DecodeMethod twilight_method(const DecodeScene& scene, const SelectionRule& rule, double p) {
  const Sizes sizes(scene);
  DecodeMethod method{"Twilight on Quest", fmt::format("p {:.3f} of {}", p, setting(rule)), {}};
  struct Made {
    at::Tensor scores, indices, counts, logits;
    ops::PrunedTokens kept;
  };
  auto select = [=, &scene](int64_t i, const at::Tensor& scores) {
    return ops::select_blocks({scores, scene.set(i).lengths, rule});
  };
  auto estimate = [=, &scene](int64_t i, const at::Tensor& indices, const at::Tensor& counts) {
    const DecodeSet& s = scene.set(i);
    return ops::estimate_logits(
        {s.query, s.codes, s.ranges, s.page_table, s.lengths, indices, counts, scene.scale()});
  };
  auto prune = [=, &scene](int64_t i, const at::Tensor& logits, const at::Tensor& indices,
                           const at::Tensor& counts) {
    return ops::prune_tokens({logits, indices, counts, scene.set(i).lengths, p, rule.floor});
  };
  auto attend = [=, &scene](int64_t i, const ops::PrunedTokens& kept) {
    const DecodeSet& s = scene.set(i);
    return ops::token_attention(
        {s.query, s.keys, s.values, s.page_table, s.lengths, kept.positions, kept.counts, scene.scale()});
  };
  const auto made = for_every_set<Made>(scene, [&](int64_t i) {
    const at::Tensor scores = scores_of_quest(scene, i);
    const auto [indices, counts, share] = select(i, scores);
    const at::Tensor logits = estimate(i, indices, counts);
    return Made{scores, indices, counts, logits, prune(i, logits, indices, counts)};
  });
  const Made& first = (*made)[0];
  describe(scene, method, [&](int64_t i) {
    const Made& m = (*made)[i];
    return Selection{m.indices, m.counts, {}, scene.set(i).lengths, {}, m.kept.positions, m.kept.counts};
  });
  const double candidates = first.counts.to(at::kDouble).mean().item<double>() * 16;
  const double logit_bytes = 4 * sizes.batch * sizes.heads * candidates;
  const double score_bytes = sizes.bounds(sizes.blocks), estimate_bytes = sizes.four_bits(candidates),
               attend_bytes = sizes.kv(method.tokens);
  method.stages = {
      {"append",
       [&scene](int64_t i) {
         const DecodeSet& s = scene.set(i);
         ops::key_summary_append({s.bounds, s.codes, s.ranges, s.keys, s.slots});
       },
       sizes.kv(8) + sizes.bounds(1) + sizes.four_bits(1)},
      {"score", [&scene](int64_t i) { scores_of_quest(scene, i); }, score_bytes},
      {"select", [=](int64_t i) { select(i, (*made)[i].scores); },
       4.0 * static_cast<double>(first.scores.numel())},
      {"estimate", [=](int64_t i) { estimate(i, (*made)[i].indices, (*made)[i].counts); },
       estimate_bytes + logit_bytes},
      {"prune", [=](int64_t i) { prune(i, (*made)[i].logits, (*made)[i].indices, (*made)[i].counts); },
       logit_bytes},
      {"attend", [=](int64_t i) { attend(i, (*made)[i].kept); }, attend_bytes},
      {"step",
       [=, &scene](int64_t i) {
         const auto [indices, counts, share] = select(i, scores_of_quest(scene, i));
         attend(i, prune(i, estimate(i, indices, counts), indices, counts));
       },
       score_bytes + estimate_bytes + attend_bytes}};
  return method;
}

SelectionRule top_k_rule(int64_t tokens, const SelectionRule& tiers) {
  SelectionRule rule = tiers;
  rule.mode = SelectionMode::top_k;
  rule.budget = static_cast<int32_t>(tokens);
  return rule;
}

SelectionRule top_p_rule(double p, const SelectionRule& tiers) {
  SelectionRule rule = tiers;
  rule.mode = SelectionMode::top_p;
  rule.p = p;
  return rule;
}

std::optional<DecodeMethod> spot_at_mass(const DecodeScene& scene, int64_t key_heads, double mass) {
  return at_mass(0.0, 1.0, 1.0 / 512, mass,
                 [&](double p) { return spot_method(scene, key_heads, top_p_rule(p, scene.tiers())); });
}

std::optional<DecodeMethod> quest_at_mass(const DecodeScene& scene, double mass) {
  return at_mass(0.0, static_cast<double>(scene.length()), 32, mass, [&](double tokens) {
    return quest_method(scene, top_k_rule(static_cast<int64_t>(tokens) / 16 * 16, scene.tiers()));
  });
}

std::optional<DecodeMethod> twilight_at_mass(const DecodeScene& scene, double mass) {
  std::optional<DecodeMethod> best;
  for (int64_t part : {32, 16, 8, 4, 2, 1}) {
    const SelectionRule rule = top_k_rule(scene.length() / part, scene.tiers());
    auto found =
        at_mass(0.0, 1.0, 1.0 / 512, mass, [&](double p) { return twilight_method(scene, rule, p); });
    if (found && (!best || found->stages.back().bytes < best->stages.back().bytes)) best = std::move(found);
  }
  return best;
}

}  // namespace spot
