// How a text evaluation is shown: JSON, a terminal table and charts.
#include <fmt/format.h>

#include <cmath>

#include "eval/text_eval.h"

namespace spot {
namespace {

using Measure = double LayerMeasures::*;

double mean_over_layers(const MethodResult& method, Measure measure) {
  double sum = 0;
  for (const auto& [layer, m] : method.layers) sum += m.*measure;
  return method.layers.empty() ? 1.0 : sum / static_cast<double>(method.layers.size());
}

LineChart by_layer(const TextEvalResult& result, const std::string& title, const std::string& label,
                   Measure measure) {
  LineChart chart{.title = title, .x_label = "layer", .y_label = label, .y_from_zero = true};
  for (const MethodResult& method : result.methods) {
    Series series{.name = method.name};
    for (const auto& [layer, m] : method.layers)
      series.x.push_back(static_cast<double>(layer)), series.y.push_back(m.*measure);
    chart.series.push_back(series);
  }
  return chart;
}

using Buckets = std::vector<double> MethodResult::*;

LineChart by_position(const TextEvalResult& result, const std::string& title, const std::string& label,
                      Buckets buckets, bool with_dense) {
  LineChart chart{.title = title, .x_label = "position", .y_label = label};
  auto add = [&](const MethodResult& method, bool dashed) {
    Series series{.name = method.name, .y = method.*buckets, .dashed = dashed};
    const auto width = static_cast<double>(result.options.length) / static_cast<double>(series.y.size());
    for (size_t b = 0; b < series.y.size(); ++b) series.x.push_back((static_cast<double>(b) + 0.5) * width);
    chart.series.push_back(series);
  };
  for (const MethodResult& method : result.methods) add(method, false);
  if (with_dense) add(result.dense, true);  // last, so that a method has one colour in all charts
  return chart;
}

// JSON has no NaN: a bucket of positions without a scored token is null.
nlohmann::json nan_as_null(const std::vector<double>& values) {
  nlohmann::json json = nlohmann::json::array();
  for (double v : values) json.push_back(std::isnan(v) ? nlohmann::json() : nlohmann::json(v));
  return json;
}

nlohmann::json method_json(const MethodResult& method) {
  nlohmann::json json = {{"name", method.name},
                         {"scored_tokens", method.scored_tokens},
                         {"nll", method.nll},
                         {"perplexity", method.perplexity()},
                         {"kl_from_dense", method.kl},
                         {"argmax_agreement", method.argmax_agreement},
                         {"nll_by_position", nan_as_null(method.nll_by_position)},
                         {"kl_by_position", nan_as_null(method.kl_by_position)},
                         {"agreement_by_position", nan_as_null(method.agreement_by_position)},
                         {"attended_share", method.attended_share()},
                         {"seconds", method.seconds}};
  for (const auto& [layer, m] : method.layers) {
    nlohmann::json entry = {{"layer", layer},
                            {"measured_queries", m.queries},
                            {"attended_share", m.attended_share},
                            {"captured_mass", m.captured_mass},
                            {"captured_residual_mass", m.captured_residual},
                            {"oracle_recall", m.oracle_recall}};
    for (const auto& [p, captured] : m.calibration)
      entry["calibration"].push_back({{"p", p}, {"captured_residual_mass", captured}});
    json["layers"].push_back(entry);
  }
  return json;
}

}  // namespace

nlohmann::json TextEvalResult::to_json() const {
  nlohmann::json json = {{"length", options.length},
                         {"sequences", options.sequences},
                         {"skip", options.skip},
                         {"kv_cache_dtype", to_string(options.kv_cache)},
                         {"dense", method_json(dense)}};
  for (const MethodResult& method : methods) json["methods"].push_back(method_json(method));
  return json;
}

Table TextEvalResult::summary() const {
  Table table{{"attention", "perplexity", "vs dense", "KL (nats)", "same argmax", "attended", "captured mass",
               "oracle recall"},
              {}};
  auto row = [&](const MethodResult& m) {
    table.rows.push_back({m.name, fmt::format("{:.4f}", m.perplexity()),
                          fmt::format("{:+.2f}%", 100 * (m.perplexity() / dense.perplexity() - 1)),
                          fmt::format("{:.4f}", m.kl), fmt::format("{:.1f}%", 100 * m.argmax_agreement),
                          fmt::format("{:.1f}%", 100 * m.attended_share()),
                          fmt::format("{:.3f}", m.captured_mass()),
                          fmt::format("{:.3f}", mean_over_layers(m, &LayerMeasures::oracle_recall))});
  };
  row(dense);
  for (const MethodResult& method : methods) row(method);
  return table;
}

void TextEvalResult::add_to(Page& page) const {
  page.heading("Running text");
  page.paragraph(fmt::format(
      "{} sequences of {} tokens, positions from {} on; every query selects for itself. Captured mass: "
      "true head-averaged attention on the selected blocks, {} queries a chunk.",
      options.sequences, options.length, options.skip, options.measured_queries));
  page.add(summary());
  page.chart(by_position(*this, "Negative log-likelihood by position", "nats a token",
                         &MethodResult::nll_by_position, true));
  page.chart(by_position(*this, "KL from dense attention's logits by position", "nats",
                         &MethodResult::kl_by_position, false));
  page.chart(by_position(*this, "Same likeliest token as dense attention, by position", "share",
                         &MethodResult::agreement_by_position, false));
  page.chart(by_layer(*this, "Captured attention mass", "mass", &LayerMeasures::captured_mass));
  page.chart(by_layer(*this, "Share of tokens attended", "share", &LayerMeasures::attended_share));
  page.chart(by_layer(*this, "Recall of the oracle's blocks", "recall", &LayerMeasures::oracle_recall));
  for (const MethodResult& method : methods) {
    LineChart chart{.title = "Calibration of " + method.name + ": captured residual mass against p",
                    .x_label = "p",
                    .y_label = "captured"};
    for (const auto& [layer, m] : method.layers) {
      if (m.calibration.empty()) continue;
      Series series{.name = fmt::format("{}", layer)};
      for (const auto& [p, captured] : m.calibration) series.x.push_back(p), series.y.push_back(captured);
      chart.series.push_back(series);
    }
    if (chart.series.empty()) continue;
    Series ideal{.name = "ideal", .dashed = true};
    for (double p : options.calibration_p) ideal.x.push_back(p), ideal.y.push_back(p);
    chart.series.push_back(ideal);
    page.chart(chart);
  }
}

}  // namespace spot
