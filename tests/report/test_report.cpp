#include <fmt/format.h>
#include <gtest/gtest.h>

#include <limits>

#include "core/error.h"
#include "report/page.h"

namespace spot {
namespace {

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST(Chart, DrawsEveryFinitePointAndLeavesOutTheRest) {
  LineChart chart{.title = "a<b",
                  .x_label = "x",
                  .y_label = "y",
                  .series = {{"s", {1, 2, 4, 8}, {1, NAN, 3, 0.5}}},
                  .log_x = true};
  const std::string svg = to_svg(chart);
  EXPECT_EQ(count(svg, "<circle"), 3u);
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_NE(svg.find("a&lt;b"), std::string::npos);
}

TEST(Chart, EmptyAndConstantSeriesHaveAnAxis) {
  EXPECT_NE(to_svg(LineChart{.title = "empty", .series = {{"s", {}, {}}}}).find("</svg>"), std::string::npos);
  const std::string flat = to_svg(LineChart{.title = "flat", .series = {{"s", {1, 2}, {5, 5}}}});
  EXPECT_EQ(flat.find("inf"), std::string::npos);
  EXPECT_EQ(flat.find("nan"), std::string::npos);
}

TEST(Chart, ManyNamesGetMoreLinesAndWideColumnNamesStandUpright) {
  LineChart chart{.title = "t"};
  for (int i = 0; i < 18; ++i)
    chart.series.push_back({fmt::format("spot:k={},cache=int4", 512 * i), {1, 2}, {1, 2}});
  EXPECT_EQ(to_svg(chart).find("viewBox='0 0 720 340'"), std::string::npos);
  chart.series.resize(2);
  EXPECT_NE(to_svg(chart).find("viewBox='0 0 720 340'"), std::string::npos);
  HeatMap map{.title = "t", .columns = {"a", "b"}, .rows = {"r"}, .values = {{0, 1}}};
  EXPECT_EQ(count(to_svg(map), "rotate(-90)"), 1u);  // the label of the y axis
  map.columns = {std::string(60, 'a'), "b"};
  EXPECT_EQ(count(to_svg(map), "rotate(-90)"), 3u);
}

TEST(Chart, RefusesUnequalLengthsAndNonPositiveLogarithms) {
  EXPECT_THROW(to_svg(LineChart{.title = "t", .series = {{"s", {1, 2}, {1}}}}), Error);
  EXPECT_THROW(to_svg(LineChart{.title = "t", .series = {{"s", {0, 2}, {1, 2}}}, .log_x = true}), Error);
  EXPECT_THROW(to_svg(BarChart{.title = "t", .groups = {"a", "b"}, .names = {"n"}, .values = {{1}}}), Error);
  EXPECT_THROW(to_svg(HeatMap{.title = "t", .columns = {"a"}, .rows = {"b"}, .values = {{1, 2}}}), Error);
}

TEST(Table, AlignsByCodePointsAndEscapes) {
  const Table table{{"name", "µs"}, {{"a", "1.5"}, {"long<er", "10"}}};
  EXPECT_EQ(table.to_text(), "name      µs\n------------\na        1.5\nlong<er   10\n");
  EXPECT_NE(table.to_html().find("long&lt;er"), std::string::npos);
  EXPECT_THROW((Table{{"a"}, {{"1", "2"}}}.to_text()), Error);
}

}  // namespace
}  // namespace spot
