#include "server/prometheus.h"

#include <fmt/format.h>

#include <algorithm>

namespace spot::server {
namespace {

std::string escaped(const std::string& text, bool quotes) {
  std::string out;
  for (const char c : text) {
    if (c == '\\' || (quotes && c == '"')) out += '\\';
    if (c == '\n')
      out += "\\n";
    else
      out += c;
  }
  return out;
}

std::string written(const Labels& labels, const std::string& bound = {}) {
  std::string text;
  for (const auto& [name, value] : labels)
    text += fmt::format("{}{}=\"{}\"", text.empty() ? "" : ",", name, escaped(value, true));
  if (!bound.empty()) text += fmt::format("{}le=\"{}\"", text.empty() ? "" : ",", bound);
  return text.empty() ? "" : "{" + text + "}";
}

}  // namespace

void Metric::add(double amount) {
  const std::lock_guard lock(mutex_);
  value_ += amount;
}

void Metric::set(double value) {
  const std::lock_guard lock(mutex_);
  value_ = value;
}

double Metric::value() const {
  const std::lock_guard lock(mutex_);
  return value_;
}

void Histogram::observe(double value) {
  const auto place = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  const std::lock_guard lock(mutex_);
  ++counts_[static_cast<size_t>(place)];
  sum_ += value;
}

Registry::Family& Registry::family(const std::string& name, const std::string& help,
                                   const std::string& type) {
  Family& family = families_[name];
  family.help = help, family.type = type;
  return family;
}

Labels Registry::with_common(const Labels& labels) const {
  Labels all = common_;
  all.insert(all.end(), labels.begin(), labels.end());
  return all;
}

Metric& Registry::counter(const std::string& name, const std::string& help, const Labels& labels) {
  const std::lock_guard lock(mutex_);
  Metric& metric = family(name, help, "counter").metrics.emplace_back();
  metric.labels_ = with_common(labels);
  return metric;
}

Metric& Registry::gauge(const std::string& name, const std::string& help, const Labels& labels) {
  const std::lock_guard lock(mutex_);
  Metric& metric = family(name, help, "gauge").metrics.emplace_back();
  metric.labels_ = with_common(labels);
  return metric;
}

Histogram& Registry::histogram(const std::string& name, const std::string& help, std::vector<double> bounds,
                               const Labels& labels) {
  const std::lock_guard lock(mutex_);
  Histogram& histogram = family(name, help, "histogram").histograms.emplace_back();
  histogram.labels_ = with_common(labels);
  histogram.bounds_ = std::move(bounds);
  histogram.counts_.resize(histogram.bounds_.size() + 1);
  return histogram;
}

std::string Registry::text() const {
  const std::lock_guard lock(mutex_);
  std::string text;
  for (const auto& [name, family] : families_) {
    text += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, escaped(family.help, false), name, family.type);
    for (const Metric& metric : family.metrics)
      text += fmt::format("{}{} {}\n", name, written(metric.labels_), metric.value());
    for (const Histogram& histogram : family.histograms) {
      const std::lock_guard own(histogram.mutex_);
      uint64_t count = 0;
      for (size_t i = 0; i < histogram.counts_.size(); ++i) {
        count += histogram.counts_[i];
        const std::string bound =
            i < histogram.bounds_.size() ? fmt::format("{}", histogram.bounds_[i]) : "+Inf";
        text += fmt::format("{}_bucket{} {}\n", name, written(histogram.labels_, bound), count);
      }
      text += fmt::format("{}_sum{} {}\n", name, written(histogram.labels_), histogram.sum_);
      text += fmt::format("{}_count{} {}\n", name, written(histogram.labels_), count);
    }
  }
  return text;
}

}  // namespace spot::server
