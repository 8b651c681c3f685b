// Methods of str.
#include <algorithm>
#include <functional>
#include <unordered_map>

#include "text/jinja/format.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

using Method = Value (*)(const Value& self, const std::string& what, Arguments arguments);

std::vector<Value> positional(const std::string& what, Arguments arguments, size_t least, size_t most) {
  if (!arguments.named.empty()) fault("{} takes no keyword arguments", what);
  if (arguments.positional.size() < least || arguments.positional.size() > most)
    fault("{} takes {} to {} arguments, {} are given", what, least, most, arguments.positional.size());
  arguments.positional.resize(most);
  return std::move(arguments.positional);
}

const std::string& text_argument(const std::string& what, const Value& value) {
  if (!value.is_string()) fault("{}: the argument must be a text, not '{}'", what, value.type_name());
  return value.text();
}

Value list_like(const Value& self, const std::vector<std::string_view>& parts) {
  std::vector<Value> out;
  out.reserve(parts.size());
  for (std::string_view part : parts) out.push_back(like(self, std::string(part)));
  return Value::list(std::move(out));
}

template <bool left, bool right>
Value strip_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 0, 1);
  if (!bound[0].is_given()) return like(self, std::string(strip(self.text(), left, right)));
  return like(self, std::string(strip_characters(self.text(), text_argument(what, bound[0]), left, right)));
}

template <bool from_right>
Value split_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"sep", "maxsplit"}, 0);
  const int64_t most = bound[1].is_missing() ? -1 : as_index(what, bound[1]);
  if (!bound[0].is_given()) return list_like(self, split_space(self.text(), most, from_right));
  const std::string& separator = text_argument(what, bound[0]);
  if (separator.empty()) fault("{}: empty separator", what);
  return list_like(self, split(self.text(), separator, most, from_right));
}

Value splitlines(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"keepends"}, 0);
  return list_like(self, split_lines(self.text(), !bound[0].is_missing() && bound[0].truth()));
}

// The part of self.text() that the optional bounds at bound[1] and bound[2] leave, with its first code point's
// number; nothing if they exclude even the empty text.
struct Window {
  std::string_view text;
  int64_t first = 0;
  bool empty_allowed = true;
};

Window window(const Value& self, const std::string& what, const std::vector<Value>& bound) {
  const std::string& text = self.text();
  if (!bound[1].is_given() && !bound[2].is_given()) return {text};
  const int64_t length = self.num_code_points();
  const auto place = [&](const Value& v, int64_t otherwise) {
    if (!v.is_given()) return otherwise;
    const int64_t at = as_index(what, v);
    return at < 0 ? std::max<int64_t>(at + length, 0) : at;
  };
  const int64_t start = place(bound[1], 0), stop = std::min(place(bound[2], length), length);
  if (start > stop) return {{}, start, false};
  const size_t from = byte_offset(text, start), to = byte_offset(text, stop);
  return {std::string_view(text).substr(from, to - from), start};
}

template <bool at_start>
Value affix_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 3);
  const Window part = window(self, what, bound);
  const auto matches = [&](const Value& affix) {
    if (!affix.is_string())
      fault("{}: the argument must be a text or a tuple of texts, not '{}'", what, affix.type_name());
    if (!part.empty_allowed) return false;
    return at_start ? part.text.starts_with(affix.text()) : part.text.ends_with(affix.text());
  };
  if (!bound[0].is(Type::kTuple)) return Value::boolean(matches(bound[0]));
  return Value::boolean(std::any_of(bound[0].items().begin(), bound[0].items().end(), matches));
}

template <bool from_right, bool must_find>
Value find_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 3);
  const std::string& part = text_argument(what, bound[0]);
  const Window in = window(self, what, bound);
  spend_bytes(in.text.size());
  const size_t at = !in.empty_allowed ? std::string_view::npos
                    : from_right      ? in.text.rfind(part)
                                      : in.text.find(part);
  if (at != std::string_view::npos)
    return Value::integer(in.first + count_code_points(in.text.substr(0, at)));
  if (must_find) fault("{}: substring not found", what);
  return Value::integer(-1);
}

Value count_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 3);
  const std::string& part = text_argument(what, bound[0]);
  const Window in = window(self, what, bound);
  if (!in.empty_allowed) return Value::integer(0);
  if (part.empty()) return Value::integer(count_code_points(in.text) + 1);
  int64_t count = 0;
  for (size_t at = in.text.find(part); at != std::string_view::npos;
       at = in.text.find(part, at + part.size()))
    ++count;
  return Value::integer(count);
}

Value replace_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 2, 3);
  const int64_t most = bound[2].is_missing() ? -1 : as_index(what, bound[2]);
  std::string with = text_argument(what, bound[1]);
  if (self.is_markup() && !bound[1].is_markup()) with = escape_html(with);
  return like(self, replace(self.text(), text_argument(what, bound[0]), with, most));
}

Value join_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 1);
  std::string out;
  bool first = true;
  Iteration iteration(bound[0]);
  for (Value item; iteration.next(item);) {
    if (!first) out += self.text();
    first = false;
    out += self.is_markup() && !item.is_markup() ? escape_html(text_argument(what, item))
                                                 : text_argument(what, item);
    if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
      fault("{}: a text of more than {} MiB", what, kMaxStringBytes >> 20);
  }
  return like(self, std::move(out));
}

template <bool from_right>
Value partition_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 1);
  const std::string& separator = text_argument(what, bound[0]);
  if (separator.empty()) fault("{}: empty separator", what);
  const std::string& text = self.text();
  const size_t at = from_right ? text.rfind(separator) : text.find(separator);
  if (at == std::string::npos) {
    if (from_right) return Value::tuple({like(self, ""), like(self, ""), like(self, text)});
    return Value::tuple({like(self, text), like(self, ""), like(self, "")});
  }
  return Value::tuple({like(self, text.substr(0, at)), like(self, separator),
                       like(self, text.substr(at + separator.size()))});
}

template <bool prefix>
Value remove_affix(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 1);
  const std::string &text = self.text(), &affix = text_argument(what, bound[0]);
  if (prefix) return like(self, text.starts_with(affix) ? text.substr(affix.size()) : text);
  return like(self, text.ends_with(affix) ? text.substr(0, text.size() - affix.size()) : text);
}

template <std::string (*change)(std::string_view)>
Value case_method(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  return like(self, change(self.text()));
}

enum class Side { kLeft, kRight, kCenter };

template <Side side>
Value justify_method(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 2);
  const std::string fill = bound[1].is_missing() ? " " : text_argument(what, bound[1]);
  if (count_code_points(fill) != 1) fault("{}: the fill character must be exactly one character long", what);
  if (self.is_markup() && fill != " ")
    fault("{} of a text marked safe with a fill character is not supported", what);
  const int64_t width = as_index(what, bound[0]);
  return like(self, side == Side::kCenter ? center(self.text(), width, fill)
                                          : pad(self.text(), width, fill, side == Side::kRight));
}

Value zfill(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = positional(what, std::move(arguments), 1, 1);
  const std::string& text = self.text();
  const bool sign = !text.empty() && (text[0] == '-' || text[0] == '+');
  const int64_t width = as_index(what, bound[0]) - (sign ? 1 : 0);
  return like(self, (sign ? text.substr(0, 1) : "") + pad(text.substr(sign ? 1 : 0), width, "0", true));
}

Value expandtabs(const Value& self, const std::string& what, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"tabsize"}, 0);
  const int64_t size = bound[0].is_missing() ? 8 : as_index(what, bound[0]);
  if (size > 1000) fault("{}: a tab of more than 1000 columns", what);
  std::string out;
  int64_t column = 0;
  for (char c : self.text()) {
    if (c == '\t') {
      const int64_t fill = size > 0 ? size - column % size : 0;
      out.append(static_cast<size_t>(fill), ' '), column += fill;
      continue;
    }
    out += c;
    if ((static_cast<unsigned char>(c) & 0xC0) != 0x80) ++column;
    if (c == '\n' || c == '\r') column = 0;
  }
  return like(self, std::move(out));
}

template <bool (*property)(char32_t)>
Value every_method(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  const std::string& text = self.text();
  bool all = !text.empty();
  for (size_t i = 0; all && i < text.size();) all = property(next_code_point(text, i));
  return Value::boolean(all);
}

// islower and isupper: at least one such letter and none of the other cases.
template <bool upper>
Value case_test(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  return Value::boolean(upper ? is_all_upper(self.text()) : is_all_lower(self.text()));
}

Value istitle(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  bool any = false, inside = false;
  for (size_t i = 0; i < self.text().size();) {
    const char32_t c = next_code_point(self.text(), i);
    if (is_upper(c) || is_title(c)) {
      if (inside) return Value::boolean(false);
      any = inside = true;
    } else if (is_lower(c)) {
      if (!inside) return Value::boolean(false);
      any = true;
    } else {
      inside = false;
    }
  }
  return Value::boolean(any);
}

Value isascii(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  return Value::boolean(self.is_ascii());
}

bool is_alphanumeric(char32_t c) {
  if (c >= 0x80 && !is_letter(c) && !is_digit(c) && is_other_number(c))
    fault("method isalnum: numbers such as U+{:04X} are not supported", static_cast<uint32_t>(c));
  return is_letter(c) || is_digit(c);
}

bool is_numeric(char32_t c) {
  if (c >= 0x3000 && is_letter(c)) fault("method isnumeric: ideographs are not supported");
  return is_digit(c) || is_other_number(c);
}

Value isidentifier(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  if (!self.is_ascii()) fault("{} of a text that is not ASCII is not supported", what);
  const auto is_start = [](char c) { return (c | 32) >= 'a' ? (c | 32) <= 'z' : c == '_'; };
  const std::string& text = self.text();
  return Value::boolean(!text.empty() && (is_start(text[0]) || text[0] == '_') &&
                        std::all_of(text.begin(), text.end(), [&](char c) {
                          return is_start(c) || c == '_' || (c >= '0' && c <= '9');
                        }));
}

Value casefold(const Value& self, const std::string& what, Arguments arguments) {
  positional(what, std::move(arguments), 0, 0);
  if (!self.is_ascii()) fault("{} of a text that is not ASCII is not supported", what);
  return like(self, to_lower(self.text()));
}

Value format_method(const Value& self, const std::string& what, Arguments arguments) {
  if (self.is_markup()) fault("{} of a text marked safe is not supported", what);
  return Value::string(brace_format(self.text(), arguments));
}

Value unsupported_method(const Value&, const std::string& what, Arguments) {
  fault("{} is not supported", what);
}

const std::unordered_map<std::string_view, Method>& methods() {
  static const std::unordered_map<std::string_view, Method> table = {
      {"strip", strip_method<true, true>},
      {"lstrip", strip_method<true, false>},
      {"rstrip", strip_method<false, true>},
      {"split", split_method<false>},
      {"rsplit", split_method<true>},
      {"splitlines", splitlines},
      {"startswith", affix_method<true>},
      {"endswith", affix_method<false>},
      {"find", find_method<false, false>},
      {"rfind", find_method<true, false>},
      {"index", find_method<false, true>},
      {"rindex", find_method<true, true>},
      {"count", count_method},
      {"replace", replace_method},
      {"join", join_method},
      {"partition", partition_method<false>},
      {"rpartition", partition_method<true>},
      {"removeprefix", remove_affix<true>},
      {"removesuffix", remove_affix<false>},
      {"upper", case_method<to_upper>},
      {"lower", case_method<to_lower>},
      {"title", case_method<to_title>},
      {"capitalize", case_method<to_capitalized>},
      {"swapcase", case_method<swap_case>},
      {"casefold", casefold},
      {"ljust", justify_method<Side::kLeft>},
      {"rjust", justify_method<Side::kRight>},
      {"center", justify_method<Side::kCenter>},
      {"zfill", zfill},
      {"expandtabs", expandtabs},
      {"isspace", every_method<is_python_space>},
      {"isalpha", every_method<is_letter>},
      {"isdecimal", every_method<is_decimal>},
      {"isdigit", every_method<is_digit>},
      {"isnumeric", every_method<is_numeric>},
      {"isalnum", every_method<is_alphanumeric>},
      {"islower", case_test<false>},
      {"isupper", case_test<true>},
      {"istitle", istitle},
      {"isascii", isascii},
      {"isidentifier", isidentifier},
      {"format", format_method},
      {"isprintable", unsupported_method},
      {"format_map", unsupported_method},
      {"encode", unsupported_method},
      {"maketrans", unsupported_method},
      {"translate", unsupported_method},
  };
  return table;
}

}  // namespace

Value string_method(const Value& self, const std::string& name) {
  const auto found = methods().find(name);
  if (found == methods().end()) {
    if (self.is_markup() && (name == "escape" || name == "unescape" || name == "striptags"))
      fault("method {} of a text marked safe is not supported", name);
    return Value();
  }
  const Method method = found->second;
  const std::string what = "method " + name;
  return method_of(self, name, [self, method, what](Arguments arguments) {
    spend_bytes(self.text().size());
    return method(self, what, std::move(arguments));
  });
}

}  // namespace spot::jinja
