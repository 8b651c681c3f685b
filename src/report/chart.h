// Charts as SVG text: line charts, grouped bars and heat maps, readable in light and dark browsers.
#pragma once

#include <string>
#include <vector>

namespace spot {

struct Series {
  std::string name;
  std::vector<double> x, y;  // same length; points with a non-finite y are left out
  bool dashed = false;
};

struct LineChart {
  std::string title, x_label, y_label;
  std::vector<Series> series;
  bool log_x = false, log_y = false;  // base 2 ticks on x, base 10 on y; values must be positive
  bool y_from_zero = false;
};

struct BarChart {
  std::string title, y_label;
  std::vector<std::string> groups;          // along x
  std::vector<std::string> names;           // one bar a group each
  std::vector<std::vector<double>> values;  // [names][groups]
};

struct HeatMap {
  std::string title, x_label, y_label;
  std::vector<std::string> columns, rows;
  std::vector<std::vector<double>> values;  // [rows][columns], in low..high
  double low = 0.0, high = 1.0;
};

// Throws Error when lengths disagree.
std::string to_svg(const LineChart& chart);
std::string to_svg(const BarChart& chart);
std::string to_svg(const HeatMap& map);

// Text with &, <, > and quotes escaped for HTML and SVG.
std::string escape_html(const std::string& text);

}  // namespace spot
