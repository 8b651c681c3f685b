// Counters, gauges and histograms in the text format of Prometheus (version 0.0.4).
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace spot::server {

using Labels = std::vector<std::pair<std::string, std::string>>;

class Registry;

// A counter or a gauge. May be changed and read by any thread.
class Metric {
 public:
  void add(double amount = 1);
  void set(double value);
  double value() const;

 private:
  friend class Registry;
  Labels labels_;
  mutable std::mutex mutex_;
  double value_ = 0;
};

// Counts of observations up to each of some bounds, ascending, and up to infinity.
class Histogram {
 public:
  void observe(double value);

 private:
  friend class Registry;
  Labels labels_;
  std::vector<double> bounds_;
  mutable std::mutex mutex_;
  std::vector<uint64_t> counts_;  // by bound, the last beyond all of them; not cumulative
  double sum_ = 0;
};

// Metrics of one name stand together, told apart by their labels. What is returned lives as long as the registry.
class Registry {
 public:
  // `common` are every metric's first labels.
  explicit Registry(Labels common = {}) : common_(std::move(common)) {}

  Metric& counter(const std::string& name, const std::string& help, const Labels& labels = {});
  Metric& gauge(const std::string& name, const std::string& help, const Labels& labels = {});
  Histogram& histogram(const std::string& name, const std::string& help, std::vector<double> bounds,
                       const Labels& labels = {});
  // All metrics. Any thread may ask.
  std::string text() const;

 private:
  struct Family {
    std::string help, type;
    std::deque<Metric> metrics;
    std::deque<Histogram> histograms;
  };
  Family& family(const std::string& name, const std::string& help, const std::string& type);
  Labels with_common(const Labels& labels) const;

  Labels common_;
  mutable std::mutex mutex_;
  std::map<std::string, Family> families_;
};

}  // namespace spot::server
