#include "distill/metrics.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <numeric>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "report/page.h"

namespace spot {
namespace {

double mean(const nlohmann::json& list) {
  const auto values = list.get<std::vector<double>>();
  return values.empty()
             ? 0.0
             : std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

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

}  // namespace

MetricsLog::MetricsLog(const std::filesystem::path& path, int64_t last_step) : path_(path) {
  std::string kept;
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
  std::ofstream out(path_, std::ios::app);
  out << metrics.dump() << "\n" << std::flush;
  if (!out) fail("{}: cannot be written: {}", path_.string(), std::strerror(errno));
}

void write_loss_page(const std::filesystem::path& path, const std::vector<nlohmann::json>& entries) {
  if (entries.empty()) return;
  Page page("Distillation");
  const nlohmann::json& last = entries.back();
  page.paragraph(fmt::format(
      "{} steps, {} tokens. KL divergence in nats between the backbone's head-averaged attention and "
      "the selector's estimate, mean over layers and queries.",
      last.at("step").get<int64_t>(), last.at("tokens").get<int64_t>()));

  std::vector<double> steps, losses;
  Series held_out{.name = "held-out text"};
  std::vector<std::string> budgets;
  for (const auto& [budget, values] : last.at("covered_per_layer").items()) budgets.push_back(budget);
  std::vector<std::vector<double>> covered(budgets.size()), ceiling(budgets.size());
  for (const nlohmann::json& entry : entries) {
    steps.push_back(entry.at("step"));
    losses.push_back(entry.at("loss"));
    if (entry.contains("held_out_loss")) {
      held_out.x.push_back(entry.at("step"));
      held_out.y.push_back(entry.at("held_out_loss"));
    }
    for (size_t b = 0; b < budgets.size(); ++b) {
      covered[b].push_back(mean(entry.at("covered_per_layer").at(budgets[b])));
      ceiling[b].push_back(mean(entry.at("covered_oracle_per_layer").at(budgets[b])));
    }
  }
  LineChart loss{
      .title = "Loss", .x_label = "step", .y_label = "KL, nats", .series = {thin("training", steps, losses)}};
  loss.y_from_zero = true;
  if (!held_out.x.empty()) loss.series.push_back(held_out);
  page.chart(loss);

  LineChart mass{
      .title = "Attention mass inside the selector's best blocks", .x_label = "step", .y_label = "share"};
  for (size_t b = 0; b < budgets.size(); ++b) {
    mass.series.push_back(thin("budget " + budgets[b], steps, covered[b]));
    mass.series.push_back(thin("budget " + budgets[b] + ", best possible", steps, ceiling[b]));
    mass.series.back().dashed = true;
  }
  if (!budgets.empty()) page.chart(mass);

  Table table{.header = {"layer", "loss"}};
  for (const std::string& budget : budgets) {
    table.header.push_back("captured at " + budget);
    table.header.push_back("best possible");
  }
  const auto& layers = last.at("layers");
  for (size_t l = 0; l < layers.size(); ++l) {
    std::vector<std::string> row = {fmt::format("{}", layers[l].get<int64_t>()),
                                    fmt::format("{:.4f}", last.at("loss_per_layer")[l].get<double>())};
    for (const std::string& budget : budgets)
      for (const char* kind : {"covered_per_layer", "covered_oracle_per_layer"})
        row.push_back(fmt::format("{:.3f}", last.at(kind).at(budget)[l].get<double>()));
    table.rows.push_back(row);
  }
  page.heading("Layers, last step");
  page.add(table);
  write_file_atomically(path, page.html());
}

}  // namespace spot
