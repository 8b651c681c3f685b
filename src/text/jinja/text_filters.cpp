// Filters that make text.
#include <algorithm>
#include <unordered_map>

#include "text/jinja/filters.h"
#include "text/jinja/format.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

// A text as it is, anything else by str(): what most of these filters do first.
Value as_text(const Value& value) {
  return value.is_string() ? value : Value::string(to_text(value));
}

template <std::string (*change)(std::string_view)>
Value case_filter(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  const Value text = as_text(value);
  return like(text, change(text.text()));
}

// Words begin after white space and - ( { [ <.
Value title(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  const Value holder = as_text(value);
  const std::string& text = holder.text();
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const auto separates = [](char32_t c) {
      return is_python_space(c) || c == '-' || c == '(' || c == '{' || c == '[' || c == '<';
    };
    const bool separator = separates(next_code_point(text, i));
    const size_t second = i;
    for (size_t next = i; next < text.size() && separates(next_code_point(text, next)) == separator;)
      i = next;
    const std::string_view word(text);
    out += to_upper(word.substr(begin, second - begin));
    out += to_lower(word.substr(second, i - second));
  }
  return Value::string(std::move(out));
}

Value trim(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"chars"}, 0);
  const Value text = as_text(value);
  if (!bound[0].is_given()) return like(text, std::string(strip(text.text())));
  require_defined(bound[0]);
  if (!bound[0].is_string()) fault("{}: the characters must be a text, not '{}'", what, bound[0].type_name());
  return like(text, std::string(strip_characters(text.text(), bound[0].text())));
}

Value replace_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"old", "new", "count"}, 2);
  const int64_t count = bound[2].is_given() ? as_index(what, bound[2]) : -1;
  return Value::string(replace(to_text(value), to_text(bound[0]), to_text(bound[1]), count));
}

Value string_filter(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return as_text(value);
}

Value safe(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return Value::string(to_text(value), true);
}

Value escape(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return value.is_markup() ? value : Value::string(escape_html(to_text(value)), true);
}

Value force_escape(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return Value::string(escape_html(to_text(value)), true);
}

Value center_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"width"}, 0);
  const Value text = as_text(value);
  return like(text, center(text.text(), bound[0].is_missing() ? 80 : as_index(what, bound[0]), " "));
}

Value indent(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"width", "first", "blank"}, 0);
  require_defined(value);
  if (!value.is_string()) fault("{}: only texts are indented, not '{}'", what, value.type_name());
  std::string indention(4, ' ');
  if (bound[0].is_string()) {
    indention = bound[0].text();
  } else if (!bound[0].is_missing()) {
    indention.assign(static_cast<size_t>(std::clamp<int64_t>(as_index(what, bound[0]), 0, 1 << 20)), ' ');
  }
  const auto is_set = [](const Value& v) { return !v.is_missing() && v.truth(); };
  const bool blank = is_set(bound[2]);
  const std::string text = value.text() + "\n";
  std::string out = is_set(bound[1]) ? indention : "";
  bool first = true;
  for (std::string_view line : split_lines(text, false)) {
    if (!first) out += '\n';
    if (!first && (blank || !line.empty())) out += indention;
    first = false;
    out += line;
    if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
      fault("{}: a text of more than {} MiB", what, kMaxStringBytes >> 20);
  }
  return like(value, std::move(out));
}

Value truncate(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"length", "killwords", "end", "leeway"}, 0);
  const auto size = length_of(value);
  if (!size) fault("{}: object of type '{}' has no length", what, value.type_name());
  const int64_t length = bound[0].is_missing() ? 255 : as_index(what, bound[0]);
  const int64_t leeway = bound[3].is_given() ? as_index(what, bound[3]) : 5;
  const std::string end = bound[2].is_missing() ? "..." : bound[2].is_string() ? bound[2].text() : "";
  if (!bound[2].is_missing() && !bound[2].is_string()) fault("{}: the ending must be a text", what);
  const int64_t kept = length - count_code_points(end);
  if (kept < 0) fault("{}: a length of {} is shorter than the ending", what, length);
  if (leeway < 0) fault("{}: a negative leeway", what);
  if (*size <= length + leeway) return value;
  if (!value.is_string() || value.is_markup())
    fault("{}: cutting a value of type '{}' is not supported", what, value.type_name());
  std::string out = value.text().substr(0, byte_offset(value.text(), kept));
  if (!(!bound[1].is_missing() && bound[1].truth())) out = out.substr(0, out.rfind(' '));
  return Value::string(out + end);
}

Value word_count(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  const Value holder = as_text(value);
  int64_t words = 0;
  bool inside = false;
  for (size_t i = 0; i < holder.text().size();) {
    const char32_t c = next_code_point(holder.text(), i);
    const bool is_word = c == '_' || is_letter(c) || is_digit(c) || is_other_number(c);
    words += is_word && !inside;
    inside = is_word;
  }
  return Value::integer(words);
}

Value format_filter(const std::string& what, const Value& value, Arguments arguments) {
  if (!arguments.named.empty() && !arguments.positional.empty())
    fault("{}: can't handle positional and keyword arguments at the same time", what);
  const Value text = as_text(value);
  if (arguments.named.empty())
    return apply(Operator::kModulo, text, Value::tuple(std::move(arguments.positional)));
  auto named = std::make_shared<DictObject>();
  for (auto& [name, argument] : arguments.named) named->set(name, std::move(argument));
  return apply(Operator::kModulo, text, Value::dict(std::move(named)));
}

std::string quoted(const Value& value, bool in_query) {
  const std::string text = to_text(value);
  std::string out;
  for (char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && (std::isalnum(byte) || std::string_view("_.-~").find(c) != std::string_view::npos ||
                        (c == '/' && !in_query))) {
      out += c;
    } else if (c == ' ' && in_query) {
      out += '+';
    } else {
      out += fmt::format("%{:02X}", byte);
    }
  }
  return out;
}

Value url_encode(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  if (value.is_undefined()) return Value::string("");
  if (value.is(Type::kDict)) {
    std::string out;
    for (const auto& [key, item] : value.entries().entries()) {
      if (!out.empty()) out += '&';
      out += quoted(key, true) + "=" + quoted(item, true);
    }
    return Value::string(std::move(out));
  }
  if (!value.is_string() && !value.is_number() && !value.is_none())
    fault("{} of a value of type '{}' is not supported", what, value.type_name());
  return Value::string(quoted(value, false));
}

Value tojson(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound =
      bind(what, std::move(arguments), {"ensure_ascii", "indent", "separators", "sort_keys"}, 0);
  JsonStyle style;
  style.ensure_ascii = !bound[0].is_missing() && bound[0].truth();
  style.sort_keys = !bound[3].is_missing() && bound[3].truth();
  if (bound[1].is_given()) {
    style.indented = true, style.item_separator = ",";
    style.indent =
        bound[1].is_string()
            ? bound[1].text()
            : std::string(static_cast<size_t>(std::clamp<int64_t>(as_index(what, bound[1]), 0, 1000)), ' ');
  }
  if (bound[2].is_given()) {
    const auto separators = to_vector(bound[2]);
    if (separators.size() != 2 || !separators[0].is_string() || !separators[1].is_string())
      fault("{}: separators must be two texts", what);
    style.item_separator = separators[0].text(), style.key_separator = separators[1].text();
  }
  return Value::string(to_json(value, style));
}

}  // namespace

Filter find_text_filter(std::string_view name) {
  static const std::unordered_map<std::string_view, Filter> table = {
      {"upper", case_filter<to_upper>},
      {"lower", case_filter<to_lower>},
      {"capitalize", case_filter<to_capitalized>},
      {"title", title},
      {"trim", trim},
      {"replace", replace_filter},
      {"string", string_filter},
      {"safe", safe},
      {"e", escape},
      {"escape", escape},
      {"forceescape", force_escape},
      {"center", center_filter},
      {"indent", indent},
      {"truncate", truncate},
      {"wordcount", word_count},
      {"format", format_filter},
      {"urlencode", url_encode},
      {"tojson", tojson},
  };
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace spot::jinja
