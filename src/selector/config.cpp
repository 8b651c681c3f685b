#include "selector/config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "core/error.h"
#include "ops/words.h"

namespace spot {
namespace {

using nlohmann::json;

template <typename Enum>
using Words = std::vector<std::pair<Enum, const char*>>;

// The words that operators and kernels have too.
template <typename Enum>
Words<Enum> words_of() {
  return {ops::Words<Enum>::kList.begin(), ops::Words<Enum>::kList.end()};
}

const Words<KeyNorm> kKeyNorms = words_of<KeyNorm>();
const Words<SelectorScope> kScopes = {{SelectorScope::layer, "layer"}, {SelectorScope::kv_group, "kv_group"}};
const Words<DistillLoss> kLosses = {{DistillLoss::dense, "dense"}, {DistillLoss::sparse, "sparse"}};
const Words<Teacher> kTeachers = {{Teacher::token, "token"}, {Teacher::block_max, "block_max"}};
const Words<TeacherScope> kTeacherScopes = {{TeacherScope::all, "all"}, {TeacherScope::residual, "residual"}};
const Words<Start> kStarts = {{Start::random, "random"}, {Start::backbone, "backbone"}};
const Words<KeyFormat> kKeyFormats = words_of<KeyFormat>();
const Words<WeightFormat> kWeightFormats = {{WeightFormat::float32, "float32"},
                                            {WeightFormat::bfloat16, "bfloat16"},
                                            {WeightFormat::int8, "int8"},
                                            {WeightFormat::int4, "int4"}};

template <typename Enum>
std::string word_of(const Words<Enum>& words, Enum value) {
  for (const auto& [candidate, word] : words)
    if (candidate == value) return word;
  fail("enum value {} has no name", static_cast<int>(value));
}

template <typename Enum>
Enum value_of(const Words<Enum>& words, const std::string& word, const std::string& where) {
  std::string accepted;
  for (const auto& [candidate, name] : words) {
    if (word == name) return candidate;
    accepted += (accepted.empty() ? "" : ", ") + std::string(name);
  }
  fail("{} is \"{}\"; it must be one of {}", where, word, accepted);
}

// Reads the fields of one JSON object and refuses those that nobody asked for.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail("{} must be a JSON object, not {}", where_, object.type_name());
  }

  void read(const char* name, int64_t& value) {
    if (const json* field = find(name)) {
      if (!field->is_number_integer()) wrong(name, *field, "an integer");
      value = field->get<int64_t>();
    }
  }
  void read(const char* name, int32_t& value) {
    int64_t wide = value;
    read(name, wide);
    if (wide < std::numeric_limits<int32_t>::min() || wide > std::numeric_limits<int32_t>::max())
      fail("{}.{} is {}; no context has so many tokens", where_, name, wide);
    value = static_cast<int32_t>(wide);
  }
  void read(const char* name, double& value) {
    if (const json* field = find(name)) {
      if (!field->is_number()) wrong(name, *field, "a number");
      value = field->get<double>();
    }
  }
  void read(const char* name, bool& value) {
    if (const json* field = find(name)) {
      if (!field->is_boolean()) wrong(name, *field, "true or false");
      value = field->get<bool>();
    }
  }
  void read(const char* name, std::string& value) {
    if (const json* field = find(name)) {
      if (!field->is_string()) wrong(name, *field, "a string");
      value = field->get<std::string>();
    }
  }
  template <typename Enum>
  void read(const char* name, Enum& value, const Words<Enum>& words) {
    std::string word = word_of(words, value);
    read(name, word);
    value = value_of(words, word, where_ + "." + name);
  }
  template <typename Number>
  void read(const char* name, std::vector<Number>& value) {
    const json* field = find(name);
    if (!field) return;
    if (!field->is_array()) wrong(name, *field, "an array of numbers");
    value.clear();
    for (const json& item : *field) {
      if (std::is_integral_v<Number> ? !item.is_number_integer() : !item.is_number())
        wrong(name, item, "an array of numbers");
      value.push_back(item.get<Number>());
    }
  }
  void read(const char* name, std::vector<MassRow>& value) {
    const json* field = find(name);
    if (!field) return;
    constexpr const char* kWanted = "rows of three numbers: threshold, captured mass, share of the tokens";
    if (!field->is_array()) wrong(name, *field, kWanted);
    value.clear();
    for (const json& row : *field) {
      if (!row.is_array() || row.size() != 3 ||
          !std::all_of(row.begin(), row.end(), [](const json& number) { return number.is_number(); }))
        wrong(name, row, kWanted);
      value.push_back({row[0].get<double>(), row[1].get<double>(), row[2].get<double>()});
    }
  }
  const json* find(const char* name) {
    known_.insert(name);
    auto found = object_.find(name);
    return found == object_.end() ? nullptr : &*found;
  }
  void refuse_others() const {
    for (const auto& [name, value] : object_.items())
      if (!known_.count(name)) fail("{} has the unknown field \"{}\"; remove it or upgrade", where_, name);
  }

 private:
  [[noreturn]] void wrong(const char* name, const json& field, const char* wanted) const {
    fail("{}.{} must be {}, not {}", where_, name, wanted, field.dump());
  }

  const json& object_;
  std::string where_;
  std::set<std::string> known_;
};

void check_mass_table(const SelectionDefaults& selection, const std::string& source) {
  const std::vector<MassRow>& table = selection.mass_table;
  if (table.empty()) return;
  if (table.size() < 2) fail("{}: selection.mass_table has one row; it must have at least two", source);
  if (selection.residual_mass.empty())
    fail("{}: selection.mass_table stands without selection.residual_mass, with which it was fitted", source);
  const auto share = [](double x) { return x > 0 && x <= 1; };
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [threshold, mass, tokens] = table[i];
    const bool ordered = i == 0 || (threshold < table[i - 1].threshold && mass >= table[i - 1].mass &&
                                    tokens >= table[i - 1].tokens);
    if (!share(threshold) || !share(mass) || !share(tokens) || !ordered)
      fail(
          "{}: selection.mass_table has the row {}, {}, {}; thresholds must fall from row to row, masses and shares of the tokens "
          "must not, and all lie above 0 and at most at 1",
          source, threshold, mass, tokens);
  }
}

}  // namespace

double SelectionDefaults::threshold_for(double mass) const {
  if (mass_table.empty())
    fail(
        "a captured mass of {} was asked for, but the selector does not say which threshold gives it; fit that with `spot "
        "calibrate`, or give a threshold",
        mass);
  if (!(mass >= mass_table.front().mass && mass <= mass_table.back().mass))
    fail(
        "a captured mass of {} is outside what was fitted for the selector, {:.4f} to {:.4f}; ask for one in that range, give a "
        "threshold, or fit it on other text with `spot calibrate`",
        mass, mass_table.front().mass, mass_table.back().mass);
  const auto above = std::find_if(mass_table.begin(), mass_table.end(),
                                  [&](const MassRow& row) { return row.mass >= mass; });
  if (above == mass_table.begin()) return above->threshold;
  const MassRow& below = *(above - 1);  // of less mass than asked for, so that nothing is divided by 0
  const double share = (mass - below.mass) / (above->mass - below.mass);
  return below.threshold * std::pow(above->threshold / below.threshold, share);
}

void check_width(WeightFormat format, int64_t hidden_size, const std::string& where) {
  if (format == WeightFormat::int4 && hidden_size % kInt4Group != 0)
    fail(
        "{}: hidden_size is {}; int4 stores a selector's rows in groups of {} numbers and needs a multiple of that; "
        "store it as int8",
        where, hidden_size, kInt4Group);
}

std::string to_string(WeightFormat format) {
  return word_of(kWeightFormats, format);
}

WeightFormat weight_format_from_string(const std::string& word) {
  return value_of(kWeightFormats, word, "weight format");
}

std::optional<SelectorScope> selector_scope(const std::string& word) {
  for (const auto& [scope, name] : kScopes)
    if (word == name) return scope;
  return std::nullopt;
}

std::string to_string(KeyFormat format) {
  return word_of(kKeyFormats, format);
}

KeyFormat key_format_from_string(const std::string& word) {
  return value_of(kKeyFormats, word, "the selector's cache format");
}

SelectorConfig SelectorConfig::from_preset(const std::string& name) {
  SelectorConfig config;
  config.preset = name;
  if (name == "paper") {
    config.key_heads = config.num_heads;
    config.cache_format = KeyFormat::bf16;
    config.distillation.start = Start::random;
    config.distillation.teacher_scope = TeacherScope::all;
  } else if (name != "spot" && name != "custom") {
    fail("there is no selector preset \"{}\"; use paper, spot or custom", name);
  }
  return config;
}

SelectorConfig SelectorConfig::from_json(const json& object, const std::string& source) {
  Fields fields(object, source);
  std::string preset = "spot";
  fields.read("preset", preset);
  SelectorConfig config = from_preset(preset);
  fields.read("num_heads", config.num_heads);
  fields.read("head_dim", config.head_dim);
  fields.read("key_heads", config.key_heads);
  fields.read("rope_dims", config.rope_dims);
  fields.read("key_norm", config.key_norm, kKeyNorms);
  fields.read("norm_eps", config.norm_eps);
  fields.read("per", config.scope, kScopes);
  fields.read("block_size", config.block_size);
  fields.read("cache_format", config.cache_format, kKeyFormats);
  if (const json* object = fields.find("selection")) {
    Fields selection(*object, source + ".selection");
    selection.read("sinks", config.selection.rule.sinks);
    selection.read("recency", config.selection.rule.recency);
    selection.read("floor", config.selection.rule.floor);
    selection.read("cap", config.selection.rule.cap);
    selection.read("p", config.selection.rule.p);
    selection.read("temperature", config.selection.temperature);
    selection.read("residual_mass", config.selection.residual_mass);
    selection.read("mass_table", config.selection.mass_table);
    selection.read("dense_layers", config.selection.dense_layers);
    selection.refuse_others();
  }
  if (const json* object = fields.find("distillation")) {
    Fields distillation(*object, source + ".distillation");
    distillation.read("start", config.distillation.start, kStarts);
    distillation.read("loss", config.distillation.loss, kLosses);
    distillation.read("k_train", config.distillation.k_train);
    distillation.read("teacher", config.distillation.teacher, kTeachers);
    distillation.read("teacher_scope", config.distillation.teacher_scope, kTeacherScopes);
    distillation.read("rest_bucket", config.distillation.rest_bucket);
    distillation.refuse_others();
  }
  fields.refuse_others();
  config.validate(source);
  return config;
}

json SelectorConfig::to_json() const {
  json object = {{"preset", preset},
                 {"num_heads", num_heads},
                 {"head_dim", head_dim},
                 {"key_heads", key_heads},
                 {"rope_dims", rope_dims},
                 {"key_norm", word_of(kKeyNorms, key_norm)},
                 {"norm_eps", norm_eps},
                 {"per", word_of(kScopes, scope)},
                 {"block_size", block_size},
                 {"cache_format", word_of(kKeyFormats, cache_format)},
                 {"selection",
                  {{"sinks", selection.rule.sinks},
                   {"recency", selection.rule.recency},
                   {"floor", selection.rule.floor},
                   {"cap", selection.rule.cap},
                   {"p", selection.rule.p},
                   {"temperature", selection.temperature},
                   {"dense_layers", selection.dense_layers}}},
                 {"distillation",
                  {{"start", word_of(kStarts, distillation.start)},
                   {"loss", word_of(kLosses, distillation.loss)},
                   {"k_train", distillation.k_train},
                   {"teacher", word_of(kTeachers, distillation.teacher)},
                   {"teacher_scope", word_of(kTeacherScopes, distillation.teacher_scope)},
                   {"rest_bucket", distillation.rest_bucket}}}};
  // Not where they are unknown: programs from before them read such a file.
  if (!selection.residual_mass.empty()) object["selection"]["residual_mass"] = selection.residual_mass;
  for (const auto& [threshold, mass, tokens] : selection.mass_table)
    object["selection"]["mass_table"].push_back({threshold, mass, tokens});
  return object;
}

void SelectorConfig::validate(const std::string& source) const {
  auto require = [&](bool holds, const char* field, auto value, const char* wanted) {
    if (!holds) fail("{}: {} is {}; it must be {}", source, field, value, wanted);
  };
  from_preset(preset);
  require(num_heads == 4, "num_heads", num_heads, "4, what the scoring kernels are built for");
  require(head_dim == 128, "head_dim", head_dim, "128, what the key formats are built for");
  require(key_heads == 1 || key_heads == num_heads, "key_heads", key_heads, "1 (shared) or num_heads");
  require(rope_dims >= 0 && rope_dims <= head_dim && rope_dims % 2 == 0, "rope_dims", rope_dims,
          "even and at most head_dim");
  require(norm_eps > 0 && norm_eps < 1, "norm_eps", norm_eps, "between 0 and 1");
  require(block_size == kBlockSize, "block_size", block_size, "16, the page size of the caches");
  require(selection.rule.sinks >= 0, "selection.sinks", selection.rule.sinks, "0 or more tokens");
  require(selection.rule.recency >= 0, "selection.recency", selection.rule.recency, "0 or more tokens");
  require(selection.rule.floor >= 0, "selection.floor", selection.rule.floor, "0 or more tokens");
  require(selection.rule.cap >= 0, "selection.cap", selection.rule.cap, "0 (no cap) or more tokens");
  require(selection.rule.cap == 0 || selection.rule.cap >= selection.rule.floor, "selection.cap",
          selection.rule.cap, "0 (no cap) or at least selection.floor");
  require(selection.rule.p > 0 && selection.rule.p <= 1, "selection.p", selection.rule.p,
          "above 0 and at most 1");
  for (double temperature : selection.temperature)
    require(temperature > 0 && std::isfinite(temperature), "selection.temperature", temperature,
            "positive for every layer");
  for (double mass : selection.residual_mass)
    require(mass > 0 && mass <= 1, "selection.residual_mass", mass, "above 0 and at most 1 for every set");
  check_mass_table(selection, source);
  std::set<int64_t> dense;
  for (int64_t layer : selection.dense_layers) {
    require(layer >= 0, "selection.dense_layers", layer, "a list of layer indices from 0");
    require(dense.insert(layer).second, "selection.dense_layers", layer, "listed once");
  }
  require(distillation.k_train >= 1, "distillation.k_train", distillation.k_train, "1 or more tokens");
}

}  // namespace spot
