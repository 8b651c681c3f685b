#include "attention/methods.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "core/error.h"

namespace spot {
namespace {

constexpr int64_t kMostLayers = 10'000;  // more than any model has

// A number, or with '%' at its end a hundredth of one; nothing else.
std::optional<double> parse_number(std::string text) {
  const double unit = !text.empty() && text.back() == '%' ? 0.01 : 1;
  if (unit != 1) text.pop_back();
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return {};
  return value * unit;
}

// Sets one KEY=VALUE; false when it is not one of ours.
bool set_option(MethodSettings& settings, const std::string& key, const std::string& value) {
  if (key == "cache") return settings.cache_format = value, true;
  if (key == "per") return settings.scope = selector_scope(value), settings.scope.has_value();
  if (key == "prefill") return settings.prefill = prefill_mode(value), settings.prefill.has_value();
  const std::optional<double> number = parse_number(value);
  if (!number) return false;
  const bool percent = value.back() == '%',
             whole = std::abs(*number) <= 1e9 && *number == std::floor(*number);
  if (percent && key != "k") return false;
  const auto set_whole = [&](auto& field) {
    return whole ? (field = static_cast<int32_t>(*number), true) : false;
  };
  if (key == "p") return settings.p = *number, true;
  if (key == "t") return settings.threshold = *number, true;
  if (key == "m") return settings.mass = *number, true;
  if (key == "temperature") return settings.temperature = *number, true;
  if (key == "k" && percent) return settings.share = *number, true;
  if (key == "k") return set_whole(settings.budget);
  if (key == "sinks") return set_whole(settings.sinks);
  if (key == "recency") return set_whole(settings.recency);
  if (key == "floor") return set_whole(settings.floor);
  if (key == "cap") return set_whole(settings.cap);
  if (key == "dense") return set_whole(settings.dense_layers);
  if (key == "tile") return set_whole(settings.tile);
  return false;
}

// The keys of what was said.
std::set<std::string> given_keys(const MethodSettings& settings) {
  std::set<std::string> keys;
  const auto add = [&](const char* key, bool given) {
    if (given) keys.insert(key);
  };
  add("p", settings.p.has_value()), add("t", settings.threshold.has_value());
  add("m", settings.mass.has_value());
  add("k", settings.budget.has_value()), add("k%", settings.share.has_value());
  add("sinks", settings.sinks.has_value()), add("recency", settings.recency.has_value());
  add("floor", settings.floor.has_value()), add("cap", settings.cap.has_value());
  add("temperature", settings.temperature.has_value()), add("cache", settings.cache_format.has_value());
  add("dense", settings.dense_layers != 0), add("prefill", settings.prefill.has_value());
  add("tile", settings.tile.has_value()), add("per", settings.scope.has_value());
  return keys;
}

// Why a method does not read a setting; empty when it does.
std::string unread(const MethodSpec& spec, const std::string& key) {
  if (!attention_method(spec.word).settings.contains(key))
    return fmt::format("attention '{}' does not read it", spec.word);
  if ((key == "cap" || key == "temperature") && spec.rule.mode == SelectionMode::top_k)
    return "a fixed budget does not read it";
  if (key == "tile" && !spec.has_sparse_prefill()) return "prompts are read densely";
  return "";
}

// The keys of which a method takes one: what its rule is.
bool is_rule_key(const std::string& key) {
  return key == "p" || key == "t" || key == "m" || key == "k" || key == "k%";
}

}  // namespace

#define SPOT_METHOD(name) AttentionMethod name##_method();
#include "attention/methods.inc"
#undef SPOT_METHOD

AttentionMethod dense_method() {
  return {.word = "dense", .summary = "exact attention over everything", .decodes_on_device = true};
}

const std::vector<AttentionMethod>& attention_methods() {
  static const std::vector<AttentionMethod> methods = {
#define SPOT_METHOD(name) name##_method(),
#include "attention/methods.inc"
#undef SPOT_METHOD
  };
  return methods;
}

std::set<std::string> rule_settings() {
  return {"p", "t", "k", "k%", "sinks", "recency", "floor", "cap", "temperature", "dense", "prefill", "tile"};
}

std::string attention_words() {
  std::string words;
  const auto& methods = attention_methods();
  for (size_t i = 0; i < methods.size(); ++i)
    words += (i == 0 ? "" : i + 1 == methods.size() ? " or " : ", ") + methods[i].word;
  return words;
}

const AttentionMethod& attention_method(const std::string& word) {
  for (const AttentionMethod& method : attention_methods())
    if (method.word == word) return method;
  fail("attention '{}' is unknown; choose {}", word, attention_words());
}

int64_t default_query_tile(at::Device device) {
  return device.is_cuda() ? 32 : 16;
}

std::optional<PrefillMode> prefill_mode(const std::string& word) {
  if (word == "dense") return PrefillMode::dense;
  if (word == "sparse") return PrefillMode::sparse;
  if (word == "auto") return PrefillMode::automatic;
  return std::nullopt;
}

void check_selector(const AttentionMethod& method, bool given) {
  if (method.needs_selector && !given)
    fail("attention '{}' needs a selector; name one with --selector, or distil one with `spot distill`",
         method.word);
}

std::string MethodSpec::describe() const {
  if (is_dense()) return "";
  const AttentionMethod& method = attention_method(word);
  return method.describe ? method.describe(*this) : spot::describe(rule);
}

bool MethodSpec::reads_as(const MethodSpec& other) const {
  if (word != other.word) return false;
  if (is_dense()) return true;
  return rule == other.rule && dense_layers == other.dense_layers && prefill == other.prefill &&
         (prefill == PrefillMode::dense || query_tile == other.query_tile) &&
         cache_format == other.cache_format && scope == other.scope;
}

MethodSpec make_spec(const std::string& word, const MethodSettings& settings,
                     const SelectorConfig* selector) {
  const AttentionMethod& method = attention_method(word);
  const auto& [p, threshold, given_mass, share, temperature, budget, sinks, recency, floor, cap, cache_format,
               dense_layers, prefill, tile, scope] = settings;
  if (budget && share)
    fail("a fixed budget is given in tokens ({}) and as a share ({}); give one of them", *budget, *share);
  if (!method.adapt && p && (budget || share))
    fail("attention '{}' takes top-p ({}) or a fixed budget, not both; give one of them", word, *p);
  if (threshold && (p || budget || share))
    fail("attention '{}' takes a threshold ({}) or another rule, not both; give one of them", word,
         *threshold);
  if (threshold && method.adapt)
    fail("attention '{}' prunes what a fixed budget proposes; leave out the threshold ({})", word,
         *threshold);
  // It is fitted for the selector's scores: what a method with others does not read.
  const std::optional<double> mass = method.settings.contains("m") ? given_mass : std::nullopt;
  if (mass && (threshold || p || budget || share))
    fail("attention '{}' takes a captured mass ({}) or another rule, not both; give one of them", word,
         *mass);
  if (budget && *budget < 1) fail("the budget is {} tokens; it must be at least 1", *budget);
  if (share && !(*share > 0 && *share <= 1))
    fail("the budget's share of the context is {}; it must be above 0 and at most 1", *share);
  if (dense_layers < 0 || dense_layers > kMostLayers)
    fail("{} dense layers were asked for; give 0 to {}", dense_layers, kMostLayers);
  MethodSpec spec{.name = word, .word = word};
  SelectionRule& rule = spec.rule;
  if (selector) rule = selector->selection.rule, spec.scope = selector->scope;
  if (p) rule.mode = SelectionMode::top_p, rule.p = *p;
  if (threshold) rule.mode = SelectionMode::threshold, rule.threshold = *threshold;
  if (mass) {
    check_selector(method, selector != nullptr);
    rule.mode = SelectionMode::threshold, rule.threshold = selector->selection.threshold_for(*mass);
  }
  if (budget) rule.mode = SelectionMode::top_k, rule.budget = *budget;
  if (share) rule.mode = SelectionMode::top_k, rule.budget_fraction = *share;
  if (sinks) rule.sinks = *sinks;
  if (recency) rule.recency = *recency;
  if (floor) rule.floor = *floor;
  if (cap) rule.cap = *cap;
  if (temperature) rule.temperature = *temperature;
  validate(rule);
  if (method.adapt) method.adapt(spec, settings);
  for (int64_t layer = 0; layer < dense_layers; ++layer) spec.dense_layers.insert(layer);
  if (cache_format) spec.cache_format = key_format_from_string(*cache_format);
  if (tile && *tile != 16 && *tile != 32 && *tile != 64)
    fail("tiles of {} queries were asked for; give 16, 32 or 64", *tile);
  if (prefill) spec.prefill = *prefill;
  if (tile) spec.query_tile = *tile;
  if (scope) spec.scope = *scope;
  return spec;
}

MethodSpec parse_method(const std::string& text, const MethodSettings& base, const SelectorConfig* selector) {
  const size_t colon = text.find(':');
  const std::string word = text.substr(0, colon);
  MethodSettings settings = base;
  bool own_rule = false;
  std::set<std::string> own;
  std::string rest = colon == std::string::npos ? "" : text.substr(colon + 1);
  while (!rest.empty()) {
    const std::string option = rest.substr(0, rest.find(','));
    rest.erase(0, option.size() + 1);
    const size_t equals = option.find('=');
    const std::string key = option.substr(0, equals);
    if (is_rule_key(key) && !own_rule)
      settings.p.reset(), settings.threshold.reset(), settings.mass.reset(), settings.budget.reset(),
          settings.share.reset(), own_rule = true;
    if (equals == std::string::npos || equals + 1 == option.size() ||
        !set_option(settings, key, option.substr(equals + 1)))
      fail("method '{}': '{}' is not one of {}", text, option, method_grammar());
    if (!own.insert(key == "k" && option.back() == '%' ? "k%" : key).second)
      fail("method '{}': {}= is given twice; give it once", text, key);
  }
  MethodSpec spec = make_spec(word, settings, selector);
  spec.name = text;
  for (const std::string& key : own)
    if (const std::string why = unread(spec, key); !why.empty())
      fail("method '{}': {}= has no effect, {}; leave it out", text, key == "k%" ? "k" : key, why);
  for (const std::string& key : given_keys(base)) {
    const bool replaced = own.contains(key) || (own_rule && is_rule_key(key));
    if (!replaced && unread(spec, key).empty()) spec.from_base.insert(key);
  }
  return spec;
}

std::vector<std::string> join_methods(const std::vector<std::string>& parts) {
  std::vector<std::string> joined;
  for (const std::string& part : parts) {
    const bool goes_on = part.find('=') != std::string::npos && part.find(':') == std::string::npos;
    if (!joined.empty() && goes_on)
      joined.back() += (joined.back().find(':') == std::string::npos ? ":" : ",") + part;
    else
      joined.push_back(part);
  }
  return joined;
}

std::string method_grammar() {
  return "p=SHARE, t=THRESHOLD, m=MASS, k=TOKENS, k=PERCENT%, sinks=, recency=, floor=, cap=TOKENS, temperature=NUMBER, dense=LAYERS, "
         "cache=FORMAT, prefill=sparse, dense or auto, tile=QUERIES, per=layer or kv_group";
}

}  // namespace spot
