// What a selector is: its shape, how it was distilled, and how its scores are turned into a selection by
// default.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "kernels/key_format.h"
#include "kernels/select_rules.h"
#include "kernels/selector_key_math.h"

namespace spot {

using kernels::KeyFormat;
using kernels::KeyNorm;  // on the selector's keys, before RoPE
using kernels::SelectionMode;
using kernels::SelectionRule;

// Tokens of a selection block; equals the page size of the caches.
inline constexpr int64_t kBlockSize = kernels::kPageTokens;

enum class SelectorScope { layer, kv_group };  // one block set per layer, or one per KV head
// "layer" or "kv_group"; empty for another word.
std::optional<SelectorScope> selector_scope(const std::string& word);
enum class DistillLoss { dense, sparse };   // KL over all keys, or over the student's top k_train
enum class Teacher { token, block_max };    // teacher distribution over tokens or over blocks
enum class TeacherScope { all, residual };  // residual: without sink and recency tokens
enum class Start { random, backbone };      // weights before the first step, see distill/initialize.h
// How W_q and W_k lie in selector.safetensors. int8: rows of codes with a float32 scale each; int4: groups of 32 codes
// of a row with a bfloat16 scale each.
enum class WeightFormat { float32, bfloat16, int8, int4 };
inline constexpr int64_t kInt4Group = 32;
// Throws Error, which begins with `where`, unless rows of hidden_size numbers can be stored so.
void check_width(WeightFormat format, int64_t hidden_size, const std::string& where);

std::string to_string(WeightFormat format);
// Throws Error naming the accepted words.
WeightFormat weight_format_from_string(const std::string& word);
std::string to_string(KeyFormat format);
// Throws Error naming the accepted words.
KeyFormat key_format_from_string(const std::string& word);

// One row of SelectionDefaults::mass_table: what a threshold gave on held-out text.
struct MassRow {
  double threshold;  // share of all attention
  double mass;       // captured: mean over layers, queries and sets
  double tokens;     // share of the visible tokens that was read, likewise

  bool operator==(const MassRow&) const = default;
};

// What a selection uses unless the caller asks for something else.
struct SelectionDefaults {
  SelectionRule rule = {};  // top_p; its temperature stays 1
  std::vector<double>
      temperature;  // one per selector layer (order of Selector::layers()); empty: 1 everywhere
  // [layers * groups()], a layer's sets beside each other: the mean share of attention outside sinks and recency on
  // held-out text, by which a threshold on all attention becomes one on a set's residual; empty: 1 everywhere.
  std::vector<double> residual_mass;
  // Thresholds falling, masses and shares of the tokens not falling; measured under `rule`, the temperatures and
  // residual masses above, on contexts of one length. Empty: unknown.
  std::vector<MassRow> mass_table;
  std::vector<int64_t> dense_layers;  // model layers that attend densely and hold no selector

  // The largest threshold that captured the mass on that text, log threshold taken as linear in mass between rows.
  // Throws Error where there is no table or the mass lies outside it.
  double threshold_for(double mass) const;

  bool operator==(const SelectionDefaults&) const = default;
};

struct DistillationFields {
  Start start = Start::backbone;
  DistillLoss loss = DistillLoss::sparse;
  int64_t k_train = 8192;  // tokens kept by the sparse loss
  Teacher teacher = Teacher::token;
  TeacherScope teacher_scope = TeacherScope::residual;
  bool rest_bucket = false;  // one more outcome that holds the mass of everything not kept by the sparse loss

  bool operator==(const DistillationFields&) const = default;
};

// Every field is written to selector.json, so that a checkpoint says what it is.
struct SelectorConfig {
  std::string preset = "spot";  // the preset this began from: "paper", "spot", or "custom"
  int64_t num_heads = 4;
  int64_t head_dim = 128;
  int64_t key_heads = 1;   // num_heads: a key per head; 1: one key shared by the heads
  int64_t rope_dims = 64;  // leading dims of q and k that rotate, half-split pairing
  KeyNorm key_norm = KeyNorm::layernorm;
  double norm_eps = 1e-6;
  SelectorScope scope = SelectorScope::layer;  // written as "per"
  int64_t block_size = kBlockSize;
  KeyFormat cache_format = KeyFormat::int4;  // of the cached keys
  SelectionDefaults selection;
  DistillationFields distillation;

  // "paper": the published architecture and loss (a key per head, sparse KL, bf16 cache), from random
  // weights.
  // "spot": ours (shared key, started from the backbone). Throws Error on another name.
  static SelectorConfig from_preset(const std::string& name);
  // Absent fields take the preset's value (field "preset", default "spot"). Throws Error on an unknown field,
  // a wrong type, or what validate() refuses; `source` names the file.
  static SelectorConfig from_json(const nlohmann::json& json, const std::string& source);
  nlohmann::json to_json() const;
  // Throws Error naming the first impossible value.
  void validate(const std::string& source) const;

  bool operator==(const SelectorConfig&) const = default;
};

}  // namespace spot
