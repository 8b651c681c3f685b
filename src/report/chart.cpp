#include "report/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/error.h"

namespace spot {
namespace {

constexpr double kWidth = 720, kHeight = 340, kLeft = 64, kRight = 16, kTop = 34, kBottom = 46;
// Eight hues that differ in lightness too (Okabe-Ito), for readers who do not tell red from green.
constexpr std::array<const char*, 8> kColours = {"#0072b2", "#d55e00", "#009e73", "#cc79a7",
                                                 "#8a6d00", "#56b4e9", "#7a4fbf", "#555555"};
const char* colour(size_t i) {
  return kColours[i % kColours.size()];
}

// Round numbers (1, 2, 2.5 or 5 times a power of ten) spanning lo..hi in about five steps.
std::vector<double> round_ticks(double lo, double hi) {
  const double raw = (hi - lo) / 5, magnitude = std::pow(10, std::floor(std::log10(raw)));
  double step = 10 * magnitude;
  for (double m : {1.0, 2.0, 2.5, 5.0})
    if (m * magnitude >= raw) {
      step = m * magnitude;
      break;
    }
  std::vector<double> ticks;
  for (double t = std::ceil(lo / step - 1e-9) * step; t <= hi + 1e-9 * step; t += step)
    ticks.push_back(std::abs(t) < 1e-9 * step ? 0 : t);
  return ticks;
}

std::string tick_text(double v, bool powers_of_two) {
  if (powers_of_two && v >= 1024 && std::fmod(v, 1024) == 0) return fmt::format("{:g}K", v / 1024);
  return std::abs(v) >= 1e6 ? fmt::format("{:g}M", v / 1e6) : fmt::format("{:g}", v);
}

// One axis: data range, ticks, and the map to 0..1.
struct Axis {
  double lo, hi;
  bool logarithmic;
  std::vector<double> ticks;

  Axis(double lo_, double hi_, bool log_, double base) : lo(lo_), hi(hi_), logarithmic(log_) {
    if (!(lo <= hi)) lo = 0, hi = 1;  // no finite point at all
    if (logarithmic) {
      if (lo <= 0) fail("chart: a logarithmic axis has the value {}; only positive ones fit", lo);
      if (lo == hi) lo /= base, hi *= base;
      for (double t = std::pow(base, std::ceil(std::log(lo) / std::log(base) - 1e-9)); t <= hi * (1 + 1e-9);
           t *= base)
        ticks.push_back(t);
      if (ticks.size() < 2) ticks = {lo, hi};
    } else {
      if (lo == hi) lo -= 0.5, hi += 0.5;
      ticks = round_ticks(lo, hi);
    }
  }
  double share(double v) const {
    return logarithmic ? std::log(v / lo) / std::log(hi / lo) : (v - lo) / (hi - lo);
  }
};

double x_of(double share) {
  return kLeft + share * (kWidth - kLeft - kRight);
}
double y_of(double share) {
  return kHeight - kBottom - share * (kHeight - kTop - kBottom);
}

std::string text_at(double x, double y, const std::string& anchor, const std::string& text,
                    const char* extra = "") {
  return fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='{}'{}>{}</text>\n", x, y, anchor, extra,
                     escape_html(text));
}

// Width of a text in the charts' font, about.
double text_width(const std::string& text) {
  return 6.6 * static_cast<double>(text.size());
}
double widest(const std::vector<std::string>& texts) {
  double width = 0;
  for (const std::string& text : texts) width = std::max(width, text_width(text));
  return width;
}

std::string open_svg(const std::string& title, double height) {
  return fmt::format(
             "<svg viewBox='0 0 {} {}' role='img' aria-label='{}' font-family='sans-serif' font-size='12' "
             "fill='currentColor'>\n",
             kWidth, height, escape_html(title)) +
         text_at(kWidth / 2, 18, "middle", title, " font-size='14' font-weight='bold'");
}

std::string y_axis(const Axis& axis, const std::string& label) {
  std::string svg;
  for (double t : axis.ticks) {
    const double y = y_of(axis.share(t));
    svg += fmt::format(
        "<line x1='{}' y1='{:.1f}' x2='{}' y2='{:.1f}' stroke='currentColor' stroke-opacity='.15'/>\n", kLeft,
        y, kWidth - kRight, y);
    svg += text_at(kLeft - 6, y + 4, "end", tick_text(t, false));
  }
  svg += fmt::format("<text transform='translate(14 {}) rotate(-90)' text-anchor='middle'>{}</text>\n",
                     (kTop + kHeight - kBottom) / 2, escape_html(label));
  return svg;
}

// What each line or bar is, below the axis, in as many lines as the names need; and where it ends.
struct Legend {
  std::string svg;
  double bottom;
};
Legend legend(const std::vector<std::string>& names, const std::vector<bool>& dashed) {
  Legend made{"", kHeight};
  double x = kLeft, y = kHeight - 6;
  for (size_t i = 0; i < names.size(); ++i) {
    const double width = 40 + text_width(names[i]);
    if (x > kLeft && x + width > kWidth) x = kLeft, y += 16;
    made.svg += fmt::format(
        "<line x1='{:.1f}' y1='{:.1f}' x2='{:.1f}' y2='{:.1f}' stroke='{}' stroke-width='3'{}/>\n", x, y - 4,
        x + 18, y - 4, colour(i), dashed[i] ? " stroke-dasharray='4 3'" : "");
    made.svg += text_at(x + 23, y, "start", names[i]);
    x += width;
  }
  made.bottom = y + 6;
  return made;
}

}  // namespace

std::string escape_html(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string to_svg(const LineChart& chart) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  double x_lo = inf, x_hi = -inf, y_lo = chart.y_from_zero ? 0 : inf, y_hi = -inf;
  for (const Series& s : chart.series) {
    if (s.x.size() != s.y.size())
      fail("chart '{}': series '{}' has {} x and {} y values", chart.title, s.name, s.x.size(), s.y.size());
    for (size_t i = 0; i < s.x.size(); ++i) {
      if (!std::isfinite(s.y[i])) continue;
      x_lo = std::min(x_lo, s.x[i]), x_hi = std::max(x_hi, s.x[i]);
      y_lo = std::min(y_lo, s.y[i]), y_hi = std::max(y_hi, s.y[i]);
    }
  }
  const Axis x(x_lo, x_hi, chart.log_x, 2), y(y_lo, y_hi, chart.log_y, 10);
  std::string svg = y_axis(y, chart.y_label);
  for (double t : x.ticks)
    svg += text_at(x_of(x.share(t)), kHeight - kBottom + 15, "middle", tick_text(t, chart.log_x));
  svg += text_at(kWidth - kRight, kHeight - kBottom + 30, "end", chart.x_label);
  std::vector<std::string> names;
  std::vector<bool> dashed;
  for (size_t i = 0; i < chart.series.size(); ++i) {
    const Series& s = chart.series[i];
    names.push_back(s.name), dashed.push_back(s.dashed);
    std::string points;
    size_t shown = 0;
    for (size_t j = 0; j < s.x.size(); ++j)
      if (std::isfinite(s.y[j]))
        points += fmt::format("{:.1f},{:.1f} ", x_of(x.share(s.x[j])), y_of(y.share(s.y[j]))), ++shown;
    svg += fmt::format("<polyline points='{}' fill='none' stroke='{}' stroke-width='2'{}/>\n", points,
                       colour(i), s.dashed ? " stroke-dasharray='5 4'" : "");
    if (shown > 40) continue;  // dots on a dense curve only blur it
    for (size_t j = 0; j < s.x.size(); ++j)
      if (std::isfinite(s.y[j]))
        svg += fmt::format(
            "<circle cx='{:.1f}' cy='{:.1f}' r='3' fill='{}'><title>{}: {:g}, {:g}</title></circle>\n",
            x_of(x.share(s.x[j])), y_of(y.share(s.y[j])), colour(i), escape_html(s.name), s.x[j], s.y[j]);
  }
  const Legend key = legend(names, dashed);
  return open_svg(chart.title, key.bottom) + svg + key.svg + "</svg>\n";
}

std::string to_svg(const BarChart& chart) {
  double hi = 0;
  if (chart.values.size() != chart.names.size())
    fail("chart '{}': {} names and {} rows of values", chart.title, chart.names.size(), chart.values.size());
  for (const auto& row : chart.values) {
    if (row.size() != chart.groups.size())
      fail("chart '{}': {} groups and {} values", chart.title, chart.groups.size(), row.size());
    for (double v : row)
      if (std::isfinite(v)) hi = std::max(hi, v);
  }
  const Axis y(0, hi > 0 ? hi : 1, false, 10);
  std::string svg = y_axis(y, chart.y_label);
  const double group_width = 1.0 / static_cast<double>(std::max<size_t>(chart.groups.size(), 1));
  const double bar_width = 0.8 * group_width / static_cast<double>(std::max<size_t>(chart.names.size(), 1));
  for (size_t g = 0; g < chart.groups.size(); ++g) {
    const double start = static_cast<double>(g) * group_width;
    svg += text_at(x_of(start + group_width / 2), kHeight - kBottom + 15, "middle", chart.groups[g]);
    for (size_t n = 0; n < chart.names.size(); ++n) {
      const double v = chart.values[n][g];
      if (!std::isfinite(v)) continue;
      const double left = x_of(start + 0.1 * group_width + static_cast<double>(n) * bar_width),
                   top = y_of(y.share(v));
      svg += fmt::format(
          "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' fill='{}'><title>{}, {}: {:g}</title></rect>\n",
          left, top, bar_width * (kWidth - kLeft - kRight) * 0.94, y_of(0) - top, colour(n),
          escape_html(chart.names[n]), escape_html(chart.groups[g]), v);
    }
  }
  const Legend key = legend(chart.names, std::vector<bool>(chart.names.size(), false));
  return open_svg(chart.title, key.bottom) + svg + key.svg + "</svg>\n";
}

std::string to_svg(const HeatMap& map) {
  if (map.values.size() != map.rows.size())
    fail("heat map '{}': {} rows, {} given", map.title, map.rows.size(), map.values.size());
  const double left = 30 + std::max(kLeft, widest(map.rows));
  const double cell_height = 24, cell_width = (kWidth - left - kRight) /
                                              static_cast<double>(std::max<size_t>(map.columns.size(), 1));
  // Column names that are wider than a cell are written upright.
  const bool upright = widest(map.columns) > cell_width;
  const double below = kBottom + (upright ? widest(map.columns) : 0);
  const double height = kTop + below + cell_height * static_cast<double>(map.rows.size());
  std::string svg = open_svg(map.title, height);
  for (size_t r = 0; r < map.rows.size(); ++r) {
    if (map.values[r].size() != map.columns.size())
      fail("heat map '{}': row '{}' has {} of {} values", map.title, map.rows[r], map.values[r].size(),
           map.columns.size());
    const double top = kTop + cell_height * static_cast<double>(r);
    svg += text_at(left - 6, top + 16, "end", map.rows[r]);
    for (size_t c = 0; c < map.columns.size(); ++c) {
      const double v = map.values[r][c], x = left + cell_width * static_cast<double>(c);
      if (!std::isfinite(v)) continue;
      const double share = std::clamp((v - map.low) / (map.high - map.low), 0.0, 1.0);
      // White to blue; the number's colour flips where it would be unreadable.
      svg += fmt::format(
          "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' fill='rgb({:.0f},{:.0f},{:.0f})'/>\n",
          x, top, cell_width - 1, cell_height - 1, 245 - 215 * share, 245 - 160 * share, 250 - 90 * share);
      svg += text_at(x + cell_width / 2, top + 16, "middle", fmt::format("{:.3g}", v),
                     share > 0.5 ? " fill='#fff'" : " fill='#111'");
    }
  }
  const double axis = kTop + cell_height * static_cast<double>(map.rows.size());
  for (size_t c = 0; c < map.columns.size(); ++c) {
    const double x = left + cell_width * (static_cast<double>(c) + 0.5);
    if (upright)
      svg +=
          fmt::format("<text transform='translate({:.1f} {:.1f}) rotate(-90)' text-anchor='end'>{}</text>\n",
                      x + 4, axis + 6, escape_html(map.columns[c]));
    else
      svg += text_at(x, axis + 16, "middle", map.columns[c]);
  }
  svg += text_at(kWidth - kRight, height - 12, "end", map.x_label);
  svg += fmt::format("<text transform='translate(14 {}) rotate(-90)' text-anchor='middle'>{}</text>\n",
                     (kTop + axis) / 2, escape_html(map.y_label));
  return svg + "</svg>\n";
}

}  // namespace spot
