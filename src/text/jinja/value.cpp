#include "text/jinja/value.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

constexpr int64_t kElementBytes = 2 * sizeof(Value);
constexpr size_t kLinearSearch = 8;  // a dict of at most so many entries is searched without an index

int depth_of(const std::vector<Value>& items) {
  int depth = 0;
  for (const Value& item : items) depth = std::max(depth, item.depth());
  return depth;
}

int checked_depth(int depth) {
  if (depth > kMaxValueDepth) fault("lists and dicts are nested more than {} deep", kMaxValueDepth);
  return depth;
}

// An int and a float compared exactly, as Python does it: -1, 0, 1, or 2 for a NaN.
int compare_numbers(const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) return (a.as_int() > b.as_int()) - (a.as_int() < b.as_int());
  static_assert(sizeof(long double) > 8, "64-bit integers must fit into a long double");
  const auto wide = [](const Value& v) {
    return v.is_integral() ? static_cast<long double>(v.as_int()) : static_cast<long double>(v.as_double());
  };
  const long double x = wide(a), y = wide(b);
  if (std::isnan(x) || std::isnan(y)) return 2;
  return (x > y) - (x < y);
}

Value json_value(const nlohmann::ordered_json& json, int depth) {
  using Kind = nlohmann::ordered_json::value_t;
  if (depth > kMaxValueDepth) fail("JSON nested more than {} deep", kMaxValueDepth);
  switch (json.type()) {
    case Kind::null:
      return Value::none();
    case Kind::boolean:
      return Value::boolean(json.get<bool>());
    case Kind::number_integer:
      return Value::integer(json.get<int64_t>());
    case Kind::number_unsigned:
      if (json.get<uint64_t>() > INT64_MAX) fail("the number {} is beyond 64 bits", json.get<uint64_t>());
      return Value::integer(json.get<int64_t>());
    case Kind::number_float: {
      const double number = json.get<double>();
      if (std::fabs(number) >= 0x1p63 && std::isfinite(number))
        fail("the number {} may be an integer beyond 64 bits, which a template cannot be given", number);
      return Value::real(number);
    }
    case Kind::string: {
      const auto& text = json.get_ref<const std::string&>();
      if (find_invalid_utf8(text) != std::string::npos) fail("a text that is not UTF-8");
      return Value::string(text);
    }
    case Kind::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& item : json) items.push_back(json_value(item, depth + 1));
      return Value::list(std::move(items));
    }
    case Kind::object: {
      auto dict = std::make_shared<DictObject>();
      for (const auto& [key, item] : json.items()) {
        if (find_invalid_utf8(key) != std::string::npos) fail("a key that is not UTF-8");
        dict->set(key, json_value(item, depth + 1));
      }
      return Value::dict(std::move(dict));
    }
    default:
      fail("JSON of a kind that templates do not know");
  }
}

}  // namespace

// --- objects ---

StringObject::StringObject(std::string value, bool is_markup) : text(std::move(value)), markup(is_markup) {
  if (static_cast<int64_t>(text.size()) > kMaxStringBytes)
    fault("a text of more than {} MiB", kMaxStringBytes >> 20);
  spend_bytes(text.size());
  hold(static_cast<int64_t>(text.size()));
}

StringObject::~StringObject() {
  release(static_cast<int64_t>(text.size()));
}

ListObject::ListObject(std::vector<Value> values) : items(std::move(values)) {
  depth = checked_depth(1 + depth_of(items));
  spend(1 + static_cast<int64_t>(items.size()));
  hold(kElementBytes * static_cast<int64_t>(items.size()));
}

ListObject::~ListObject() {
  release(kElementBytes * static_cast<int64_t>(items.size()));
}

DictObject::~DictObject() {
  release(2 * kElementBytes * static_cast<int64_t>(entries_.size()));
}

void DictObject::clear() {
  release(2 * kElementBytes * static_cast<int64_t>(entries_.size()));
  index_.clear();
  auto entries = std::move(entries_);
  entries_.clear();
}

ptrdiff_t DictObject::position(const Value& key) const {
  const size_t code = hash(key);
  if (entries_.size() <= kLinearSearch) {
    for (size_t i = 0; i < entries_.size(); ++i)
      if (equal(entries_[i].first, key)) return static_cast<ptrdiff_t>(i);
    return -1;
  }
  const auto [first, last] = index_.equal_range(code);
  for (auto it = first; it != last; ++it)
    if (equal(entries_[it->second].first, key)) return static_cast<ptrdiff_t>(it->second);
  return -1;
}

const Value* DictObject::find(const Value& key) const {
  const ptrdiff_t at = position(key);
  return at < 0 ? nullptr : &entries_[static_cast<size_t>(at)].second;
}

const Value* DictObject::find(std::string_view key) const {
  if (entries_.size() > kLinearSearch) return find(Value::string(std::string(key)));
  for (const auto& [name, value] : entries_)
    if (name.is_string() && name.text() == key) return &value;
  return nullptr;
}

void DictObject::set(Value key, Value value) {
  depth = std::max(depth, checked_depth(1 + std::max(key.depth(), value.depth())));
  const ptrdiff_t at = position(key);
  if (at >= 0) {
    entries_[static_cast<size_t>(at)].second = std::move(value);
    return;
  }
  spend(1);
  hold(2 * kElementBytes);
  entries_.emplace_back(std::move(key), std::move(value));
  if (entries_.size() == kLinearSearch + 1) {
    for (size_t i = 0; i < entries_.size(); ++i) index_.emplace(hash(entries_[i].first), i);
  } else if (entries_.size() > kLinearSearch) {
    index_.emplace(hash(entries_.back().first), entries_.size() - 1);
  }
}

// --- values ---

Value Value::undefined(std::string message) {
  auto object = std::make_shared<UndefinedObject>();
  object->message = std::move(message);
  return Value::object(Type::kUndefined, std::move(object));
}

Value Value::boolean(bool value) {
  Value out(Type::kBool);
  out.integer_ = value;
  return out;
}

Value Value::integer(int64_t value) {
  Value out(Type::kInt);
  out.integer_ = value;
  return out;
}

Value Value::real(double value) {
  Value out(Type::kFloat);
  out.real_ = value;
  return out;
}

Value Value::string(std::string text, bool markup) {
  return object(Type::kString, std::make_shared<StringObject>(std::move(text), markup));
}

Value Value::list(std::vector<Value> items) {
  return object(Type::kList, std::make_shared<ListObject>(std::move(items)));
}

Value Value::tuple(std::vector<Value> items) {
  return object(Type::kTuple, std::make_shared<ListObject>(std::move(items)));
}

Value Value::dict(std::shared_ptr<const DictObject> dict) {
  return object(Type::kDict, std::const_pointer_cast<DictObject>(std::move(dict)));
}

Value Value::range(int64_t start, int64_t stop, int64_t step) {
  auto object = std::make_shared<RangeObject>();
  object->start = start, object->stop = stop, object->step = step;
  const __int128 span = step > 0 ? static_cast<__int128>(stop) - start : static_cast<__int128>(start) - stop;
  const __int128 stride = step > 0 ? step : -static_cast<__int128>(step);
  const __int128 length = span > 0 ? (span + stride - 1) / stride : 0;
  if (length > INT64_MAX) fault("a range too large to count");
  object->length = static_cast<int64_t>(length);
  return Value::object(Type::kRange, std::move(object));
}

Value Value::object(Type type, std::shared_ptr<Object> object) {
  Value out(type);
  out.object_ = std::move(object);
  return out;
}

Value Value::from_json(const nlohmann::ordered_json& json) {
  return json_value(json, 1);
}

const std::string& Value::text() const {
  return static_cast<const StringObject&>(*object_).text;
}
bool Value::is_markup() const {
  return is_string() && static_cast<const StringObject&>(*object_).markup;
}
int64_t Value::num_code_points() const {
  const auto& string = static_cast<const StringObject&>(*object_);
  if (string.num_code_points < 0) {
    spend_bytes(string.text.size());
    string.num_code_points = std::count_if(string.text.begin(), string.text.end(), [](char c) {
      return (static_cast<unsigned char>(c) & 0xC0) != 0x80;
    });
  }
  return string.num_code_points;
}
bool Value::is_ascii() const {
  return num_code_points() == static_cast<int64_t>(text().size());
}
const std::vector<Value>& Value::items() const {
  return static_cast<const ListObject&>(*object_).items;
}
const DictObject& Value::entries() const {
  return static_cast<const DictObject&>(*object_);
}
const RangeObject& Value::as_range() const {
  return static_cast<const RangeObject&>(*object_);
}
const ViewObject& Value::as_view() const {
  return static_cast<const ViewObject&>(*object_);
}
IteratorObject& Value::as_iterator() const {
  return static_cast<IteratorObject&>(*object_);
}
const CallableObject& Value::as_callable() const {
  return static_cast<const CallableObject&>(*object_);
}
NamespaceObject& Value::as_namespace() const {
  return static_cast<NamespaceObject&>(*object_);
}
const std::string& Value::undefined_message() const {
  return static_cast<const UndefinedObject&>(*object_).message;
}

bool Value::truth() const {
  switch (type_) {
    case Type::kMissing:
    case Type::kUndefined:
    case Type::kNone:
      return false;
    case Type::kBool:
    case Type::kInt:
      return integer_ != 0;
    case Type::kFloat:
      return real_ != 0;
    case Type::kString:
      return !text().empty();
    case Type::kList:
    case Type::kTuple:
    case Type::kDict:
    case Type::kRange:
    case Type::kView:
    case Type::kLoop:
      return *length_of(*this) != 0;
    case Type::kIterator:
    case Type::kCallable:
    case Type::kNamespace:
      return true;
  }
  return false;
}

std::string_view Value::type_name() const {
  switch (type_) {
    case Type::kMissing:
    case Type::kUndefined:
      return "Undefined";
    case Type::kNone:
      return "NoneType";
    case Type::kBool:
      return "bool";
    case Type::kInt:
      return "int";
    case Type::kFloat:
      return "float";
    case Type::kString:
      return is_markup() ? "Markup" : "str";
    case Type::kList:
      return "list";
    case Type::kTuple:
      return "tuple";
    case Type::kDict:
      return "dict";
    case Type::kRange:
      return "range";
    case Type::kView:
      return "dict view";
    case Type::kIterator:
      return "generator";
    case Type::kCallable:
      return "function";
    case Type::kNamespace:
      return "Namespace";
    case Type::kLoop:
      return "LoopContext";
  }
  return "";
}

// --- comparison ---

bool equal(const Value& a, const Value& b) {
  spend(1);
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == 0;
  if (a.type() != b.type()) {
    if (!a.is(Type::kView) || !b.is(Type::kView)) return false;
  }
  switch (a.type()) {
    case Type::kMissing:
    case Type::kUndefined:
    case Type::kNone:
      return true;
    case Type::kString:
      if (a.text().size() == b.text().size()) spend_bytes(a.text().size());
      return a.text() == b.text();
    case Type::kList:
    case Type::kTuple: {
      const auto &x = a.items(), &y = b.items();
      if (x.size() != y.size()) return false;
      for (size_t i = 0; i < x.size(); ++i)
        if (!equal(x[i], y[i])) return false;
      return true;
    }
    case Type::kDict: {
      if (a.entries().entries().size() != b.entries().entries().size()) return false;
      for (const auto& [key, value] : a.entries().entries()) {
        const Value* other = b.entries().find(key);
        if (!other || !equal(value, *other)) return false;
      }
      return true;
    }
    case Type::kRange: {
      const RangeObject &x = a.as_range(), &y = b.as_range();
      if (x.length != y.length) return false;
      return x.length == 0 || (x.start == y.start && (x.length == 1 || x.step == y.step));
    }
    case Type::kView:
      fault("operator ==: views of dicts are not compared here; turn them into lists");
    default:
      return a.object() == b.object();
  }
}

size_t hash(const Value& value) {
  switch (value.type()) {
    case Type::kMissing:
    case Type::kUndefined:
      return 1;
    case Type::kNone:
      return 2;
    case Type::kBool:
    case Type::kInt:
    case Type::kFloat:
      return std::hash<double>()(value.as_double());  // equal numbers are equal as doubles
    case Type::kString:
      spend_bytes(value.text().size());
      return std::hash<std::string>()(value.text());
    case Type::kTuple: {
      size_t code = 17;
      for (const Value& item : value.items()) code = code * 1000003 ^ hash(item);
      return code;
    }
    case Type::kRange:
    case Type::kIterator:
    case Type::kCallable:
    case Type::kNamespace:
    case Type::kLoop:
      if (value.is(Type::kRange)) return 3;
      return std::hash<const void*>()(value.object().get());
    default:
      fault("unhashable type: '{}' as a key", value.type_name());
  }
}

bool less(const Value& a, const Value& b) {
  spend(1);
  if (a.is_undefined()) fault("{}", a.undefined_message());
  if (b.is_undefined()) fault("{}", b.undefined_message());
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == -1;
  if (a.is_string() && b.is_string()) {
    spend_bytes(std::min(a.text().size(), b.text().size()));
    return a.text() < b.text();  // bytes of UTF-8 order as code points do
  }
  if (a.is_sequence() && a.type() == b.type()) {
    const auto &x = a.items(), &y = b.items();
    for (size_t i = 0; i < std::min(x.size(), y.size()); ++i)
      if (!equal(x[i], y[i])) return less(x[i], y[i]);
    return x.size() < y.size();
  }
  fault("operator <: '{}' and '{}' have no order", a.type_name(), b.type_name());
}

// --- iteration ---

Iteration::Iteration(const Value& iterable) : source_(iterable) {
  switch (iterable.type()) {
    case Type::kUndefined:
    case Type::kString:
    case Type::kList:
    case Type::kTuple:
    case Type::kDict:
    case Type::kRange:
    case Type::kView:
    case Type::kIterator:
      return;
    case Type::kLoop:
      fault("iterating over the loop variable itself is not supported");
    default:
      fault("'{}' object is not iterable", iterable.type_name());
  }
}

bool Iteration::next(Value& out) {
  spend(1);
  switch (source_.type()) {
    case Type::kString: {
      const std::string& text = source_.text();
      if (position_ >= text.size()) return false;
      const size_t begin = position_;
      next_code_point(text, position_);
      out = Value::string(text.substr(begin, position_ - begin));
      return true;
    }
    case Type::kList:
    case Type::kTuple:
      if (position_ >= source_.items().size()) return false;
      out = source_.items()[position_++];
      return true;
    case Type::kDict:
      if (position_ >= source_.entries().entries().size()) return false;
      out = source_.entries().entries()[position_++].first;
      return true;
    case Type::kView: {
      const ViewObject& view = source_.as_view();
      if (position_ >= view.dict->entries().size()) return false;
      const auto& [key, value] = view.dict->entries()[position_++];
      out = view.kind == ViewObject::Kind::kKeys     ? key
            : view.kind == ViewObject::Kind::kValues ? value
                                                     : Value::tuple({key, value});
      return true;
    }
    case Type::kRange:
      if (static_cast<int64_t>(position_) >= source_.as_range().length) return false;
      out = Value::integer(source_.as_range().at(static_cast<int64_t>(position_++)));
      return true;
    case Type::kIterator:
      return source_.as_iterator().next(out);
    default:
      return false;
  }
}

std::vector<Value> to_vector(const Value& iterable) {
  if (iterable.is_sequence()) {
    spend(static_cast<int64_t>(iterable.items().size()));
    return iterable.items();
  }
  std::vector<Value> out;
  Iteration iteration(iterable);
  for (Value item; iteration.next(item);) {
    hold(kElementBytes);
    release(kElementBytes);
    if (static_cast<int64_t>(out.size()) * kElementBytes > kMaxLiveBytes)
      fault("a list that takes too much memory");
    out.push_back(std::move(item));
  }
  return out;
}

Value make_iterator(const Value& source, std::function<bool(Value&)> next) {
  auto object = std::make_shared<IteratorObject>();
  object->depth = checked_depth(1 + source.depth());
  object->next = std::move(next);
  return Value::object(Type::kIterator, std::move(object));
}

std::vector<Value> bind(const std::string& what, Arguments arguments,
                        const std::vector<std::string_view>& names, size_t required) {
  if (arguments.positional.size() > names.size())
    fault("{} takes at most {} arguments, {} are given", what, names.size(), arguments.positional.size());
  std::vector<Value> bound = std::move(arguments.positional);
  bound.resize(names.size());
  for (auto& [name, value] : arguments.named) {
    const auto at = std::find(names.begin(), names.end(), name);
    if (at == names.end()) fault("{} takes no argument named {}", what, name);
    Value& slot = bound[static_cast<size_t>(at - names.begin())];
    if (!slot.is_missing()) fault("{} is given {} twice", what, name);
    slot = std::move(value);
  }
  for (size_t i = 0; i < required; ++i)
    if (bound[i].is_missing()) fault("{} lacks its argument {}", what, names[i]);
  return bound;
}

}  // namespace spot::jinja
