#include "text/jinja/operators.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "text/jinja/format.h"
#include "text/jinja/loop.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

constexpr std::array<std::string_view, 7> kSymbols = {"+", "-", "*", "/", "//", "%", "**"};

[[noreturn]] void no_operator(Operator op, const Value& a, const Value& b) {
  fault("operator {}: not defined between '{}' and '{}'", kSymbols[static_cast<size_t>(op)], a.type_name(),
        b.type_name());
}

[[noreturn]] void too_large(Operator op) {
  fault("operator {}: an integer beyond 64 bits is not supported", kSymbols[static_cast<size_t>(op)]);
}

int64_t floor_divide(int64_t a, int64_t b) {
  const int64_t quotient = a / b;
  return (a % b != 0 && (a < 0) != (b < 0)) ? quotient - 1 : quotient;
}

double floor_modulo(double a, double b) {
  double rest = std::fmod(a, b);
  if (rest != 0) {
    if ((b < 0) != (rest < 0)) rest += b;
  } else {
    rest = std::copysign(0.0, b);
  }
  return rest;
}

double floor_divide(double a, double b) {
  const double quotient = (a - floor_modulo(a, b)) / b;
  if (quotient == 0) return std::copysign(0.0, a / b);
  const double whole = std::floor(quotient);
  return quotient - whole > 0.5 ? whole + 1 : whole;
}

Value integer_power(int64_t base, int64_t exponent) {
  if (exponent < 0) {
    if (base == 0) fault("operator **: 0 to a negative power");
    return Value::real(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  int64_t out = 1;
  while (exponent > 0) {
    if ((exponent & 1) && __builtin_mul_overflow(out, base, &out)) too_large(Operator::kPower);
    exponent >>= 1;
    if (exponent > 0 && __builtin_mul_overflow(base, base, &base)) {
      // base stays in use only if a further bit is set, which is so whenever exponent > 0
      too_large(Operator::kPower);
    }
  }
  return Value::integer(out);
}

Value integers(Operator op, int64_t a, int64_t b) {
  int64_t out = 0;
  bool overflow = false;
  switch (op) {
    case Operator::kAdd:
      overflow = __builtin_add_overflow(a, b, &out);
      break;
    case Operator::kSubtract:
      overflow = __builtin_sub_overflow(a, b, &out);
      break;
    case Operator::kMultiply:
      overflow = __builtin_mul_overflow(a, b, &out);
      break;
    case Operator::kDivide:
      if (b == 0) fault("operator /: division by zero");
      if (std::abs(static_cast<double>(a)) > 0x1p53 || std::abs(static_cast<double>(b)) > 0x1p53)
        too_large(op);
      return Value::real(static_cast<double>(a) / static_cast<double>(b));
    case Operator::kFloorDivide:
    case Operator::kModulo:
      if (b == 0) fault("operator {}: division by zero", kSymbols[static_cast<size_t>(op)]);
      if (a == INT64_MIN && b == -1) too_large(op);
      out = op == Operator::kModulo ? a - floor_divide(a, b) * b : floor_divide(a, b);
      break;
    case Operator::kPower:
      return integer_power(a, b);
  }
  if (overflow) too_large(op);
  return Value::integer(out);
}

Value reals(Operator op, double a, double b) {
  switch (op) {
    case Operator::kAdd:
      return Value::real(a + b);
    case Operator::kSubtract:
      return Value::real(a - b);
    case Operator::kMultiply:
      return Value::real(a * b);
    case Operator::kPower: {
      if (a == 0 && b < 0) fault("operator **: 0.0 to a negative power");
      if (a < 0 && b != std::floor(b)) fault("operator **: a complex number is not supported");
      const double out = std::pow(a, b);
      if (std::isinf(out) && std::isfinite(a) && std::isfinite(b)) fault("operator **: result too large");
      return Value::real(out);
    }
    default:
      break;
  }
  if (b == 0) fault("operator {}: division by zero", kSymbols[static_cast<size_t>(op)]);
  if (op == Operator::kDivide) return Value::real(a / b);
  return Value::real(op == Operator::kModulo ? floor_modulo(a, b) : floor_divide(a, b));
}

Value repeated(const Value& value, int64_t times) {
  times = std::max<int64_t>(times, 0);
  if (value.is_string()) {
    const std::string& text = value.text();
    if (!text.empty() && times > kMaxStringBytes / static_cast<int64_t>(text.size()))
      fault("operator *: a text of more than {} MiB", kMaxStringBytes >> 20);
    std::string out;
    if (text.empty()) times = 0;
    out.reserve(text.size() * static_cast<size_t>(times));
    for (int64_t i = 0; i < times; ++i) out += text;
    return Value::string(std::move(out), value.is_markup());
  }
  const auto& items = value.items();
  if (!items.empty() && times > 4'000'000 / static_cast<int64_t>(items.size()))
    fault("operator *: a list of more than 4000000 elements");
  std::vector<Value> out;
  if (items.empty()) times = 0;
  for (int64_t i = 0; i < times; ++i) out.insert(out.end(), items.begin(), items.end());
  return value.is(Type::kList) ? Value::list(std::move(out)) : Value::tuple(std::move(out));
}

bool is_repeatable(const Value& value) {
  return value.is_string() || value.is_sequence();
}

// Where a slice begins, ends and strides within `length` elements, as Python's slice.indices.
struct Bounds {
  int64_t start, stop, step;
};

Bounds bounds_of(const Value& start, const Value& stop, const Value& step, int64_t length) {
  Bounds out{};
  const auto given = [](const Value& v) { return !v.is_missing() && !v.is_none(); };
  out.step = given(step) ? as_index("slice step", step) : 1;
  if (out.step == 0) fault("slice step cannot be zero");
  out.step = std::clamp<int64_t>(out.step, -INT64_MAX / 2, INT64_MAX / 2);
  const int64_t lowest = out.step < 0 ? -1 : 0, highest = out.step < 0 ? length - 1 : length;
  const auto place = [&](const Value& v, int64_t otherwise) {
    if (!given(v)) return otherwise;
    int64_t at = as_index("slice bound", v);
    if (at < 0) at = at < -length ? lowest : std::max(at + length, lowest);
    return std::min(at, highest);
  };
  out.start = place(start, out.step < 0 ? highest : lowest);
  out.stop = place(stop, out.step < 0 ? lowest : highest);
  return out;
}

// Byte offsets of the code points of `text`, and its end.
std::vector<size_t> offsets_of(const std::string& text) {
  spend(static_cast<int64_t>(text.size()) / 8 + 1);
  std::vector<size_t> offsets;
  for (size_t i = 0; i < text.size();) {
    offsets.push_back(i);
    next_code_point(text, i);
  }
  offsets.push_back(text.size());
  return offsets;
}

Value slice_string(const Value& value, const Bounds& b) {
  const std::string& text = value.text();
  const bool markup = value.is_markup();
  const bool ascii = value.is_ascii();
  if (b.step == 1) {
    if (b.start >= b.stop) return Value::string("", markup);
    if (ascii)
      return Value::string(text.substr(static_cast<size_t>(b.start), static_cast<size_t>(b.stop - b.start)),
                           markup);
    const auto offsets = offsets_of(text);
    const size_t from = offsets[static_cast<size_t>(b.start)];
    return Value::string(text.substr(from, offsets[static_cast<size_t>(b.stop)] - from), markup);
  }
  std::string out;
  const auto offsets = ascii ? std::vector<size_t>() : offsets_of(text);
  for (int64_t i = b.start; b.step > 0 ? i < b.stop : i > b.stop; i += b.step) {
    spend(1);
    if (ascii) {
      out += text[static_cast<size_t>(i)];
    } else {
      const size_t from = offsets[static_cast<size_t>(i)];
      out += text.substr(from, offsets[static_cast<size_t>(i) + 1] - from);
    }
  }
  return Value::string(std::move(out), markup);
}

// value[key] by Python's own rules; kMissing where Python raises TypeError or LookupError.
Value python_item(const Value& value, const Value& key) {
  const auto index = [&](int64_t length) -> int64_t {
    if (!key.is_integral()) return -1;
    const int64_t at = key.as_int() < 0 ? key.as_int() + length : key.as_int();
    return at >= 0 && at < length ? at : -1;
  };
  switch (value.type()) {
    case Type::kList:
    case Type::kTuple: {
      const int64_t at = index(static_cast<int64_t>(value.items().size()));
      return at < 0 ? Value() : value.items()[static_cast<size_t>(at)];
    }
    case Type::kString: {
      if (!key.is_integral()) return Value();
      const int64_t at = index(value.num_code_points());
      if (at < 0) return Value();
      return slice_string(value, {at, at + 1, 1});
    }
    case Type::kRange: {
      const int64_t at = index(value.as_range().length);
      return at < 0 ? Value() : Value::integer(value.as_range().at(at));
    }
    case Type::kDict: {
      if (key.is(Type::kList) || key.is(Type::kDict) || key.is(Type::kView)) return Value();
      const Value* found = value.entries().find(key);
      return found ? *found : Value();
    }
    case Type::kUndefined:
      fault("{}", value.undefined_message());
    default:
      return Value();
  }
}

std::string described(const Value& value) {
  return value.is_none() ? std::string("None") : fmt::format("{} object", value.type_name());
}

Value no_attribute(const Value& value, const Value& name) {
  if (name.is_string())
    return Value::undefined(fmt::format("'{}' has no attribute {}", described(value), repr(name)));
  return Value::undefined(fmt::format(
      "{} has no element {}", described(value),
      name.is(Type::kCallable) || name.is(Type::kIterator) ? std::string("of that kind") : repr(name)));
}

}  // namespace

void require_defined(const Value& value) {
  if (value.is_undefined()) fault("{}", value.undefined_message());
}

int64_t as_index(const std::string& what, const Value& value) {
  require_defined(value);
  if (!value.is_integral()) fault("{}: '{}' object is not an integer", what, value.type_name());
  return value.as_int();
}

Value apply(Operator op, const Value& a, const Value& b) {
  // text % undefined formats the empty text; everything else refuses undefined operands
  if (!(op == Operator::kModulo && a.is_string())) require_defined(a), require_defined(b);
  if (a.is_integral() && b.is_integral()) return integers(op, a.as_int(), b.as_int());
  if (a.is_number() && b.is_number()) return reals(op, a.as_double(), b.as_double());
  if (op == Operator::kAdd) {
    if (a.is_string() && b.is_string()) {
      if (a.is_markup() || b.is_markup()) {
        return Value::string((a.is_markup() ? a.text() : escape_html(a.text())) +
                                 (b.is_markup() ? b.text() : escape_html(b.text())),
                             true);
      }
      return Value::string(a.text() + b.text());
    }
    if (a.is_sequence() && a.type() == b.type()) {
      std::vector<Value> items = a.items();
      items.insert(items.end(), b.items().begin(), b.items().end());
      return a.is(Type::kList) ? Value::list(std::move(items)) : Value::tuple(std::move(items));
    }
  }
  if (op == Operator::kMultiply) {
    if (is_repeatable(a) && b.is_integral()) return repeated(a, b.as_int());
    if (is_repeatable(b) && a.is_integral()) return repeated(b, a.as_int());
  }
  if (op == Operator::kModulo && a.is_string()) {
    if (a.is_markup()) fault("operator %: formatting a text marked safe is not supported");
    return Value::string(percent_format(a.text(), b));
  }
  no_operator(op, a, b);
}

Value negate(const Value& value) {
  require_defined(value);
  if (value.is(Type::kFloat)) return Value::real(-value.as_double());
  if (!value.is_integral()) fault("operator -: not defined for '{}'", value.type_name());
  if (value.as_int() == INT64_MIN) too_large(Operator::kSubtract);
  return Value::integer(-value.as_int());
}

Value plus(const Value& value) {
  require_defined(value);
  if (!value.is_number()) fault("operator +: not defined for '{}'", value.type_name());
  return value.is(Type::kBool) ? Value::integer(value.as_int()) : value;
}

bool contains(const Value& container, const Value& item) {
  switch (container.type()) {
    case Type::kString:
      if (!item.is_string())
        fault("operator in: '{}' is not text, but is looked for in a text", item.type_name());
      spend_bytes(container.text().size());
      return container.text().find(item.text()) != std::string::npos;
    case Type::kDict:
      return container.entries().find(item) != nullptr;
    case Type::kRange:
      if (item.is_integral() || (item.is(Type::kFloat) && std::floor(item.as_double()) == item.as_double() &&
                                 std::abs(item.as_double()) < 0x1p62)) {
        const RangeObject& range = container.as_range();
        const auto value = item.is_integral() ? item.as_int() : static_cast<int64_t>(item.as_double());
        if (range.length == 0) return false;
        const int64_t low = std::min(range.start, range.at(range.length - 1));
        const int64_t high = std::max(range.start, range.at(range.length - 1));
        return value >= low && value <= high && (value - range.start) % range.step == 0;
      }
      return false;
    case Type::kView:
      if (container.as_view().kind == ViewObject::Kind::kKeys)
        return container.as_view().dict->find(item) != nullptr;
      [[fallthrough]];
    case Type::kUndefined:
    case Type::kList:
    case Type::kTuple:
    case Type::kIterator: {
      Iteration iteration(container);
      for (Value element; iteration.next(element);)
        if (equal(element, item)) return true;
      return false;
    }
    default:
      fault("operator in: argument of type '{}' is not iterable", container.type_name());
  }
}

bool compare(Comparison op, const Value& a, const Value& b) {
  const auto is_nan = [](const Value& v) { return v.is(Type::kFloat) && std::isnan(v.as_double()); };
  switch (op) {
    case Comparison::kEqual:
      return equal(a, b);
    case Comparison::kNotEqual:
      return !equal(a, b);
    case Comparison::kLess:
      return less(a, b);
    case Comparison::kGreater:
      return less(b, a);
    case Comparison::kLessEqual:
    case Comparison::kGreaterEqual: {
      const bool swapped = op == Comparison::kGreaterEqual;
      const bool below = swapped ? less(b, a) : less(a, b);  // also refuses what has no order
      if (is_nan(a) || is_nan(b)) return false;
      return below || equal(a, b);
    }
    case Comparison::kIn:
      return contains(b, a);
    case Comparison::kNotIn:
      return !contains(b, a);
  }
  return false;
}

std::optional<int64_t> length_of(const Value& value) {
  switch (value.type()) {
    case Type::kUndefined:
      return 0;
    case Type::kString:
      return value.num_code_points();
    case Type::kList:
    case Type::kTuple:
      return static_cast<int64_t>(value.items().size());
    case Type::kDict:
      return static_cast<int64_t>(value.entries().entries().size());
    case Type::kRange:
      return value.as_range().length;
    case Type::kView:
      return static_cast<int64_t>(value.as_view().dict->entries().size());
    case Type::kLoop:
      return loop_of(value).length();
    default:
      return std::nullopt;
  }
}

Value get_attribute(const Value& value, const std::string& name) {
  if (value.is_undefined()) fault("{}", value.undefined_message());
  Value found = python_attribute(value, name);
  if (!found.is_missing()) return found;
  const Value key = Value::string(name);
  found = python_item(value, key);
  return found.is_missing() ? no_attribute(value, key) : found;
}

Value get_item(const Value& value, const Value& key) {
  Value found = python_item(value, key);
  if (!found.is_missing()) return found;
  if (key.is_string()) found = python_attribute(value, key.text());
  return found.is_missing() ? no_attribute(value, key) : found;
}

Value slice(const Value& value, const Value& start, const Value& stop, const Value& step) {
  require_defined(value);
  const bool sliceable = value.is_string() || value.is_sequence() || value.is(Type::kRange);
  if (!sliceable) fault("slice: '{}' object cannot be sliced", value.type_name());
  const Bounds b = bounds_of(start, stop, step, *length_of(value));
  if (value.is_string()) return slice_string(value, b);
  if (value.is(Type::kRange)) {
    const RangeObject& range = value.as_range();
    return Value::range(range.at(b.start), range.at(b.stop), range.step * b.step);
  }
  std::vector<Value> out;
  for (int64_t i = b.start; b.step > 0 ? i < b.stop : i > b.stop; i += b.step)
    out.push_back(value.items()[static_cast<size_t>(i)]);
  return value.is(Type::kList) ? Value::list(std::move(out)) : Value::tuple(std::move(out));
}

}  // namespace spot::jinja
