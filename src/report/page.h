// A self-contained HTML report, and tables for the terminal.
#pragma once

#include <string>
#include <vector>

#include "report/chart.h"

namespace spot {

struct Table {
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;  // each as long as header

  // Columns aligned by spaces; the first is left-aligned, the rest right-aligned.
  std::string to_text() const;
  std::string to_html() const;
};

// One HTML file without scripts or outside references; charts are inline SVG.
class Page {
 public:
  explicit Page(std::string title) : title_(std::move(title)) {}
  void heading(const std::string& text);
  void paragraph(const std::string& text);
  void preformatted(const std::string& text);
  void add(const Table& table) { body_ += table.to_html(); }
  template <typename Chart>
  void chart(const Chart& chart) {
    body_ += "<figure>" + to_svg(chart) + "</figure>\n";
  }
  std::string html() const;

 private:
  std::string title_, body_;
};

}  // namespace spot
