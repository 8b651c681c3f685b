#include <gtest/gtest.h>

#include <thread>

#include "server/prometheus.h"

namespace spot::server {
namespace {

TEST(Prometheus, WritesTheTextFormat) {
  Registry registry(Labels{{"model", "a\"b\\c\nd"}});
  registry.counter("x:y_total", "Two\nlines.", {{"why", "p"}}).add(2);
  registry.counter("x:y_total", "Two\nlines.", {{"why", "q"}});
  registry.gauge("x:level", "A level.").set(-0.25);
  Histogram& histogram = registry.histogram("x:seconds", "Seconds.", {0.5, 2});
  for (const double value : {0.5, 0.25, 1.0, 3.0}) histogram.observe(value);
  const std::string label = R"(model="a\"b\\c\nd")";
  EXPECT_EQ(registry.text(),
            "# HELP x:level A level.\n# TYPE x:level gauge\nx:level{" + label + "} -0.25\n" +
                "# HELP x:seconds Seconds.\n# TYPE x:seconds histogram\n" + "x:seconds_bucket{" + label +
                ",le=\"0.5\"} 2\n" + "x:seconds_bucket{" + label + ",le=\"2\"} 3\n" + "x:seconds_bucket{" +
                label + ",le=\"+Inf\"} 4\n" + "x:seconds_sum{" + label + "} 4.75\n" + "x:seconds_count{" +
                label + "} 4\n" + "# HELP x:y_total Two\\nlines.\n# TYPE x:y_total counter\n" + "x:y_total{" +
                label + ",why=\"p\"} 2\n" + "x:y_total{" + label + ",why=\"q\"} 0\n");
}

TEST(Prometheus, CountsFromManyThreads) {
  Registry registry;
  Metric& metric = registry.counter("n_total", "n");
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 10000; ++i) metric.add();
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(metric.value(), 40000);
}

}  // namespace
}  // namespace spot::server
