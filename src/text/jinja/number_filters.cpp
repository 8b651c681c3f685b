// Filters that make numbers.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "text/jinja/filters.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

// The text without underscores between digits; nothing if they stand elsewhere.
std::optional<std::string> without_underscores(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
      continue;
    }
    const auto is_digit_at = [&](size_t at) {
      return at < text.size() && std::isalnum(static_cast<unsigned char>(text[at]));
    };
    if (i == 0 || !is_digit_at(i - 1) || !is_digit_at(i + 1)) return std::nullopt;
  }
  return out;
}

void refuse_foreign_digits(const std::string& what, std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (c >= 0x80 && is_decimal(c)) fault("{}: digits other than 0 to 9 are not supported", what);
  }
}

// int(text, base) of Python; nothing where it raises ValueError.
std::optional<int64_t> parse_integer(const std::string& what, std::string_view text, int64_t base) {
  if (base != 0 && (base < 2 || base > 36)) return std::nullopt;
  text = strip(text);
  refuse_foreign_digits(what, text);
  const bool negative = text.starts_with("-");
  if (negative || text.starts_with("+")) text.remove_prefix(1);
  const auto prefixed = [&](char letter, int64_t own) {
    if (text.size() < 2 || text[0] != '0' || (text[1] | 32) != letter || (base != 0 && base != own))
      return false;
    text.remove_prefix(text.size() > 2 && text[2] == '_' ? 3 : 2);
    base = own;
    return true;
  };
  const bool any_prefix = prefixed('x', 16) || prefixed('o', 8) || prefixed('b', 2);
  if (base == 0) {
    base = 10;
    if (!any_prefix && text.starts_with("0") && text.find_first_not_of("0_") != std::string_view::npos)
      return std::nullopt;
  }
  const auto digits = without_underscores(text);
  if (!digits || digits->empty()) return std::nullopt;
  uint64_t magnitude = 0;
  const auto parsed =
      std::from_chars(digits->data(), digits->data() + digits->size(), magnitude, static_cast<int>(base));
  if (parsed.ptr != digits->data() + digits->size()) return std::nullopt;
  if (parsed.ec == std::errc::result_out_of_range || magnitude > INT64_MAX)
    fault("{}: an integer beyond 64 bits is not supported", what);
  return negative ? -static_cast<int64_t>(magnitude) : static_cast<int64_t>(magnitude);
}

// float(text) of Python.
std::optional<double> parse_float(const std::string& what, std::string_view text) {
  text = strip(text);
  refuse_foreign_digits(what, text);
  const auto plain = without_underscores(text);
  if (!plain || plain->empty()) return std::nullopt;
  std::string lower = to_lower(*plain);
  const std::string_view unsigned_part =
      std::string_view(lower).substr(lower[0] == '-' || lower[0] == '+' ? 1 : 0);
  const bool is_word = unsigned_part == "inf" || unsigned_part == "infinity" || unsigned_part == "nan";
  if (!is_word && lower.find_first_not_of("0123456789+-.e") != std::string::npos) return std::nullopt;
  if (text.find('_') != std::string_view::npos && is_word) return std::nullopt;
  char* end = nullptr;
  const double value = std::strtod(lower.c_str(), &end);
  if (end != lower.c_str() + lower.size()) return std::nullopt;
  return value;
}

Value truncated(const std::string& what, double value) {
  if (std::fabs(value) >= 0x1p63) fault("{}: an integer beyond 64 bits is not supported", what);
  return Value::integer(static_cast<int64_t>(value));
}

Value int_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"default", "base"}, 0);
  const Value otherwise = bound[0].is_missing() ? Value::integer(0) : bound[0];
  require_defined(value);
  if (value.is_integral()) return Value::integer(value.as_int());
  if (value.is(Type::kFloat)) {
    if (std::isinf(value.as_double())) fault("{}: cannot convert float infinity to integer", what);
    return std::isnan(value.as_double()) ? otherwise : truncated(what, value.as_double());
  }
  if (!value.is_string()) return otherwise;
  const int64_t base = bound[1].is_missing() ? 10 : as_index(what, bound[1]);
  if (const auto integer = parse_integer(what, value.text(), base)) return Value::integer(*integer);
  const auto number = parse_float(what, value.text());
  return number && std::isfinite(*number) ? truncated(what, *number) : otherwise;
}

Value float_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"default"}, 0);
  const Value otherwise = bound[0].is_missing() ? Value::real(0) : bound[0];
  require_defined(value);
  if (value.is_number()) return Value::real(value.as_double());
  if (!value.is_string()) return otherwise;
  const auto number = parse_float(what, value.text());
  return number ? Value::real(*number) : otherwise;
}

Value abs_filter(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  require_defined(value);
  if (value.is(Type::kFloat)) return Value::real(std::fabs(value.as_double()));
  if (!value.is_integral()) fault("{}: bad operand type '{}'", what, value.type_name());
  return value.as_int() < 0 ? negate(value) : Value::integer(value.as_int());
}

Value round_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"precision", "method"}, 0);
  const std::string method = bound[1].is_missing() ? "common" : bound[1].is_string() ? bound[1].text() : "";
  if (method != "common" && method != "ceil" && method != "floor")
    fault("{}: method must be common, ceil or floor", what);
  require_defined(value);
  if (!value.is_number()) fault("{}: '{}' is not a number", what, value.type_name());
  if (bound[0].is_none()) fault("{} without a precision is not supported", what);
  const int64_t precision = bound[0].is_missing() ? 0 : as_index(what, bound[0]);
  if (precision < 0 || precision > 300) fault("{}: a precision of {} is not supported", what, precision);
  if (method != "common") {
    const double power = std::pow(10.0, static_cast<double>(precision));
    if (precision > 15) fault("{}: a precision of {} is not supported", what, precision);
    const double scaled = value.as_double() * power;
    if (!(std::fabs(scaled) < 0x1p53)) fault("{}: a number of this size is not supported", what);
    const double whole = method == "ceil" ? std::ceil(scaled) : std::floor(scaled);
    return Value::real((whole == 0 ? 0.0 : whole) / power);
  }
  if (value.is_integral()) return Value::integer(value.as_int());
  if (!std::isfinite(value.as_double())) return value;
  char buffer[700];
  std::snprintf(buffer, sizeof buffer, "%.*f", static_cast<int>(precision), value.as_double());
  return Value::real(std::strtod(buffer, nullptr));
}

}  // namespace

Filter find_number_filter(std::string_view name) {
  if (name == "int") return int_filter;
  if (name == "float") return float_filter;
  if (name == "abs") return abs_filter;
  if (name == "round") return round_filter;
  return nullptr;
}

}  // namespace spot::jinja
