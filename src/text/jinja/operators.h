// Operators, subscripts and attributes with the meaning that jinja2's sandbox gives them.
#pragma once

#include <string>

#include "text/jinja/value.h"

namespace spot::jinja {

enum class Operator { kAdd, kSubtract, kMultiply, kDivide, kFloorDivide, kModulo, kPower };
enum class Comparison { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual, kIn, kNotIn };

Value apply(Operator op, const Value& a, const Value& b);
Value negate(const Value& value);
Value plus(const Value& value);
bool compare(Comparison op, const Value& a, const Value& b);
bool contains(const Value& container, const Value& item);

// value.name: Python's attribute first, then the item.
Value get_attribute(const Value& value, const std::string& name);
// value[key]: the item first, then for text the attribute.
Value get_item(const Value& value, const Value& key);
// value[start:stop:step]; kMissing stands for an omitted bound.
Value slice(const Value& value, const Value& start, const Value& stop, const Value& step);

// The Python attribute of a value, a method most often. kMissing if there is none; throws Fault for one that
// exists in Python and not here.
Value python_attribute(const Value& value, const std::string& name);
// Methods of str, as python_attribute gives them.
Value string_method(const Value& self, const std::string& name);

// Wraps a C++ function as a method of `self`.
Value method_of(const Value& self, std::string name, std::function<Value(Arguments)> call);

// Throws Fault with the message of an undefined value.
void require_defined(const Value& value);
// An integer argument (or bool), as Python's __index__ takes it.
int64_t as_index(const std::string& what, const Value& value);

}  // namespace spot::jinja
