// Values as text: Python's str() and repr(), json.dumps, and its format strings.
#pragma once

#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace spot::jinja {

// str(value). Throws Fault for objects whose text Python does not define (generators, methods).
std::string to_text(const Value& value);
// repr(value): as the elements of a printed list appear.
std::string repr(const Value& value);
// Appends repr(text) of a string.
void append_repr(std::string& out, std::string_view text);
// The shortest text that reads back as the same float.
std::string float_repr(double value);

struct JsonStyle {
  bool ensure_ascii = false, sort_keys = false, indented = false;
  std::string indent, item_separator = ", ", key_separator = ": ";
};
// json.dumps(value). Throws Fault for values that are not JSON.
std::string to_json(const Value& value, const JsonStyle& style);

// text % arguments: %s %r %d %i %u %x %X %o %c %e %f %g %% with flags, width and precision.
std::string percent_format(const std::string& text, const Value& arguments);
// text.format(*positional, **named): {}, {0}, {name}, !s and !r, and the common format specifications.
std::string brace_format(const std::string& text, const Arguments& arguments);

// markupsafe.escape: & < > ' " as entities.
std::string escape_html(std::string_view text);

}  // namespace spot::jinja
