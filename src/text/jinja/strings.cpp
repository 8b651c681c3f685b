#include "text/jinja/strings.h"

#include <utf8proc.h>

#include <algorithm>

#include "text/jinja/limits.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

// Whether a line ends at text[i]; how many bytes its end has.
size_t line_end(std::string_view text, size_t i) {
  size_t next = i;
  const char32_t c = next_code_point(text, next);
  if (c == '\r') return next < text.size() && text[next] == '\n' ? 2 : 1;
  const bool ends =
      (c >= 0x0A && c <= 0x0C) || (c >= 0x1C && c <= 0x1E) || c == 0x85 || c == 0x2028 || c == 0x2029;
  return ends ? next - i : 0;
}

template <typename Predicate>
std::string_view strip_where(std::string_view text, bool left, bool right, Predicate stripped) {
  while (left && !text.empty()) {
    size_t after = 0;
    if (!stripped(next_code_point(text, after))) break;
    text.remove_prefix(after);
  }
  while (right && !text.empty()) {
    const size_t before = previous_offset(text, text.size());
    size_t i = before;
    if (!stripped(next_code_point(text, i))) break;
    text = text.substr(0, before);
  }
  return text;
}

void check_size(double bytes) {
  if (bytes > static_cast<double>(kMaxStringBytes))
    fault("a text of more than {} MiB", kMaxStringBytes >> 20);
}

}  // namespace

int64_t count_code_points(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

size_t byte_offset(std::string_view text, int64_t index) {
  size_t at = 0;
  for (; index > 0 && at < text.size(); --index) next_code_point(text, at);
  return at;
}

std::string_view strip(std::string_view text, bool left, bool right) {
  return strip_where(text, left, right, is_python_space);
}

std::string_view strip_characters(std::string_view text, std::string_view characters, bool left, bool right) {
  std::u32string set;
  for (size_t i = 0; i < characters.size();) set += next_code_point(characters, i);
  return strip_where(text, left, right, [&](char32_t c) { return set.find(c) != std::u32string::npos; });
}

std::vector<std::string_view> split(std::string_view text, std::string_view separator, int64_t most,
                                    bool from_right) {
  std::vector<std::string_view> parts;
  if (from_right) {
    while (most != 0) {
      const size_t at = text.rfind(separator);
      if (at == std::string_view::npos) break;
      spend(1);
      parts.push_back(text.substr(at + separator.size()));
      text = text.substr(0, at), --most;
    }
    parts.push_back(text);
    std::reverse(parts.begin(), parts.end());
    return parts;
  }
  while (most != 0) {
    const size_t at = text.find(separator);
    if (at == std::string_view::npos) break;
    spend(1);
    parts.push_back(text.substr(0, at));
    text.remove_prefix(at + separator.size()), --most;
  }
  parts.push_back(text);
  return parts;
}

std::vector<std::string_view> split_space(std::string_view text, int64_t most, bool from_right) {
  std::vector<std::string_view> parts;
  text = strip(text, !from_right, from_right);
  while (!text.empty()) {
    spend(1);
    if (most == 0) {
      parts.push_back(text);
      break;
    }
    size_t cut = from_right ? text.size() : 0;
    if (from_right) {
      while (cut > 0) {
        const size_t before = previous_offset(text, cut);
        size_t i = before;
        if (is_python_space(next_code_point(text, i))) break;
        cut = before;
      }
      parts.push_back(text.substr(cut));
      text = strip(text.substr(0, cut), false, true);
    } else {
      while (cut < text.size()) {
        size_t after = cut;
        if (is_python_space(next_code_point(text, after))) break;
        cut = after;
      }
      parts.push_back(text.substr(0, cut));
      text = strip(text.substr(cut), true, false);
    }
    --most;
  }
  if (from_right) std::reverse(parts.begin(), parts.end());
  return parts;
}

std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t i = 0; i < text.size();) {
    const size_t end = line_end(text, i);
    if (end == 0) {
      next_code_point(text, i);
      continue;
    }
    spend(1);
    lines.push_back(text.substr(begin, i - begin + (keep_ends ? end : 0)));
    begin = i += end;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string replace(std::string_view text, std::string_view part, std::string_view with, int64_t most) {
  std::string out;
  if (part.empty()) {  // before every character and at the end
    check_size(static_cast<double>(text.size()) +
               static_cast<double>(with.size()) * (static_cast<double>(text.size()) + 1));
    for (size_t i = 0; i <= text.size();) {
      if (most != 0) out += with, --most;
      if (i == text.size()) break;
      const size_t begin = i;
      next_code_point(text, i);
      out += text.substr(begin, i - begin);
    }
    return out;
  }
  while (most != 0) {
    const size_t at = text.find(part);
    if (at == std::string_view::npos) break;
    spend(1);
    out += text.substr(0, at), out += with;
    check_size(static_cast<double>(out.size()));
    text.remove_prefix(at + part.size()), --most;
  }
  return out += text;
}

std::string pad(std::string_view text, int64_t width, std::string_view fill, bool on_the_left) {
  const int64_t missing = width - count_code_points(text);
  if (missing <= 0) return std::string(text);
  check_size(static_cast<double>(missing) * static_cast<double>(fill.size()));
  std::string padding;
  for (int64_t i = 0; i < missing; ++i) padding += fill;
  return on_the_left ? padding + std::string(text) : std::string(text) + padding;
}

std::string center(std::string_view text, int64_t width, std::string_view fill) {
  const int64_t length = count_code_points(text), missing = width - length;
  if (missing <= 0) return std::string(text);
  const int64_t left = missing / 2 + (missing & width & 1);
  return pad(pad(text, length + left, fill, true), width, fill, false);
}

bool is_all_lower(std::string_view text) {
  bool any = false;
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (is_upper(c) || is_title(c)) return false;
    any = any || is_lower(c);
  }
  return any;
}

bool is_all_upper(std::string_view text) {
  bool any = false;
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (is_lower(c) || is_title(c)) return false;
    any = any || is_upper(c);
  }
  return any;
}

bool is_other_number(char32_t c) {
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO;
}

}  // namespace spot::jinja
