#include "text/unicode_case.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>

#include "text/unicode.h"
#include "text/unicode_case_tables.h"

namespace spot {
namespace {

constexpr char32_t kCapitalSigma = 0x3A3, kSmallSigma = 0x3C3, kFinalSigma = 0x3C2, kDottedI = 0x130;

utf8proc_category_t category(char32_t c) {
  return utf8proc_category(static_cast<utf8proc_int32_t>(c));
}

template <size_t n>
bool within(const CodePointRange (&ranges)[n], char32_t c) {
  const auto* at = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                    [](char32_t value, const CodePointRange& r) { return value < r.first; });
  return at != std::begin(ranges) && c <= std::prev(at)->last;
}

template <size_t n>
bool append_special(std::string& out, const SpecialCase (&table)[n], char32_t c) {
  const auto* at = std::lower_bound(std::begin(table), std::end(table), c,
                                    [](const SpecialCase& s, char32_t value) { return s.from < value; });
  if (at == std::end(table) || at->from != c) return false;
  for (char32_t part : at->to)
    if (part) append_utf8(out, part);
  return true;
}

void append_upper(std::string& out, char32_t c) {
  if (!append_special(out, kSpecialUpper, c))
    append_utf8(out, static_cast<char32_t>(utf8proc_toupper(static_cast<utf8proc_int32_t>(c))));
}

void append_title(std::string& out, char32_t c) {
  if (!append_special(out, kSpecialTitle, c))
    append_utf8(out, static_cast<char32_t>(utf8proc_totitle(static_cast<utf8proc_int32_t>(c))));
}

bool is_cased(char32_t c) {
  return is_lower(c) || is_upper(c) || is_title(c);
}

// Unicode property Case_Ignorable.
bool is_case_ignorable(char32_t c) {
  constexpr char32_t kMiddle[] = {0x27,   0x2E,   0x3A,   0x5E,   0x60,   0xA8,   0xAD,   0xAF,
                                  0xB4,   0xB7,   0xB8,   0x387,  0x55F,  0x5F4,  0x2018, 0x2019,
                                  0x2024, 0x2027, 0xFE13, 0xFE52, 0xFE55, 0xFF07, 0xFF0E, 0xFF1A};
  switch (category(c)) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_SK:
      return true;
    default:
      return std::find(std::begin(kMiddle), std::end(kMiddle), c) != std::end(kMiddle);
  }
}

// Whether a capital sigma at [begin, end) ends its word: a cased letter before it and none after it, case-ignorable
// characters aside.
bool is_final_sigma(std::string_view text, size_t begin, size_t end) {
  bool before = false;
  for (size_t at = begin; at > 0;) {
    at = previous_offset(text, at);
    size_t next = at;
    const char32_t c = next_code_point(text, next);
    if (is_case_ignorable(c)) continue;
    before = is_cased(c);
    break;
  }
  if (!before) return false;
  for (size_t at = end; at < text.size();) {
    const char32_t c = next_code_point(text, at);
    if (!is_case_ignorable(c)) return !is_cased(c);
  }
  return true;
}

void append_lower(std::string& out, std::string_view text, size_t begin, size_t end, char32_t c) {
  if (c == kCapitalSigma) {
    append_utf8(out, is_final_sigma(text, begin, end) ? kFinalSigma : kSmallSigma);
  } else if (c == kDottedI) {
    append_utf8(out, 'i');
    append_utf8(out, 0x307);
  } else {
    append_utf8(out, static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
  }
}

// Calls visit(c, begin, end) for every code point.
template <typename Visit>
void each(std::string_view text, Visit visit) {
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    visit(c, begin, i);
  }
}

}  // namespace

bool is_lower(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LL || within(kOtherLowercase, c);
}
bool is_upper(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LU || within(kOtherUppercase, c);
}
bool is_title(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_LT;
}
bool is_decimal(char32_t c) {
  return category(c) == UTF8PROC_CATEGORY_ND;
}
bool is_digit(char32_t c) {
  return is_decimal(c) || within(kOtherDigits, c);
}
bool is_python_space(char32_t c) {
  return is_white_space(c) || (c >= 0x1C && c <= 0x1F);
}

bool is_letter(char32_t c) {
  switch (category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
      return true;
    default:
      return false;
  }
}

std::string to_upper(std::string_view text) {
  std::string out;
  each(text, [&](char32_t c, size_t, size_t) { append_upper(out, c); });
  return out;
}

std::string to_lower(std::string_view text) {
  std::string out;
  each(text, [&](char32_t c, size_t begin, size_t end) { append_lower(out, text, begin, end, c); });
  return out;
}

std::string to_title(std::string_view text) {
  std::string out;
  bool inside = false;
  each(text, [&](char32_t c, size_t begin, size_t end) {
    if (inside) {
      append_lower(out, text, begin, end, c);
    } else {
      append_title(out, c);
    }
    inside = is_cased(c);
  });
  return out;
}

std::string to_capitalized(std::string_view text) {
  std::string out;
  each(text, [&](char32_t c, size_t begin, size_t end) {
    if (begin == 0) {
      append_title(out, c);
    } else {
      append_lower(out, text, begin, end, c);
    }
  });
  return out;
}

std::string swap_case(std::string_view text) {
  std::string out;
  each(text, [&](char32_t c, size_t begin, size_t end) {
    if (is_upper(c)) {
      append_lower(out, text, begin, end, c);
    } else if (is_lower(c)) {
      append_upper(out, c);
    } else {
      append_utf8(out, c);
    }
  });
  return out;
}

}  // namespace spot
