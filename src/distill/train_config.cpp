#include "distill/train_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <set>

#include "core/error.h"

namespace spot {
namespace {

// The fields once, for reading and writing alike.
template <typename Config, typename Visit>
void each_field(Config& c, const Visit& visit) {
  visit("output", c.output);
  visit("data_paths", c.data.paths);
  visit("text_field", c.data.text_field);
  visit("sequence_length", c.data.sequence_length);
  visit("length_mix", c.data.length_mix);
  visit("held_out_every", c.data.held_out_every);
  visit("window_documents", c.data.window_documents);
  visit("window_bytes", c.data.window_bytes);
  visit("seed", c.data.seed);
  visit("document_mask", c.document_mask);
  visit("steps", c.steps);
  visit("sequences_per_step", c.sequences_per_step);
  visit("query_rows", c.query_rows);
  visit("peak_lr", c.peak_lr);
  visit("final_lr", c.final_lr);
  visit("warmup_steps", c.warmup_steps);
  visit("constant_share", c.constant_share);
  visit("beta1", c.beta1);
  visit("beta2", c.beta2);
  visit("epsilon", c.epsilon);
  visit("weight_decay", c.weight_decay);
  visit("clip_norm", c.clip_norm);
  visit("held_out_sequences", c.held_out_sequences);
  visit("held_out_interval", c.held_out_interval);
  visit("checkpoint_interval", c.checkpoint_interval);
  visit("budgets", c.budgets);
  visit("calibrate", c.calibrate);
  visit("calibration_length", c.calibration_length);
  visit("store", c.store);
}

nlohmann::json write(const std::filesystem::path& path) {
  return path.string();
}
nlohmann::json write(const std::vector<std::filesystem::path>& paths) {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& path : paths) list.push_back(path.string());
  return list;
}
nlohmann::json write(const std::vector<LengthShare>& mix) {
  nlohmann::json list = nlohmann::json::array();
  for (const LengthShare& s : mix) list.push_back({s.length, s.share});
  return list;
}
template <typename T>
nlohmann::json write(const T& value) {
  return value;
}

void read(const nlohmann::json& json, std::filesystem::path& path) {
  path = json.get<std::string>();
}
void read(const nlohmann::json& json, std::vector<std::filesystem::path>& paths) {
  paths.clear();
  for (const auto& path : json.get<std::vector<std::string>>()) paths.emplace_back(path);
}
// nlohmann would turn 1.5 into the integer 1, and true into 1.
void read(const nlohmann::json& json, int64_t& value) {
  if (!json.is_number_integer()) throw nlohmann::json::type_error::create(302, "not an integer", &json);
  value = json.get<int64_t>();
}
void read(const nlohmann::json& json, uint64_t& value) {
  if (!json.is_number_unsigned())
    throw nlohmann::json::type_error::create(302, "not a natural number", &json);
  value = json.get<uint64_t>();
}
void read(const nlohmann::json& json, double& value) {
  if (!json.is_number()) throw nlohmann::json::type_error::create(302, "not a number", &json);
  value = json.get<double>();
}
void read(const nlohmann::json& json, std::vector<LengthShare>& mix) {
  mix.clear();
  for (const nlohmann::json& entry : json) {
    LengthShare& one = mix.emplace_back();
    read(entry.at(0), one.length);
    read(entry.at(1), one.share);
  }
}
template <typename T>
void read(const nlohmann::json& json, T& value) {
  value = json.get<T>();
}

}  // namespace

void TrainConfig::validate() const {
  data.validate();
  const auto require = [](bool good, const char* name, const auto& value, const char* wanted) {
    if (!good) fail("distillation: {} is {}, it must be {}", name, value, wanted);
  };
  if (output.empty()) fail("distillation: output is empty, it must name a folder");
  if (data.paths.empty()) fail("distillation: data_paths is empty, it must name files or folders of text");
  require(steps >= 1, "steps", steps, "at least 1");
  require(sequences_per_step >= 1, "sequences_per_step", sequences_per_step, "at least 1");
  require(query_rows >= 0 && query_rows <= data.sequence_length, "query_rows", query_rows,
          "0 (all) to sequence_length");
  require(peak_lr > 0.0 && std::isfinite(peak_lr), "peak_lr", peak_lr, "positive");
  require(final_lr >= 0.0 && final_lr <= peak_lr, "final_lr", final_lr, "0 to peak_lr");
  require(warmup_steps >= 0, "warmup_steps", warmup_steps, "0 or more");
  require(constant_share >= 0.0 && constant_share <= 1.0, "constant_share", constant_share, "0 to 1");
  require(beta1 >= 0.0 && beta1 < 1.0, "beta1", beta1, "at least 0 and below 1");
  require(beta2 >= 0.0 && beta2 < 1.0, "beta2", beta2, "at least 0 and below 1");
  require(epsilon > 0.0, "epsilon", epsilon, "positive");
  require(weight_decay >= 0.0, "weight_decay", weight_decay, "0 or more");
  require(clip_norm >= 0.0, "clip_norm", clip_norm, "0 (no clipping) or more");
  require(held_out_sequences >= 0, "held_out_sequences", held_out_sequences, "0 or more");
  require(held_out_interval >= 1, "held_out_interval", held_out_interval, "at least 1");
  require(checkpoint_interval >= 1, "checkpoint_interval", checkpoint_interval, "at least 1");
  require(calibration_length >= 0, "calibration_length", calibration_length,
          "0 (the sequence length) or more");
  require(store == "float32" || store == "bfloat16" || store == "int8" || store == "int4", "store", store,
          "float32, bfloat16, int8 or int4");
  for (const double budget : budgets)
    require(budget > 0.0 && std::isfinite(budget), "a budget", budget, "positive");
}

nlohmann::json TrainConfig::to_json() const {
  nlohmann::json json;
  each_field(*this, [&](const char* name, const auto& value) { json[name] = write(value); });
  return json;
}

TrainConfig TrainConfig::from_json(const nlohmann::json& json, const std::string& source) {
  if (!json.is_object()) fail("{}: the training config must be a JSON object", source);
  TrainConfig config;
  std::set<std::string> known;
  each_field(config, [&](const char* name, auto& value) {
    known.insert(name);
    const auto field = json.find(name);
    if (field == json.end()) return;
    try {
      read(*field, value);
    } catch (const nlohmann::json::exception&) {
      fail("{}: {} has the wrong type: {}", source, name, field->dump());
    }
  });
  for (const auto& [name, value] : json.items())
    if (!known.count(name)) fail("{}: \"{}\" is not a field of the training config", source, name);
  return config;
}

double learning_rate(const TrainConfig& config, int64_t step) {
  const int64_t warmup = std::min(config.warmup_steps, config.steps / 5);
  if (step < warmup) return config.peak_lr * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const int64_t constant = std::llround(config.constant_share * static_cast<double>(config.steps));
  const int64_t decay_start = std::min(warmup + constant, config.steps);
  if (step < decay_start) return config.peak_lr;
  // The last step gets final_lr exactly.
  const int64_t last = config.steps - 1;
  const double done = last > decay_start
                          ? static_cast<double>(step - decay_start) / static_cast<double>(last - decay_start)
                          : 1.0;
  return config.final_lr +
         (config.peak_lr - config.final_lr) * 0.5 * (1.0 + std::cos(std::numbers::pi * done));
}

LayerLossOptions loss_options(const SelectorConfig& selector, const TrainConfig& config) {
  LayerLossOptions options;
  options.loss = selector.distillation.loss;
  options.k_train = selector.distillation.k_train;
  options.teacher = selector.distillation.teacher;
  options.scope = selector.distillation.teacher_scope;
  options.rest_bucket = selector.distillation.rest_bucket;
  options.sinks = selector.selection.rule.sinks;
  options.recency = selector.selection.rule.recency;
  options.block_size = selector.block_size;
  options.budgets = config.budgets;
  options.measured_queries = 128;  // of each sequence: ranking blocks costs more than the loss of a query
  return options;
}

}  // namespace spot
