// The attention methods by name, and the grammar in which users write them.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "attention/sparse.h"
#include "checkpoint/config.h"
#include "selector/selector.h"

namespace spot {

// From so many tokens of context on prefill=auto reads a prompt sparsely. Below it the time is not worth a choice: on an
// H200 a layer's attention over 8,192 tokens is 1.1 times as fast as dense attention with 4,096 tokens a tile, over
// 16,384 1.8 times (docs/performance.md).
inline constexpr int64_t kSparsePrefillFrom = 16384;
// Queries of a tile where nothing else was asked for: 32 on a GPU, whose kernels they suit best (kernels/NOTES.md), 16
// elsewhere.
int64_t default_query_tile(at::Device device);
// "dense", "sparse" or "auto"; empty for another word.
std::optional<PrefillMode> prefill_mode(const std::string& word);

// A method and everything that it is run with.
struct MethodSpec {
  std::string name = "dense";  // as the user wrote it: "spot:p=0.9,k=10%"
  std::string word = "dense";  // its row of the table
  // streaming takes rule.budget (tokens) and rule.sinks; twilight a top_k rule for Quest, and prunes to rule.p
  SelectionRule rule;
  std::set<int64_t> dense_layers;  // besides those that a selector does not cover
  // How a prompt is read. Sparsely: one block set for every `query_tile` queries: 1, 16, 32, 64, or 0 for as many as
  // suit the device (default_query_tile).
  PrefillMode prefill = PrefillMode::dense;
  int64_t query_tile = 0;
  std::optional<KeyFormat> cache_format;  // of the selector's keys; without it the selector's own
  SelectorScope scope =
      SelectorScope::layer;  // of the oracle's block sets: as the selector's where there is one
  // Keys of the settings that parse_method took from its `base` and the method reads ("k%": a share).
  std::set<std::string> from_base;

  bool is_dense() const { return word == "dense"; }
  // Whether some prompts are read sparsely, and whether one is whose context has so many tokens.
  bool has_sparse_prefill() const { return !is_dense() && prefill != PrefillMode::dense; }
  bool reads_sparsely(int64_t context) const {
    return has_sparse_prefill() && (prefill == PrefillMode::sparse || context >= kSparsePrefillFrom);
  }
  // Whether another method reads every token in the same way, whatever the two are called.
  bool reads_as(const MethodSpec& other) const;
  // "top-p 0.9", "top-k 25% pruned to 0.95": what the rule keeps; empty where there is none.
  std::string describe() const;
};

struct MethodSettings;

// A policy with the store of its own that it may need; empty for dense attention.
struct Policy {
  std::unique_ptr<SelectorCache> keys;
  std::unique_ptr<SelectionPolicy> policy;
};

// A row of the table; what is unset is as most methods have it.
struct AttentionMethod {
  std::string word, summary;
  // Declares the policy's stores in `pools`, which outlive it as `selector` does; null: dense attention. `selector` is
  // null where none was given and none is needed.
  Policy (*make)(const MethodSpec& spec, const ModelConfig& model, const Selector* selector,
                 PagePools& pools) = nullptr;
  bool needs_selector = false;
  // Whether a decode step needs nothing of the host (positions, lengths), so that it can be captured.
  bool decodes_on_device = false;
  // Changes the rule to what the method means by the settings; null: nothing. A method that does takes p beside a fixed
  // budget, and no threshold.
  void (*adapt)(MethodSpec& spec, const MethodSettings& settings) = nullptr;
  // Whether one policy, with the rule of the one that runs, serves two specs of the method; such a policy keeps
  // something of every token, so that it must be there from the first token on. Null: it keeps nothing.
  bool (*same_stores)(const MethodSpec& a, const MethodSpec& b, const Selector* selector) = nullptr;
  // What the rule keeps, in words; null: describe(SelectionRule).
  std::string (*describe)(const MethodSpec& spec) = nullptr;
  // Whether it reads the cache's keys itself, which must be numbers then: an FP8 cache does not serve it.
  bool reads_stored_keys = false;
  // Keys of the settings that it reads; "k%" is a share of the context.
  std::set<std::string> settings = {};
};
// Those of a method that reads the whole rule.
std::set<std::string> rule_settings();
// Every method of methods.inc.
const std::vector<AttentionMethod>& attention_methods();
// Throws Error naming the accepted words.
const AttentionMethod& attention_method(const std::string& word);
// Throws Error when the method needs a selector and none is given.
void check_selector(const AttentionMethod& method, bool given);
// "dense, spot, streaming, ... or twilight"
std::string attention_words();

// What a user said about a method; what is unset is as in the selector (or the defaults of SelectionRule).
struct MethodSettings {
  std::optional<double> p, threshold, mass, share, temperature;  // p=, t=, m=, k=...%, temperature=
  std::optional<int32_t> budget, sinks, recency, floor, cap;     // k=, sinks=, recency=, floor=, cap=
  std::optional<std::string> cache_format;                       // cache=
  int64_t dense_layers = 0;                                      // dense=
  std::optional<PrefillMode> prefill;                            // prefill=
  std::optional<int64_t> tile;                                   // tile=
  std::optional<SelectorScope> scope;                            // per=
};

// `selector`: the config of the one in use, whose rule is the default; null without one. Settings that the method does
// not read are passed over. Throws Error when settings are out of range or do not go together.
MethodSpec make_spec(const std::string& word, const MethodSettings& settings, const SelectorConfig* selector);

// WORD or WORD:KEY=VALUE,KEY=VALUE...: "spot:p=0.9,k=10%,dense=2,prefill=sparse". What it does not say is as in
// `base`, but a method with p=, t=, m= or k= has that rule alone. Throws Error naming the part that is wrong, or that the
// method does not read (MethodSpec::from_base says what it read of `base`).
MethodSpec parse_method(const std::string& text, const MethodSettings& base, const SelectorConfig* selector);
// Commas separate methods and the settings of one: of the parts of "spot:p=0.9,dense=2,quest:k=10%", those without the
// word of a method go on with the one before.
std::vector<std::string> join_methods(const std::vector<std::string>& parts);
// The grammar in one line, for help texts.
std::string method_grammar();

}  // namespace spot
