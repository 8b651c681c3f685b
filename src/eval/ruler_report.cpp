// How a RULER evaluation is kept and shown: JSON, terminal tables and charts.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>

#include "core/error.h"
#include "eval/ruler_eval.h"

namespace spot {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// JSON has no NaN: null stands for it.
nlohmann::json number_or_null(double value) {
  return std::isnan(value) ? nlohmann::json() : nlohmann::json(value);
}
double nan_if_null(const nlohmann::json& json) {
  return json.is_null() ? kNan : json.get<double>();
}

// What of the records a number is taken over; what is empty takes all.
struct Part {
  std::optional<RulerTask> task;
  std::optional<int64_t> length;
  std::optional<double> depth;

  bool holds(const RulerRecord& record) const {
    return (!task || record.task == *task) && (!length || record.length == *length) &&
           (!depth || record.asked_depth == *depth);
  }
};

using Value = std::function<double(const RulerRecord&)>;

// Values of the part, a stratum for each task.
std::vector<std::vector<double>> strata(const RulerResult& result, const Part& part, const Value& value) {
  std::vector<std::vector<double>> all;
  for (RulerTask task : result.options.tasks) {
    std::vector<double>& values = all.emplace_back();
    for (const RulerRecord& record : result.records)
      if (record.task == task && part.holds(record)) values.push_back(value(record));
  }
  return all;
}

Interval score(const RulerResult& result, const Part& part, size_t method) {
  return bootstrap_mean(
      strata(result, part, [&](const RulerRecord& r) { return 100 * r.outcomes[method].score; }));
}

// Of each method's score to the first one's on the same prompt.
Interval difference(const RulerResult& result, const Part& part, size_t method) {
  return bootstrap_mean(strata(result, part, [&](const RulerRecord& r) {
    return 100 * (r.outcomes[method].score - r.outcomes[0].score);
  }));
}

// Shares of tokens attended and of true attention mass captured, over all decode steps; 1 for dense
// attention. And the tokens attended by a query, NaN for dense attention.
struct Measures {
  double attended = 1, captured = 1, tokens = kNan;
  bool mass_measured = true;
};
Measures measure(const RulerResult& result, const Part& part, size_t method) {
  double attended = 0, visible = 0, captured = 0, terms = 0, rows = 0;
  for (const RulerRecord& record : result.records) {
    if (!part.holds(record)) continue;
    const RulerOutcome& outcome = record.outcomes[method];
    attended += outcome.attended, visible += outcome.visible;
    captured += outcome.captured, terms += static_cast<double>(outcome.measured);
    rows += static_cast<double>(outcome.rows);
  }
  if (visible == 0) return {};
  return {attended / visible, terms > 0 ? captured / terms : kNan, attended / rows, terms > 0};
}

std::string with_interval(const Interval& i, const char* format) {
  return fmt::format(fmt::runtime(format), i.mean, i.low, i.high);
}
constexpr const char* kScore = "{:.1f} [{:.1f}, {:.1f}]";
constexpr const char* kDifference = "{:+.1f} [{:+.1f}, {:+.1f}]";

nlohmann::json interval_json(const Interval& i) {
  return {{"mean", i.mean}, {"low", i.low}, {"high", i.high}};
}

// Short enough for the axis of a heat map.
std::string axis_name(RulerTask task) {
  const std::string name = to_string(task);
  return name.rfind("niah_", 0) == 0 ? name.substr(5) : name;
}

}  // namespace

nlohmann::json RulerRecord::to_json() const {
  nlohmann::json json = {{"task", to_string(task)},
                         {"length", length},
                         {"sample", sample},
                         {"asked_depth", number_or_null(asked_depth)},
                         {"depth", number_or_null(depth)},
                         {"prompt_tokens", prompt_tokens},
                         {"references", references},
                         {"outcomes", nlohmann::json::array()}};
  for (const RulerOutcome& o : outcomes) {
    json["outcomes"].push_back({{"output", o.output},
                                {"score", o.score},
                                {"answer_tokens", o.answer_tokens},
                                {"attended", o.attended},
                                {"visible", o.visible},
                                {"captured", o.captured},
                                {"measured", o.measured},
                                {"rows", o.rows}});
  }
  return json;
}

RulerRecord RulerRecord::from_json(const nlohmann::json& json) {
  try {
    RulerRecord record{ruler_task_from_string(json.at("task")),
                       json.at("length"),
                       json.at("sample"),
                       nan_if_null(json.at("asked_depth")),
                       nan_if_null(json.at("depth")),
                       json.at("prompt_tokens"),
                       json.at("references"),
                       {}};
    for (const nlohmann::json& o : json.at("outcomes")) {
      record.outcomes.push_back({o.at("output"), o.at("score"), o.at("answer_tokens"), o.at("attended"),
                                 o.at("visible"), o.at("captured"), o.at("measured"), o.at("rows")});
    }
    return record;
  } catch (const nlohmann::json::exception& e) {
    fail("a finished RULER prompt cannot be read back ({}); delete its line: {:.200}", e.what(), json.dump());
  }
}

Table RulerResult::scores() const {
  Table table{{options.depths.empty() ? "task" : "task, needle depth", "length"}, {}};
  table.header.insert(table.header.end(), methods.begin(), methods.end());
  auto add = [&](const std::string& name, const Part& part) {
    std::vector<std::string> row = {name, std::to_string(*part.length)};
    for (size_t m = 0; m < methods.size(); ++m) row.push_back(with_interval(score(*this, part, m), kScore));
    table.rows.push_back(row);
  };
  for (int64_t length : options.lengths) {
    for (RulerTask task : options.tasks) {
      for (double depth : options.depths)
        add(fmt::format("{}, {:.0f}%", to_string(task), 100 * depth), {task, length, depth});
      if (options.depths.empty()) add(to_string(task), {task, length, {}});
    }
    if (options.tasks.size() * std::max<size_t>(options.depths.size(), 1) > 1)
      add("average", {{}, length, {}});
  }
  return table;
}

double RulerResult::captured_mass(size_t method) const {
  double captured = 0, terms = 0;
  for (const RulerRecord& record : records) {
    captured += record.outcomes[method].captured;
    terms += static_cast<double>(record.outcomes[method].measured);
  }
  return terms > 0 ? captured / terms : kNan;
}

Table RulerResult::measures() const {
  Table table{{"attention", "length", "score", "vs " + methods.front(), "attended", "captured mass"}, {}};
  for (int64_t length : options.lengths) {
    const Part part{{}, length, {}};
    for (size_t m = 0; m < methods.size(); ++m) {
      const Measures measures = measure(*this, part, m);
      table.rows.push_back(
          {methods[m], std::to_string(length), with_interval(score(*this, part, m), kScore),
           m == 0 ? "" : with_interval(difference(*this, part, m), kDifference),
           fmt::format("{:.1f}%", 100 * measures.attended),
           measures.mass_measured ? fmt::format("{:.3f}", measures.captured) : "not measured"});
    }
  }
  return table;
}

nlohmann::json RulerResult::to_json() const {
  nlohmann::json json = {{"settings", settings},
                         {"samples", options.samples},
                         {"depths", options.depths},
                         {"methods", methods},
                         {"scores", nlohmann::json::array()},
                         {"measures", nlohmann::json::array()},
                         {"prompts", nlohmann::json::array()}};
  for (int64_t length : options.lengths) {
    for (size_t m = 0; m < methods.size(); ++m) {
      for (RulerTask task : options.tasks) {
        nlohmann::json entry = interval_json(score(*this, {task, length, {}}, m));
        entry["task"] = to_string(task), entry["length"] = length, entry["method"] = methods[m];
        json["scores"].push_back(entry);
      }
      const Part part{{}, length, {}};
      const Measures measures = measure(*this, part, m);
      json["measures"].push_back({{"method", methods[m]},
                                  {"length", length},
                                  {"score", interval_json(score(*this, part, m))},
                                  {"difference_to_first", interval_json(difference(*this, part, m))},
                                  {"attended_share", measures.attended},
                                  {"attended_tokens", number_or_null(measures.tokens)},
                                  {"captured_mass", number_or_null(measures.captured)}});
    }
  }
  for (const RulerRecord& record : records) json["prompts"].push_back(record.to_json());
  return json;
}

void RulerResult::add_to(Page& page) const {
  page.heading(options.depths.empty() ? "RULER" : "Needle depth sweep");
  page.paragraph(
      fmt::format("{} prompts, {} of each task{} and length, seed {}, wording {}. The context is prefilled "
                  "densely once; each method then reads the "
                  "question and writes the answer token by token. Scores are percent of the references "
                  "found, with 95% bootstrap intervals.",
                  records.size(), options.samples, options.depths.empty() ? "" : ", depth",
                  options.prompts.seed, options.prompts.wording));
  page.add(measures());
  page.add(scores());
  if (options.lengths.size() > 1) {
    LineChart chart{.title = "Average score by length",
                    .x_label = "tokens",
                    .y_label = "score",
                    .log_x = true,
                    .y_from_zero = true};
    for (size_t m = 0; m < methods.size(); ++m) {
      Series series{.name = methods[m], .dashed = m == 0};
      for (int64_t length : options.lengths) {
        series.x.push_back(static_cast<double>(length));
        series.y.push_back(score(*this, {{}, length, {}}, m).mean);
      }
      chart.series.push_back(series);
    }
    page.chart(chart);
  }
  if (!options.depths.empty()) {
    for (size_t m = 0; m < methods.size(); ++m) {
      for (RulerTask task : options.tasks) {
        HeatMap map{.title = fmt::format("{}, {}", methods[m], to_string(task)),
                    .x_label = "tokens",
                    .y_label = "needle depth",
                    .high = 100};
        for (int64_t length : options.lengths) map.columns.push_back(std::to_string(length));
        for (double depth : options.depths) {
          map.rows.push_back(fmt::format("{:.0f}%", 100 * depth));
          std::vector<double>& row = map.values.emplace_back();
          for (int64_t length : options.lengths) row.push_back(score(*this, {task, length, depth}, m).mean);
        }
        page.chart(map);
      }
    }
    return;
  }
  for (int64_t length : options.lengths) {
    HeatMap map{.title = fmt::format("Score by task at {} tokens", length),
                .x_label = "attention",
                .y_label = "",
                .high = 100};
    map.columns = methods;
    for (RulerTask task : options.tasks) {
      map.rows.push_back(axis_name(task));
      std::vector<double>& row = map.values.emplace_back();
      for (size_t m = 0; m < methods.size(); ++m) row.push_back(score(*this, {task, length, {}}, m).mean);
    }
    page.chart(map);
  }
}

}  // namespace spot
