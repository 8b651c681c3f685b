// Python's two kinds of format strings: % and str.format.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "text/jinja/format.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

constexpr int64_t kMaxField = 100'000;  // width and precision

// How one value is written: the parts that % and str.format have in common.
struct Field {
  std::string fill = " ";
  char align = 0;  // < > ^ =, or 0 for the type's own
  char sign = 0;   // + or space, or 0
  char type = 0;
  char grouping = 0;  // , or _
  bool alternate = false;
  int64_t width = 0, precision = -1;
};

std::string grouped(const std::string& digits, char separator) {
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i && (digits.size() - i) % 3 == 0) out += separator;
    out += digits[i];
  }
  return out;
}

std::string aligned(const Field& field, const std::string& prefix, const std::string& body, char otherwise) {
  const char align = field.align ? field.align : otherwise;
  if (align == '=') {
    return prefix + pad(body, field.width - count_code_points(prefix), field.fill, true);
  }
  const std::string text = prefix + body;
  if (align == '<') return pad(text, field.width, field.fill, false);
  if (align == '>') return pad(text, field.width, field.fill, true);
  const int64_t missing = std::max<int64_t>(field.width - count_code_points(text), 0);
  return pad(pad(text, count_code_points(text) + missing / 2, field.fill, true), field.width, field.fill,
             false);
}

std::string sign_of(const Field& field, bool negative) {
  return negative ? "-" : field.sign ? std::string(1, field.sign) : "";
}

std::string write_integer(const Field& field, int64_t value) {
  const uint64_t magnitude = value < 0 ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  std::string prefix = sign_of(field, value < 0), digits;
  switch (field.type) {
    case 'x':
      digits = fmt::format("{:x}", magnitude);
      break;
    case 'X':
      digits = fmt::format("{:X}", magnitude);
      break;
    case 'o':
      digits = fmt::format("{:o}", magnitude);
      break;
    case 'b':
      digits = fmt::format("{:b}", magnitude);
      break;
    default:
      digits = std::to_string(magnitude);
  }
  if (field.alternate && std::string_view("xXob").find(field.type) != std::string_view::npos && field.type)
    prefix += std::string("0") + field.type;
  if (field.precision > static_cast<int64_t>(digits.size())) digits = pad(digits, field.precision, "0", true);
  if (field.grouping) {
    if (field.fill == "0") fault("format: grouping with zero padding is not supported");
    if (field.type && field.type != 'd')
      fault("format: grouping of other than decimal digits is not supported");
    digits = grouped(digits, field.grouping);
  }
  return aligned(field, prefix, digits, '>');
}

std::string write_float(const Field& field, double value) {
  const bool negative = std::signbit(value) && !std::isnan(value);
  std::string digits;
  if (field.type == 0 && field.precision < 0) {
    digits = float_repr(std::fabs(value));
  } else if (field.type == 0) {
    fault("format: a precision without a type is not supported for floats");
  } else {
    const bool percent = field.type == '%';
    const char pattern[] = {'%', field.alternate ? '#' : '0', '.', '*', percent ? 'f' : field.type, 0};
    const int precision = static_cast<int>(field.precision < 0 ? 6 : field.precision);
    const double magnitude = std::fabs(value) * (percent ? 100 : 1);
    const int size = std::snprintf(nullptr, 0, pattern, precision, magnitude);
    digits.resize(static_cast<size_t>(size) + 1);
    std::snprintf(digits.data(), digits.size(), pattern, precision, magnitude);
    digits.pop_back();
    if (percent) digits += '%';
  }
  if (field.grouping) {
    if (field.fill == "0") fault("format: grouping with zero padding is not supported");
    const size_t point = std::min(digits.find_first_not_of("0123456789"), digits.size());
    digits = grouped(digits.substr(0, point), field.grouping) + digits.substr(point);
  }
  return aligned(field, sign_of(field, negative), digits, '>');
}

std::string write_text(const Field& field, const std::string& text) {
  if (field.precision < 0) return aligned(field, "", text, '<');
  return aligned(field, "", text.substr(0, byte_offset(text, field.precision)), '<');
}

int64_t number_at(const std::string& text, size_t& i) {
  int64_t number = 0;
  while (i < text.size() && text[i] >= '0' && text[i] <= '9') {
    number = number * 10 + (text[i++] - '0');
    if (number > kMaxField) fault("format: a width or precision beyond {}", kMaxField);
  }
  return number;
}

// --- % ---

class PercentFormatter {
 public:
  PercentFormatter(const std::string& text, const Value& arguments) : text_(text), arguments_(arguments) {}

  std::string run() {
    std::string out;
    for (size_t i = 0; i < text_.size();) {
      if (text_[i] != '%') {
        out += text_[i++];
        continue;
      }
      ++i;
      out += conversion(i);
      if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
        fault("operator %: a text of more than {} MiB", kMaxStringBytes >> 20);
    }
    const bool is_mapping = arguments_.is(Type::kDict) || arguments_.is(Type::kList) ||
                            arguments_.is(Type::kRange) || arguments_.is_undefined();
    const bool any_left =
        arguments_.is(Type::kTuple) ? used_ < arguments_.items().size() : used_ == 0 && !is_mapping;
    if (any_left) fault("operator %: not all arguments converted during string formatting");
    return out;
  }

 private:
  Value next() {
    if (arguments_.is(Type::kTuple)) {
      if (used_ < arguments_.items().size()) return arguments_.items()[used_++];
    } else if (used_++ == 0) {
      return arguments_;
    }
    fault("operator %: not enough arguments for format string");
  }

  int64_t bound(size_t& i) {
    if (i < text_.size() && text_[i] == '*') fault("operator %: * as a width is not supported");
    return number_at(text_, i);
  }

  std::string conversion(size_t& i) {
    Field field;
    std::optional<Value> named;
    if (i < text_.size() && text_[i] == '(') {
      const size_t close = text_.find(')', i);
      if (close == std::string::npos) fault("operator %: incomplete format key");
      if (!arguments_.is(Type::kDict)) fault("operator %: format requires a mapping");
      const Value* found = arguments_.entries().find(text_.substr(i + 1, close - i - 1));
      if (!found) fault("operator %: no key {}", text_.substr(i + 1, close - i - 1));
      named = *found, used_ = 1, i = close + 1;
    }
    bool zero = false;
    for (; i < text_.size() && std::string_view("#0- +").find(text_[i]) != std::string_view::npos; ++i) {
      if (text_[i] == '#') field.alternate = true;
      if (text_[i] == '0') zero = true;
      if (text_[i] == '-') field.align = '<';
      if (text_[i] == ' ' && !field.sign) field.sign = ' ';
      if (text_[i] == '+') field.sign = '+';
    }
    field.width = bound(i);
    if (i < text_.size() && text_[i] == '.') ++i, field.precision = bound(i);
    while (i < text_.size() && std::string_view("hlL").find(text_[i]) != std::string_view::npos) ++i;
    if (i == text_.size()) fault("operator %: incomplete format");
    const char type = text_[i++];
    if (type == '%') {
      if (field.width || field.precision >= 0) fault("operator %: %% with a width is not supported");
      return "%";
    }
    const Value value = named ? *named : next();
    if (!field.align) field.align = '>';
    if (type == 's') return write_text(field, to_text(value));
    if (type == 'r') return write_text(field, repr(value));
    if (zero && field.align == '>') field.fill = "0", field.align = '=';
    if (std::string_view("diuxXo").find(type) != std::string_view::npos) {
      require_defined(value);
      field.type = type == 'i' || type == 'u' ? 'd' : type;
      const bool decimal = field.type == 'd';
      if (!value.is_integral() && !(decimal && value.is(Type::kFloat)))
        fault("operator %: %{} requires a number, not '{}'", type, value.type_name());
      if (value.is_integral()) return write_integer(field, value.as_int());
      if (!(std::fabs(value.as_double()) < 0x1p63))
        fault("operator %: %{} of a float without an integer", type);
      return write_integer(field, static_cast<int64_t>(value.as_double()));
    }
    if (std::string_view("eEfFgG").find(type) != std::string_view::npos) {
      require_defined(value);
      if (!value.is_number()) fault("operator %: must be a real number, not '{}'", value.type_name());
      field.type = type;
      if (!std::isfinite(value.as_double()))
        field.fill = " ", field.align = field.align == '=' ? '>' : field.align;
      return write_float(field, value.as_double());
    }
    fault("operator %: the conversion %{} is not supported", type);
  }

  const std::string& text_;
  const Value& arguments_;
  size_t used_ = 0;
};

// --- str.format ---

Field parse_specification(const std::string& text) {
  Field field;
  size_t i = 0;
  const auto is_align = [](char c) { return c == '<' || c == '>' || c == '^' || c == '='; };
  size_t second = 0;
  if (!text.empty()) next_code_point(text, second);
  if (second && second < text.size() && is_align(text[second])) {
    field.fill = text.substr(0, second), field.align = text[second], i = second + 1;
  } else if (i < text.size() && is_align(text[i])) {
    field.align = text[i++];
  }
  if (i < text.size() && (text[i] == '+' || text[i] == '-' || text[i] == ' ')) field.sign = text[i++];
  if (field.sign == '-') field.sign = 0;
  if (i < text.size() && text[i] == '#') field.alternate = true, ++i;
  if (i < text.size() && text[i] == '0') {
    if (!field.align) field.fill = "0", field.align = '=';
    ++i;
  }
  field.width = number_at(text, i);
  if (i < text.size() && (text[i] == ',' || text[i] == '_')) field.grouping = text[i++];
  if (i < text.size() && text[i] == '.') {
    const size_t begin = ++i;
    field.precision = number_at(text, i);
    if (begin == i) fault("method format: the specification {} lacks its precision", text);
  }
  if (i < text.size()) field.type = text[i++];
  if (i < text.size()) fault("method format: the specification {} is not supported", text);
  return field;
}

std::string formatted(const Value& value, const std::string& specification) {
  if (specification.empty()) return to_text(value);
  Field field = parse_specification(specification);
  const auto type_is = [&](std::string_view types) {
    return field.type && types.find(field.type) != std::string_view::npos;
  };
  if (value.is_string() && (field.type == 0 || field.type == 's')) {
    if (field.align == '=' || field.sign || field.grouping || field.alternate)
      fault("method format: the specification {} does not fit a text", specification);
    return write_text(field, value.text());
  }
  if (value.is(Type::kInt) && (field.type == 0 || type_is("dxXob"))) {
    if (field.precision >= 0) fault("method format: a precision does not fit an integer");
    return write_integer(field, value.as_int());
  }
  if ((value.is(Type::kFloat) && (field.type == 0 || type_is("eEfFgG%"))) ||
      (value.is(Type::kInt) && type_is("eEfFgG%"))) {
    return write_float(field, value.as_double());
  }
  fault("method format: the specification {} of a value of type '{}' is not supported", specification,
        value.type_name());
}

}  // namespace

std::string percent_format(const std::string& text, const Value& arguments) {
  return PercentFormatter(text, arguments).run();
}

std::string brace_format(const std::string& text, const Arguments& arguments) {
  std::string out;
  size_t automatic = 0;
  bool numbered = false;
  for (size_t i = 0; i < text.size();) {
    const char c = text[i++];
    if (c != '{' && c != '}') {
      out += c;
      continue;
    }
    if (i < text.size() && text[i] == c) {
      out += c, ++i;
      continue;
    }
    if (c == '}') fault("method format: Single '}}' encountered in format string");
    const size_t close = text.find_first_of("{}", i);
    if (close == std::string::npos) fault("method format: expected '}}' before end of string");
    if (text[close] == '{') fault("method format: nested fields are not supported");
    const std::string field = text.substr(i, close - i);
    i = close + 1;
    const size_t name_end = std::min(field.find_first_of("!:"), field.size());
    const std::string name = field.substr(0, name_end);
    char conversion = 0;
    std::string specification;
    if (name_end < field.size() && field[name_end] == '!') {
      if (name_end + 1 >= field.size())
        fault("method format: end of string while looking for conversion specifier");
      conversion = field[name_end + 1];
      if (name_end + 2 < field.size()) {
        if (field[name_end + 2] != ':') fault("method format: expected ':' after conversion specifier");
        specification = field.substr(name_end + 3);
      }
    } else if (name_end < field.size()) {
      specification = field.substr(name_end + 1);
    }
    if (name.find_first_of(".[") != std::string::npos)
      fault("method format: fields of arguments are not supported");
    const Value* value = nullptr;
    const bool is_number = !name.empty() && name.find_first_not_of("0123456789") == std::string::npos;
    if (name.empty() || is_number) {
      if (automatic > 0 && is_number)
        fault("method format: cannot switch from automatic to manual field numbering");
      if (numbered && name.empty())
        fault("method format: cannot switch from manual to automatic field numbering");
      numbered = is_number;
      size_t zero = 0;
      const size_t at = is_number ? static_cast<size_t>(number_at(name, zero)) : automatic++;
      if (at >= arguments.positional.size()) fault("method format: no argument number {}", at);
      value = &arguments.positional[at];
    } else {
      for (const auto& [key, argument] : arguments.named)
        if (key == name) value = &argument;
      if (!value) fault("method format: no argument named {}", name);
    }
    if (conversion == 0) {
      out += formatted(*value, specification);
    } else if (conversion == 's' || conversion == 'r') {
      const Value converted = Value::string(conversion == 's' ? to_text(*value) : repr(*value));
      out += formatted(converted, specification);
    } else {
      fault("method format: the conversion !{} is not supported", conversion);
    }
    if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
      fault("method format: a text of more than {} MiB", kMaxStringBytes >> 20);
  }
  return out;
}

}  // namespace spot::jinja
