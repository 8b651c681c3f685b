#include "text/jinja/format.h"

#include <utf8proc.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "text/jinja/loop.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

// str.isprintable of one character.
bool is_printable(char32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
      return false;
    case UTF8PROC_CATEGORY_ZS:
      return c == ' ';
    default:
      return true;
  }
}

void append_sequence(std::string& out, const std::vector<Value>& items, int depth);

void append_dict(std::string& out, const DictObject& dict, int depth);

void append_repr_of(std::string& out, const Value& value, int depth) {
  if (depth > 2 * kMaxValueDepth) fault("a value that contains itself has no text");
  if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
    fault("a text of more than {} MiB", kMaxStringBytes >> 20);
  spend(1);
  switch (value.type()) {
    case Type::kMissing:
    case Type::kUndefined:
      out += "Undefined";
      return;
    case Type::kNone:
      out += "None";
      return;
    case Type::kBool:
      out += value.as_bool() ? "True" : "False";
      return;
    case Type::kInt:
      out += std::to_string(value.as_int());
      return;
    case Type::kFloat:
      out += float_repr(value.as_double());
      return;
    case Type::kString:
      if (value.is_markup()) out += "Markup(";
      append_repr(out, value.text());
      if (value.is_markup()) out += ")";
      return;
    case Type::kList:
      out += "[";
      append_sequence(out, value.items(), depth);
      out += "]";
      return;
    case Type::kTuple:
      out += "(";
      append_sequence(out, value.items(), depth);
      out += value.items().size() == 1 ? ",)" : ")";
      return;
    case Type::kDict:
      append_dict(out, value.entries(), depth);
      return;
    case Type::kRange: {
      const RangeObject& range = value.as_range();
      out += fmt::format("range({}, {}", range.start, range.stop);
      out += range.step == 1 ? ")" : fmt::format(", {})", range.step);
      return;
    }
    case Type::kView: {
      const ViewObject& view = value.as_view();
      out += view.kind == ViewObject::Kind::kKeys     ? "dict_keys(["
             : view.kind == ViewObject::Kind::kValues ? "dict_values(["
                                                      : "dict_items([";
      append_sequence(out, to_vector(value), depth);
      out += "])";
      return;
    }
    case Type::kNamespace:
      out += "<Namespace ";
      append_dict(out, value.as_namespace().attributes, depth);
      out += ">";
      return;
    case Type::kLoop:
      out += loop_of(value).description();
      return;
    case Type::kCallable:
      if (value.as_callable().name.starts_with("macro ")) {
        out += fmt::format("<Macro {}>", value.as_callable().name.substr(6));
        return;
      }
      [[fallthrough]];
    case Type::kIterator:
      fault("printing a {} is not supported: its text is an address; make it a list first",
            value.type_name());
  }
}

void append_sequence(std::string& out, const std::vector<Value>& items, int depth) {
  for (size_t i = 0; i < items.size(); ++i) {
    if (i) out += ", ";
    append_repr_of(out, items[i], depth + 1);
  }
}

void append_dict(std::string& out, const DictObject& dict, int depth) {
  out += "{";
  bool first = true;
  for (const auto& [key, value] : dict.entries()) {
    if (!first) out += ", ";
    first = false;
    append_repr_of(out, key, depth + 1);
    out += ": ";
    append_repr_of(out, value, depth + 1);
  }
  out += "}";
}

// --- JSON ---

void append_json_string(std::string& out, std::string_view text, bool ensure_ascii) {
  constexpr std::string_view kShort = "\b\f\n\r\t\"\\", kShortNames = "bfnrt\"\\";
  out += '"';
  for (size_t i = 0; i < text.size();) {
    const unsigned char byte = static_cast<unsigned char>(text[i]);
    if (const size_t at = kShort.find(text[i]); at != std::string_view::npos) {
      out += '\\', out += kShortNames[at], ++i;
    } else if (byte < 0x20) {
      out += fmt::format("\\u{:04x}", byte), ++i;
    } else if (byte < 0x80 || !ensure_ascii) {
      out += text[i++];
    } else {
      const char32_t c = next_code_point(text, i);
      if (c < 0x10000) {
        out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
      } else {
        out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + ((static_cast<uint32_t>(c) - 0x10000) >> 10),
                           0xDC00 + ((static_cast<uint32_t>(c) - 0x10000) & 0x3FF));
      }
    }
  }
  out += '"';
}

std::string json_float(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  return float_repr(value);
}

std::string json_key(const Value& key) {
  switch (key.type()) {
    case Type::kString:
      return key.text();
    case Type::kNone:
      return "null";
    case Type::kBool:
      return key.as_bool() ? "true" : "false";
    case Type::kInt:
      return std::to_string(key.as_int());
    case Type::kFloat:
      return json_float(key.as_double());
    default:
      fault("filter tojson: a key of type {} is not JSON", key.type_name());
  }
}

class JsonWriter {
 public:
  JsonWriter(std::string& out, const JsonStyle& style) : out_(out), style_(style) {}

  void write(const Value& value) {
    if (static_cast<int64_t>(out_.size()) > kMaxStringBytes)
      fault("filter tojson: a text of more than {} MiB", kMaxStringBytes >> 20);
    spend(1);
    switch (value.type()) {
      case Type::kNone:
        out_ += "null";
        return;
      case Type::kBool:
        out_ += value.as_bool() ? "true" : "false";
        return;
      case Type::kInt:
        out_ += std::to_string(value.as_int());
        return;
      case Type::kFloat:
        out_ += json_float(value.as_double());
        return;
      case Type::kString:
        append_json_string(out_, value.text(), style_.ensure_ascii);
        return;
      case Type::kList:
      case Type::kTuple:
        return write_list(value.items());
      case Type::kDict:
        return write_dict(value.entries());
      default:
        fault("filter tojson: a value of type {} is not JSON", value.type_name());
    }
  }

 private:
  void line() {
    if (!style_.indented) return;
    out_ += '\n';
    for (int i = 0; i < level_; ++i) out_ += style_.indent;
  }

  void separate(bool& first) {
    if (!first) out_ += style_.item_separator;
    first = false;
    line();
  }

  void write_list(const std::vector<Value>& items) {
    if (items.empty()) {
      out_ += "[]";
      return;
    }
    out_ += '[', ++level_;
    bool first = true;
    for (const Value& item : items) separate(first), write(item);
    --level_, line(), out_ += ']';
  }

  void write_dict(const DictObject& dict) {
    if (dict.entries().empty()) {
      out_ += "{}";
      return;
    }
    std::vector<const DictObject::Entry*> entries;
    for (const auto& entry : dict.entries()) entries.push_back(&entry);
    if (style_.sort_keys) {
      std::stable_sort(entries.begin(), entries.end(),
                       [](const auto* a, const auto* b) { return less(a->first, b->first); });
    }
    out_ += '{', ++level_;
    bool first = true;
    for (const auto* entry : entries) {
      separate(first);
      append_json_string(out_, json_key(entry->first), style_.ensure_ascii);
      out_ += style_.key_separator;
      write(entry->second);
    }
    --level_, line(), out_ += '}';
  }

  std::string& out_;
  const JsonStyle& style_;
  int level_ = 0;
};

}  // namespace

void append_repr(std::string& out, std::string_view text) {
  spend_bytes(text.size());
  const bool has_single = text.find('\'') != std::string_view::npos;
  const char quote = has_single && text.find('"') == std::string_view::npos ? '"' : '\'';
  out += quote;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t c = next_code_point(text, i);
    if (c == static_cast<char32_t>(quote) || c == '\\') {
      out += '\\', out += static_cast<char>(c);
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (is_printable(c)) {
      out += text.substr(begin, i - begin);
    } else if (c < 0x100) {
      out += fmt::format("\\x{:02x}", static_cast<uint32_t>(c));
    } else if (c < 0x10000) {
      out += fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
    } else {
      out += fmt::format("\\U{:08x}", static_cast<uint32_t>(c));
    }
  }
  out += quote;
}

std::string float_repr(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[64];
  const auto scientific = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific);
  const std::string_view text(buffer, static_cast<size_t>(scientific.ptr - buffer));
  const size_t mark = text.find('e');
  const int exponent = std::atoi(std::string(text.substr(mark + 1)).c_str());
  if (exponent < -4 || exponent >= 16) {
    return fmt::format("{}e{}{:02}", text.substr(0, mark), exponent < 0 ? '-' : '+', std::abs(exponent));
  }
  const auto fixed = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed);
  std::string out(buffer, static_cast<size_t>(fixed.ptr - buffer));
  if (out.find('.') == std::string::npos) out += ".0";
  return out;
}

std::string to_text(const Value& value) {
  if (value.is_string()) return value.text();
  if (value.is_undefined()) return "";
  return repr(value);
}

std::string repr(const Value& value) {
  std::string out;
  append_repr_of(out, value, 0);
  return out;
}

std::string to_json(const Value& value, const JsonStyle& style) {
  std::string out;
  JsonWriter(out, style).write(value);
  return out;
}

std::string escape_html(std::string_view text) {
  std::string out;
  for (char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else if (c == '\'') {
      out += "&#39;";
    } else if (c == '"') {
      out += "&#34;";
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace spot::jinja
