#include "report/page.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"

namespace spot {
namespace {

// Columns a terminal needs for UTF-8 text without wide characters: its code points.
size_t display_width(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

void check_widths(const Table& table) {
  for (const auto& row : table.rows)
    if (row.size() != table.header.size())
      fail("table: a row has {} cells and the header {}", row.size(), table.header.size());
}

}  // namespace

std::string Table::to_text() const {
  check_widths(*this);
  std::vector<size_t> widths;
  for (const auto& cell : header) widths.push_back(display_width(cell));
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], display_width(row[c]));
  auto line = [&](const std::vector<std::string>& cells) {
    std::string text;
    for (size_t c = 0; c < cells.size(); ++c) {
      const std::string padding(widths[c] - display_width(cells[c]), ' ');
      text += (c ? "  " : "") + (c ? padding + cells[c] : cells[c] + padding);
    }
    return text + "\n";
  };
  std::string text = line(header);
  size_t total = 0;
  for (size_t w : widths) total += w + 2;
  text += std::string(total - 2, '-') + "\n";
  for (const auto& row : rows) text += line(row);
  return text;
}

std::string Table::to_html() const {
  check_widths(*this);
  auto cells = [](const std::vector<std::string>& row, const char* tag) {
    std::string html = "<tr>";
    for (const auto& cell : row) html += fmt::format("<{0}>{1}</{0}>", tag, escape_html(cell));
    return html + "</tr>\n";
  };
  std::string html = "<table>\n" + cells(header, "th");
  for (const auto& row : rows) html += cells(row, "td");
  return html + "</table>\n";
}

void Page::heading(const std::string& text) {
  body_ += "<h2>" + escape_html(text) + "</h2>\n";
}
void Page::paragraph(const std::string& text) {
  body_ += "<p>" + escape_html(text) + "</p>\n";
}
void Page::preformatted(const std::string& text) {
  body_ += "<pre>" + escape_html(text) + "</pre>\n";
}

std::string Page::html() const {
  return fmt::format(R"(<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{0}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 sans-serif; max-width: 880px; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2em .8em; text-align: right; border-bottom: 1px solid #8884 }}
td:first-child, th:first-child {{ text-align: left }}
figure {{ margin: 1.5em 0 }} pre {{ overflow-x: auto; background: #8881; padding: .6em }}
</style></head><body>
<h1>{0}</h1>
{1}</body></html>
)",
                     escape_html(title_), body_);
}

}  // namespace spot
