#include "distill/metrics.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <numeric>
#include <set>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "core/notice.h"
#include "report/page.h"

namespace spot {
namespace {

// At most `most` points: each the mean of a run of steps, so that noise does not hide the trend.
Series thin(const std::string& name, const std::vector<double>& x, const std::vector<double>& y,
            size_t most = 200) {
  Series series{.name = name};
  const size_t run = (x.size() + most - 1) / std::max<size_t>(most, 1);
  for (size_t i = 0; i < x.size(); i += std::max<size_t>(run, 1)) {
    const size_t end = std::min(x.size(), i + std::max<size_t>(run, 1));
    const auto n = static_cast<double>(end - i);
    series.x.push_back(
        std::accumulate(x.begin() + static_cast<long>(i), x.begin() + static_cast<long>(end), 0.0) / n);
    series.y.push_back(
        std::accumulate(y.begin() + static_cast<long>(i), y.begin() + static_cast<long>(end), 0.0) / n);
  }
  return series;
}

// The numbers of this name over the steps that have one.
Series series(const std::string& label, const std::vector<nlohmann::json>& entries, const std::string& name) {
  std::vector<double> steps, values;
  for (const nlohmann::json& entry : entries) {
    const auto value = entry.find(name);
    if (value == entry.end()) continue;
    steps.push_back(entry.at("step"));
    values.push_back(*value);
  }
  return thin(label, steps, values);
}

// "x_per_layer" over the run: a row a layer, a column a stretch of steps, named by its last one; each value
// is the mean over the stretch, divided by that of `divisor` where one is given.
HeatMap layers_over_time(const std::string& title, const std::vector<nlohmann::json>& entries,
                         const std::string& name, const std::string& divisor = "") {
  HeatMap map{.title = title, .x_label = "up to step", .y_label = "layer"};
  std::vector<const nlohmann::json*> measured;
  for (const nlohmann::json& entry : entries)
    if (entry.contains(name)) measured.push_back(&entry);
  for (const auto& layer : entries.back().at("layers"))
    map.rows.push_back(fmt::format("{}", layer.get<int64_t>()));
  map.values.resize(map.rows.size());
  const size_t columns = std::min<size_t>(measured.size(), 12);
  double highest = 0.0;
  for (size_t c = 0; c < columns; ++c) {
    const size_t first = c * measured.size() / columns, end = (c + 1) * measured.size() / columns;
    map.columns.push_back(fmt::format("{}", measured[end - 1]->at("step").get<int64_t>()));
    for (size_t l = 0; l < map.rows.size(); ++l) {
      double value = 0.0, by = 0.0;
      for (size_t i = first; i < end; ++i) {
        value += measured[i]->at(name)[l].get<double>();
        by += divisor.empty() ? 1.0 : measured[i]->at(divisor)[l].get<double>();
      }
      map.values[l].push_back(value / by);
      if (std::isfinite(value / by)) highest = std::max(highest, value / by);
    }
  }
  map.high = divisor.empty() ? std::max(highest, 1e-9) : 1.0;
  return map;
}

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& path, int64_t last_step) : path_(path) {
  std::string kept;
  refuse_special(path);
  if (last_step > 0 && std::filesystem::exists(path)) {
    std::istringstream lines(read_file(path));
    for (std::string line; std::getline(lines, line);) {
      const nlohmann::json entry = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      if (!entry.is_object() || !entry.contains("step")) continue;  // cut off by a crash
      if (entry.at("step") > last_step) break;
      entries_.push_back(entry);
      kept += line + "\n";
    }
  }
  write_file_atomically(path, kept);
}

void MetricsLog::add(const nlohmann::json& metrics) {
  entries_.push_back(metrics);
  pending_ += metrics.dump() + "\n";
  try {
    flush();
    failing_ = false;
  } catch (const Error& e) {
    if (!failing_)
      notice("{}. Training goes on; the lines are kept and written when that is possible.\n", e.what());
    failing_ = true;
  }
}

void MetricsLog::flush() {
  if (pending_.empty()) return;
  std::error_code code;
  const uintmax_t before = std::filesystem::file_size(path_, code);
  errno = 0;
  std::ofstream out(path_, std::ios::app | std::ios::binary);
  out << pending_ << std::flush;
  if (!out) {
    const std::string why = errno ? std::strerror(errno) : "the write failed";
    out.close();
    // Half a line would stay in the middle of the file.
    if (!code) std::filesystem::resize_file(path_, before, code);
    fail("{}: cannot be written: {}", path_.string(), why);
  }
  pending_.clear();
}

void write_loss_page(const std::filesystem::path& path, const std::vector<nlohmann::json>& entries) {
  if (entries.empty()) return;
  Page page("Distillation");
  const nlohmann::json& last = entries.back();
  page.paragraph(fmt::format(
      "{} steps, {} tokens. KL divergence in nats between the backbone's head-averaged attention and "
      "the selector's estimate, mean over layers and queries.",
      last.at("step").get<int64_t>(), last.at("tokens").get<int64_t>()));
  std::set<std::string> budgets, p;  // not every step measures held-out text
  const std::string oracle = "covered_oracle_", captured = "held_out_captured_p", layers_end = "_per_layer";
  for (const nlohmann::json& entry : entries)
    for (const auto& [name, value] : entry.items()) {
      if (name.ends_with(layers_end)) continue;
      if (name.starts_with(oracle)) budgets.insert(name.substr(oracle.size()));
      if (name.starts_with(captured)) p.insert(name.substr(captured.size()));
    }

  LineChart loss{.title = "Loss",
                 .x_label = "step",
                 .y_label = "KL, nats",
                 .series = {series("training", entries, "loss")}};
  loss.y_from_zero = true;
  const Series held_out = series("held-out text", entries, "held_out_loss");
  if (!held_out.x.empty()) loss.series.push_back(held_out);
  page.chart(loss);
  page.chart(layers_over_time("Loss by layer", entries, "loss_per_layer"));

  LineChart mass{.title = "Attention mass inside the selector's best blocks, by budget",
                 .x_label = "step",
                 .y_label = "share"};
  for (const std::string& budget : budgets) {
    mass.series.push_back(series(budget, entries, "covered_" + budget));
    mass.series.push_back(series(budget + " oracle", entries, oracle + budget));
    mass.series.back().dashed = true;
  }
  if (!budgets.empty()) page.chart(mass);
  for (const std::string& budget : budgets)
    page.chart(layers_over_time("Mass at budget " + budget + " by layer, as a share of the oracle's", entries,
                                "covered_" + budget + layers_end, oracle + budget + layers_end));

  if (!p.empty()) {
    page.heading("Calibration");
    page.paragraph(
        "On held-out text, at temperature 1: the attention mass that the selector predicts for the blocks it takes (p) and the "
        "mass that lies there. Reserved blocks are left out; temperatures are fitted after the last step.");
    LineChart predicted{
        .title = "Captured mass at each predicted p", .x_label = "step", .y_label = "captured"};
    for (const std::string& value : p)
      predicted.series.push_back(series("p " + value, entries, captured + value));
    page.chart(predicted);
    page.chart(layers_over_time("Distance of captured mass from p by layer, mean over p", entries,
                                "held_out_calibration_error" + layers_end));
  }

  page.heading("Progress");
  page.chart(LineChart{.title = "Learning rate",
                       .x_label = "step",
                       .y_label = "rate",
                       .series = {series("rate", entries, "lr")}});
  LineChart speed{.title = "Speed",
                  .x_label = "step",
                  .y_label = "tokens/s",
                  .series = {series("all processes", entries, "tokens_per_second")}};
  speed.y_from_zero = true;
  page.chart(speed);

  Table table{.header = {"layer", "loss"}};
  for (const std::string& budget : budgets) {
    table.header.push_back("captured at " + budget);
    table.header.push_back("oracle");
  }
  const auto& layers = last.at("layers");
  for (size_t l = 0; l < layers.size(); ++l) {
    std::vector<std::string> row = {fmt::format("{}", layers[l].get<int64_t>()),
                                    fmt::format("{:.4f}", last.at("loss_per_layer")[l].get<double>())};
    for (const std::string& budget : budgets)
      for (const std::string& kind : {std::string("covered_"), oracle})
        row.push_back(fmt::format("{:.3f}", last.at(kind + budget + layers_end)[l].get<double>()));
    table.rows.push_back(row);
  }
  page.heading("Layers, last step");
  page.add(table);
  write_file_atomically(path, page.html());
}

}  // namespace spot
