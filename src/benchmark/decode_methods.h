// Decode attention by every method over a scene, stage by stage.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "benchmark/decode_scene.h"
#include "benchmark/stage_timer.h"
#include "ops/attention/attention.h"

namespace spot {

// A stage starts from what the stages before it left, computed once.
struct DecodeStage {
  std::string name;  // append, score, select, estimate, prune, attend; step: everything but append
  StageWork work;
  double bytes;  // that it must read and write
};

struct DecodeMethod {
  std::string name;
  std::string setting;  // its budget, such as "4096 tokens" or "p 0.93"
  std::vector<DecodeStage> stages;
  std::vector<double> set_tokens,
      set_mass;  // of each set: attended by a sequence, the mean over KV heads, and their covered_mass
  double tokens = 0, mass = 1;  // their means
};
// Of figures by set.
double mean(const std::vector<double>& values);

// torch's dense attention over contiguous keys and values, [B, Hkv, L, d]. backend: "flash", "cudnn", or
// "sdpa" (whatever the
// device's default is). Throws c10::Error when first run where the backend is absent.
DecodeMethod dense_torch(const DecodeScene& scene, const std::string& backend);
// Our decode kernel over every block.
DecodeMethod dense_ours(const DecodeScene& scene);

// Each sparse method takes its rule as select_blocks does.
// SpotAttention with INT4 selector keys; key_heads 1 (shared) or 4 (the paper's). The rule is
// fitted to each set.
DecodeMethod spot_method(const DecodeScene& scene, int64_t key_heads, const SelectionRule& rule);
// Quest, a set a KV head.
DecodeMethod quest_method(const DecodeScene& scene, const SelectionRule& rule);
// Twilight: `rule` proposes blocks with Quest's scores, mass p is kept of their tokens.
DecodeMethod twilight_method(const DecodeScene& scene, const SelectionRule& rule, double p);

// Fixed budgets and dual top-p as rules, with the reserved tiers of a selector's defaults unless others are
// given.
SelectionRule top_k_rule(int64_t tokens, const SelectionRule& tiers = {});
SelectionRule top_p_rule(double p, const SelectionRule& tiers = {});

// The cheapest setting whose covered mass is at least `mass`, by bisection; empty when none reaches it.
std::optional<DecodeMethod> spot_at_mass(const DecodeScene& scene, int64_t key_heads, double mass);
std::optional<DecodeMethod> quest_at_mass(const DecodeScene& scene, double mass);
// Of several shares of the context that Quest may propose, the one with the fewest bytes.
std::optional<DecodeMethod> twilight_at_mass(const DecodeScene& scene, double mass);

}  // namespace spot
