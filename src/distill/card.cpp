#include "distill/card.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

namespace spot {
namespace {
using nlohmann::json;

// 1234567 as 1,234,567.
std::string grouped(int64_t number) {
  if (number < 1000) return fmt::format("{}", number);
  return fmt::format("{},{:03}", grouped(number / 1000), number % 1000);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::string what_it_is(const json& selector) {
  const json &config = selector.at("config"), &backbone = selector.at("backbone");
  const json& dense = config.at("selection").at("dense_layers");
  const int64_t rotated = config.at("rope_dims"), keys = config.at("key_heads");
  return fmt::format(
      "A SpotAttention selector for one checkpoint: {} with {} layers, hidden size {} and {} query heads on {} KV heads of {} (fingerprint "
      "{}; other weights of its shape are warned of, another shape is refused).\n\nPreset `{}`: in each of {} layers {} heads of {}, {}, key norm {}, {} dims rotated, key cache "
      "in {}; {}.{}\n",
      backbone.at("architecture").get<std::string>(), backbone.at("num_layers").get<int64_t>(),
      backbone.at("hidden_size").get<int64_t>(), backbone.at("num_heads").get<int64_t>(),
      backbone.at("num_kv_heads").get<int64_t>(), backbone.at("head_dim").get<int64_t>(),
      backbone.at("fingerprint").get<std::string>(), config.at("preset").get<std::string>(),
      selector.at("layers").size(), config.at("num_heads").get<int64_t>(),
      config.at("head_dim").get<int64_t>(),
      keys == 1 ? "one key shared by them" : fmt::format("{} keys", keys),
      config.at("key_norm").get<std::string>(), rotated, config.at("cache_format").get<std::string>(),
      config.at("per") == "layer" ? "one block set a layer" : "a block set for each KV head",
      dense.empty()
          ? ""
          : fmt::format(" Layers {} stay dense.", fmt::join(dense.get<std::vector<int64_t>>(), ", ")));
}

std::string how_it_was_trained(const json& selector) {
  const json &notes = selector.at("notes"), &run = notes.at("training"),
             &loss = selector.at("config").at("distillation");
  std::string kind =
      loss.at("loss") == "dense"
          ? "dense KL"
          : fmt::format("sparse KL over the student's own top {} tokens", loss.at("k_train").get<int64_t>());
  if (loss.at("rest_bucket").get<bool>()) kind += " with a rest bucket";
  std::string mix;
  double shares = 0.0;
  for (const json& part : run.at("length_mix")) shares += part.at(1).get<double>();
  for (const json& part : run.at("length_mix"))
    mix += fmt::format("{}{} tokens ({:.0f}%)", mix.empty() ? ", cut into contexts of " : ", ",
                       grouped(part.at(0)), 100 * part.at(1).get<double>() / shares);
  return fmt::format(
      "{} steps of {} sequences of {} tokens ({} tokens) of `{}`{}; {}, {} teacher over {}, first weights from {}. AdamW, rate {} after {} "
      "steps of warm-up, down to {}; weight decay {}, gradients clipped at {}, seed {}.\n",
      grouped(notes.at("steps")), run.at("sequences_per_step").get<int64_t>(),
      grouped(run.at("sequence_length")), grouped(notes.at("tokens")),
      fmt::join(run.at("data_paths").get<std::vector<std::string>>(), "`, `"), mix, kind,
      loss.at("teacher").get<std::string>(),
      loss.at("teacher_scope") == "residual" ? "the residual attention (without sinks and recency)"
                                             : "all attention",
      loss.at("start") == "backbone" ? "the backbone's own queries and keys" : "chance",
      run.at("peak_lr").get<double>(), run.at("warmup_steps").get<int64_t>(),
      run.at("final_lr").get<double>(), run.at("weight_decay").get<double>(),
      run.at("clip_norm").get<double>(), run.at("seed").get<uint64_t>());
}

// Of held-out text: the loss over the run, ten lines at most, the first and the last among them; and in the
// end what the best tokens by the selector's scores hold of the teacher's attention, beside the most that as
// many could hold.
std::string held_out(const std::vector<json>& metrics, const std::vector<double>& budgets) {
  std::vector<const json*> measured;
  for (const json& entry : metrics)
    if (entry.contains("held_out_loss")) measured.push_back(&entry);
  if (measured.empty()) return "";
  const size_t lines = std::min<size_t>(measured.size(), 10);
  std::string table =
      "\n| step | training loss | held-out loss (nats, mean over layers) |\n| --- | --- | --- |\n";
  for (size_t line = 0; line < lines; ++line) {
    const json& entry =
        *measured[lines == 1 ? measured.size() - 1 : line * (measured.size() - 1) / (lines - 1)];
    table += fmt::format("| {} | {:.3f} | {:.3f} |\n", grouped(entry.at("step")),
                         entry.at("loss").get<double>(), entry.at("held_out_loss").get<double>());
  }
  table +=
      "\nHeld-out attention at the end:\n\n| tokens | the best by its scores hold | the most they could hold |\n| --- | --- | --- |\n";
  for (const double budget : budgets)
    table +=
        fmt::format("| {:.3g}% | {:.3f} | {:.3f} |\n", 100 * budget,
                    measured.back()->at(fmt::format("held_out_covered_{:g}", budget)).get<double>(),
                    measured.back()->at(fmt::format("held_out_covered_oracle_{:g}", budget)).get<double>());
  return table;
}

std::string calibration(const json& notes) {
  if (!notes.contains("calibration")) return "";
  const json &fitted = notes.at("calibration"), &run = notes.at("training");
  const int64_t length =
      run.at("calibration_length") == 0 ? run.at("sequence_length") : run.at("calibration_length");
  const auto before = fitted.at("captured_before").get<std::vector<std::vector<double>>>();
  const auto after = fitted.at("captured_after").get<std::vector<std::vector<double>>>();
  const auto p = fitted.at("p").get<std::vector<double>>();
  if (after.empty()) return "";
  const auto column = [&](const std::vector<std::vector<double>>& rows, size_t place) {
    std::vector<double> values;
    for (const auto& row : rows) values.push_back(row[place]);
    return values;
  };
  std::string table = fmt::format(
      "\n## What p means\n\nA temperature a layer was fitted on {} held-out contexts of {} tokens. Share of the residual attention (outside "
      "sinks and recency) on the blocks that dual top-p takes, median over layers:\n\n| p | before | after (lowest to highest layer) |\n"
      "| --- | --- | --- |\n",
      run.at("held_out_sequences").get<int64_t>(), grouped(length));
  for (size_t place = 0; place < p.size(); ++place) {
    const std::vector<double> values = column(after, place);
    const auto [lowest, highest] = std::minmax_element(values.begin(), values.end());
    table += fmt::format("| {} | {:.3f} | {:.3f} ({:.3f} to {:.3f}) |\n", p[place],
                         median(column(before, place)), median(values), *lowest, *highest);
  }
  return table;
}

constexpr const char* kMassHeading = "\n## What a captured mass reads\n";

// Empty where the selector has no mass table. Every second row of it.
std::string mass_section(const json& selector) {
  const json& chosen = selector.at("config").at("selection");
  const json& notes = selector.at("notes");
  if (!chosen.contains("mass_table") || !notes.contains("mass_calibration")) return "";
  const json& from = notes.at("mass_calibration");
  std::string table = fmt::format(
      "{}\n`--mass M` takes the threshold T that captured the share M of all attention in the last quarter of {} held-out contexts of {} tokens; "
      "`--threshold T` takes the blocks that hold at least T of it, by the selector's estimate and the mean residual mass of each "
      "layer and set. Mean over layers:\n\n| T | captured mass | share of the tokens |\n| --- | --- | --- |\n",
      kMassHeading, from.at("contexts").get<int64_t>(), grouped(from.at("length")));
  const auto rows = chosen.at("mass_table").get<std::vector<std::vector<double>>>();
  for (size_t row = 0; row < rows.size(); row += 2)
    table += fmt::format("| {:.2g} | {:.3f} | {:.1f}% |\n", rows[row].at(0), rows[row].at(1),
                         100 * rows[row].at(2));
  return table;
}

}  // namespace

std::string selector_card(const std::string& name, const json& selector, const std::vector<json>& metrics) {
  const json& notes = selector.at("notes");
  return fmt::format(
      "# Selector `{}`\n\n{}\n```sh\nspot generate --model MODEL --selector {} --prompt-file question.txt\n```\n\n## Training\n\n{}{}{}{}",
      name, what_it_is(selector), name, how_it_was_trained(selector),
      held_out(metrics, notes.at("training").at("budgets").get<std::vector<double>>()), calibration(notes),
      mass_section(selector));
}

std::string with_mass_section(const std::string& card, const json& selector) {
  const std::string section = mass_section(selector);
  const size_t start = card.find(kMassHeading);
  if (start == std::string::npos) return card + (card.empty() || card.back() == '\n' ? "" : "\n") + section;
  const size_t end = card.find("\n## ", start + 1);
  return card.substr(0, start) + section + (end == std::string::npos ? "" : card.substr(end));
}

}  // namespace spot
