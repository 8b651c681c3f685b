#include "text/jinja/filters.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "text/jinja/format.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"

namespace spot::jinja {
namespace {

using Test = bool (*)(const std::string& what, const Value& value, const Arguments& arguments);

constexpr std::array<std::string_view, 8> kUnsupportedFilters = {
    "filesizeformat", "groupby", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"};

Filter find_filter(std::string_view name) {
  if (Filter filter = find_text_filter(name)) return filter;
  if (Filter filter = find_number_filter(name)) return filter;
  return find_sequence_filter(name);
}

void take_nothing(const std::string& what, const Arguments& arguments) {
  bind(what, arguments, {}, 0);
}

template <bool (*property)(const Value&)>
bool plain_test(const std::string& what, const Value& value, const Arguments& arguments) {
  take_nothing(what, arguments);
  return property(value);
}

template <Type type>
bool has_type(const Value& value) {
  return value.is(type);
}

bool is_defined(const Value& value) {
  return !value.is_undefined();
}
bool is_number(const Value& value) {
  return value.is_number();
}
bool is_true(const Value& value) {
  return value.is(Type::kBool) && value.as_bool();
}
bool is_false(const Value& value) {
  return value.is(Type::kBool) && !value.as_bool();
}
bool is_lower_text(const Value& value) {
  return is_all_lower(to_text(value));
}
bool is_upper_text(const Value& value) {
  return is_all_upper(to_text(value));
}
bool is_escaped(const Value& value) {
  return value.is_markup();
}
bool is_callable(const Value& value) {
  return value.is(Type::kCallable) || value.is(Type::kLoop) || value.is_undefined();
}
bool is_sequence(const Value& value) {
  return value.is_sequence() || value.is_string() || value.is(Type::kDict) || value.is(Type::kRange) ||
         value.is_undefined();
}
bool is_iterable(const Value& value) {
  return is_sequence(value) || value.is(Type::kView) || value.is(Type::kIterator) || value.is(Type::kLoop);
}
bool is_filter(const Value& value) {
  hash(value);
  return value.is_string() && filter_support(value.text()) != Support::kUnknown;
}
bool is_test(const Value& value) {
  hash(value);
  return value.is_string() && test_support(value.text()) != Support::kUnknown;
}

bool remainder_is(const Value& value, const Value& divisor, int64_t rest) {
  return equal(apply(Operator::kModulo, value, divisor), Value::integer(rest));
}
bool is_odd(const Value& value) {
  return remainder_is(value, Value::integer(2), 1);
}
bool is_even(const Value& value) {
  return remainder_is(value, Value::integer(2), 0);
}

bool divisible_by(const std::string& what, const Value& value, const Arguments& arguments) {
  return remainder_is(value, bind(what, arguments, {"num"}, 1)[0], 0);
}

template <Comparison op>
bool comparison_test(const std::string& what, const Value& value, const Arguments& arguments) {
  if (!arguments.named.empty()) fault("{} takes no keyword arguments", what);
  return compare(op, value, bind(what, arguments, {"other"}, 1)[0]);
}

bool in_test(const std::string& what, const Value& value, const Arguments& arguments) {
  return contains(bind(what, arguments, {"seq"}, 1)[0], value);
}

bool same_as(const std::string& what, const Value& value, const Arguments& arguments) {
  const Value other = bind(what, arguments, {"other"}, 1)[0];
  if (value.type() != other.type()) return false;
  if (value.is_none()) return true;
  if (value.is(Type::kBool)) return value.as_bool() == other.as_bool();
  if (value.is(Type::kInt) || value.is(Type::kFloat) || value.is_string() || value.is(Type::kTuple))
    fault("{}: the identity of values of type '{}' is not supported", what, value.type_name());
  return value.object() == other.object();
}

const std::unordered_map<std::string_view, Test>& tests() {
  static const std::unordered_map<std::string_view, Test> table = {
      {"odd", plain_test<is_odd>},
      {"even", plain_test<is_even>},
      {"divisibleby", divisible_by},
      {"defined", plain_test<is_defined>},
      {"undefined", plain_test<has_type<Type::kUndefined>>},
      {"filter", plain_test<is_filter>},
      {"test", plain_test<is_test>},
      {"none", plain_test<has_type<Type::kNone>>},
      {"boolean", plain_test<has_type<Type::kBool>>},
      {"false", plain_test<is_false>},
      {"true", plain_test<is_true>},
      {"integer", plain_test<has_type<Type::kInt>>},
      {"float", plain_test<has_type<Type::kFloat>>},
      {"lower", plain_test<is_lower_text>},
      {"upper", plain_test<is_upper_text>},
      {"string", plain_test<has_type<Type::kString>>},
      {"mapping", plain_test<has_type<Type::kDict>>},
      {"number", plain_test<is_number>},
      {"sequence", plain_test<is_sequence>},
      {"iterable", plain_test<is_iterable>},
      {"callable", plain_test<is_callable>},
      {"sameas", same_as},
      {"escaped", plain_test<is_escaped>},
      {"in", in_test},
      {"==", comparison_test<Comparison::kEqual>},
      {"eq", comparison_test<Comparison::kEqual>},
      {"equalto", comparison_test<Comparison::kEqual>},
      {"!=", comparison_test<Comparison::kNotEqual>},
      {"ne", comparison_test<Comparison::kNotEqual>},
      {">", comparison_test<Comparison::kGreater>},
      {"gt", comparison_test<Comparison::kGreater>},
      {"greaterthan", comparison_test<Comparison::kGreater>},
      {">=", comparison_test<Comparison::kGreaterEqual>},
      {"ge", comparison_test<Comparison::kGreaterEqual>},
      {"<", comparison_test<Comparison::kLess>},
      {"lt", comparison_test<Comparison::kLess>},
      {"lessthan", comparison_test<Comparison::kLess>},
      {"<=", comparison_test<Comparison::kLessEqual>},
      {"le", comparison_test<Comparison::kLessEqual>},
  };
  return table;
}

}  // namespace

Support filter_support(std::string_view name) {
  if (find_filter(name)) return Support::kSupported;
  const bool known =
      std::find(kUnsupportedFilters.begin(), kUnsupportedFilters.end(), name) != kUnsupportedFilters.end();
  return known ? Support::kUnsupported : Support::kUnknown;
}

Support test_support(std::string_view name) {
  return tests().count(name) ? Support::kSupported : Support::kUnknown;
}

Value apply_filter(const std::string& name, const Value& value, Arguments arguments) {
  const Filter filter = find_filter(name);
  if (!filter) fault("no filter named '{}' is supported", name);
  return filter("filter " + name, value, std::move(arguments));
}

bool apply_test(const std::string& name, const Value& value, Arguments arguments) {
  const auto found = tests().find(name);
  if (found == tests().end()) fault("no test named '{}'", name);
  return found->second("test " + name, value, arguments);
}

std::vector<Value> attribute_path(const Value& attribute) {
  if (attribute.is_missing() || attribute.is_none()) return {};
  if (!attribute.is_string()) return {attribute};
  std::vector<Value> path;
  for (std::string_view part : split(attribute.text(), ".", -1, false)) {
    const bool is_number =
        !part.empty() && part.size() < 18 && part.find_first_not_of("0123456789") == std::string_view::npos;
    path.push_back(is_number ? Value::integer(std::stoll(std::string(part)))
                             : Value::string(std::string(part)));
  }
  return path;
}

Value look_up(const Value& value, const Value& attribute) {
  Value out = value;
  for (const Value& part : attribute_path(attribute)) out = get_item(out, part);
  return out;
}

}  // namespace spot::jinja
