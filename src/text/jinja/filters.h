// The filters and tests that templates call by name.
#pragma once

#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace spot::jinja {

enum class Support { kSupported, kUnsupported, kUnknown };  // kUnsupported: jinja2 has it, this has not

Support filter_support(std::string_view name);
Support test_support(std::string_view name);

Value apply_filter(const std::string& name, const Value& value, Arguments arguments);
bool apply_test(const std::string& name, const Value& value, Arguments arguments);

// The steps of an attribute that filters take: "name", "a.b", "0.name" or a number; none for kMissing and None.
std::vector<Value> attribute_path(const Value& attribute);
// The value at the end of that path.
Value look_up(const Value& value, const Value& attribute);

using Filter = Value (*)(const std::string& what, const Value& value, Arguments arguments);
// text_filters.cpp, number_filters.cpp and sequence_filters.cpp; null for an unknown name.
Filter find_text_filter(std::string_view name);
Filter find_number_filter(std::string_view name);
Filter find_sequence_filter(std::string_view name);

}  // namespace spot::jinja
