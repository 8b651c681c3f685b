// How a needle evaluation is shown: JSON, a terminal table and charts.
#include <fmt/format.h>

#include <set>

#include "eval/needle_eval.h"
#include "eval/ruler_score.h"

namespace spot {
namespace {

std::set<double> depth_levels(const NeedleEvalResult& result) {
  return {result.depths.begin(), result.depths.end()};
}

double share_at_depth(const NeedleEvalResult& result, size_t method, double depth) {
  double right = 0, all = 0;
  for (size_t i = 0; i < result.depths.size(); ++i)
    if (result.depths[i] == depth) all += 1, right += result.methods[method].correct[i];
  return right / all;
}

Interval exact_match_interval(const NeedleMethodResult& method) {
  return wilson_interval(method.num_correct(), static_cast<int64_t>(method.correct.size()));
}

}  // namespace

nlohmann::json NeedleEvalResult::to_json() const {
  nlohmann::json json = {{"length", options.length},
                         {"distractors", options.distractors},
                         {"samples", depths.size()},
                         {"seed", options.seed},
                         {"kv_cache_dtype", to_string(options.kv_cache)},
                         {"prefill_seconds", prefill_seconds},
                         {"depths", depths}};
  for (const NeedleMethodResult& m : methods) {
    const Interval interval = exact_match_interval(m);
    json["methods"].push_back({{"name", m.name},
                               {"exact_match", m.num_correct()},
                               {"interval", {interval.low, interval.high}},
                               {"correct", m.correct},
                               {"outputs", m.outputs},
                               {"attended_share", m.attended_share},
                               {"attended_tokens", m.attended_tokens},
                               {"captured_mass", m.captured_mass},
                               {"milliseconds_per_token", m.milliseconds_per_token}});
  }
  return json;
}

double NeedleSweep::captured_mass(size_t method) const {
  double sum = 0;
  for (const NeedleEvalResult& length : lengths) sum += length.methods[method].captured_mass;
  return sum / static_cast<double>(lengths.size());
}

nlohmann::json NeedleSweep::to_json() const {
  nlohmann::json json = {{"lengths", nlohmann::json::array()}};
  for (const NeedleEvalResult& result : lengths) json["lengths"].push_back(result.to_json());
  return json;
}

Table NeedleSweep::summary() const {
  Table table{
      {"attention", "length", "exact match", "attended", "captured mass", "ms/token", "speed vs first"}, {}};
  for (const NeedleEvalResult& result : lengths) {
    for (const NeedleMethodResult& m : result.methods) {
      const Interval interval = exact_match_interval(m);
      table.rows.push_back(
          {m.name, std::to_string(result.options.length),
           fmt::format("{}/{} [{:.2f}, {:.2f}]", m.num_correct(), m.correct.size(), interval.low,
                       interval.high),
           fmt::format("{:.1f}%", 100 * m.attended_share), fmt::format("{:.3f}", m.captured_mass),
           fmt::format("{:.2f}", m.milliseconds_per_token),
           fmt::format("{:.2f}x", result.methods.front().milliseconds_per_token / m.milliseconds_per_token)});
    }
  }
  return table;
}

void NeedleSweep::add_to(Page& page) const {
  const NeedleEvalResult& first = lengths.front();
  page.heading("Multi-key needles");
  page.paragraph(fmt::format(
      "{} prompts a length, {} distractor needles each, seed {}. The context is prefilled densely once; each "
      "method then reads the question and writes the answer token by token. In brackets: Wilson's 95% "
      "interval.",
      first.depths.size(), first.options.distractors, first.options.seed));
  page.add(summary());
  for (const NeedleEvalResult& result : lengths) {
    BarChart match{.title = fmt::format("Exact match at {} tokens", result.options.length),
                   .y_label = "share",
                   .groups = {"exact match", "tokens attended", "captured mass"}};
    BarChart speed{.title = fmt::format("Decode step at {} tokens", result.options.length),
                   .y_label = "ms a token",
                   .groups = {"ms a token"}};
    for (const NeedleMethodResult& m : result.methods) {
      match.names.push_back(m.name), speed.names.push_back(m.name);
      match.values.push_back({exact_match_interval(m).mean, m.attended_share, m.captured_mass});
      speed.values.push_back({m.milliseconds_per_token});
    }
    page.chart(match);
    page.chart(speed);
  }
  if (lengths.size() == 1) {
    HeatMap map{.title = "Exact match by depth of the needle", .x_label = "depth", .y_label = ""};
    for (double depth : depth_levels(first)) map.columns.push_back(fmt::format("{:.0f}%", 100 * depth));
    for (size_t m = 0; m < first.methods.size(); ++m) {
      map.rows.push_back(first.methods[m].name);
      std::vector<double>& row = map.values.emplace_back();
      for (double depth : depth_levels(first)) row.push_back(share_at_depth(first, m, depth));
    }
    page.chart(map);
    return;
  }
  LineChart by_length{.title = "Exact match by length",
                      .x_label = "tokens",
                      .y_label = "share",
                      .log_x = true,
                      .y_from_zero = true};
  for (size_t m = 0; m < first.methods.size(); ++m) {
    Series series{.name = first.methods[m].name, .dashed = m == 0};
    HeatMap map{
        .title = "Exact match, " + first.methods[m].name, .x_label = "tokens", .y_label = "needle depth"};
    for (const NeedleEvalResult& result : lengths) {
      series.x.push_back(static_cast<double>(result.options.length)),
          series.y.push_back(exact_match_interval(result.methods[m]).mean);
      map.columns.push_back(std::to_string(result.options.length));
    }
    for (double depth : depth_levels(first)) {  // the same at every length
      map.rows.push_back(fmt::format("{:.0f}%", 100 * depth));
      std::vector<double>& row = map.values.emplace_back();
      for (const NeedleEvalResult& result : lengths) row.push_back(share_at_depth(result, m, depth));
    }
    by_length.series.push_back(series);
    page.chart(map);
  }
  page.chart(by_length);
}

}  // namespace spot
