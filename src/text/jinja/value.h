// Values of a template with Python's meaning: what the interpreter computes with.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "text/jinja/limits.h"

namespace spot::jinja {

enum class Type {
  kMissing,    // a variable that was never set; never a result of an expression
  kUndefined,  // Jinja's Undefined: empty text, false, iterates over nothing, refuses everything else
  kNone,
  kBool,
  kInt,  // 64 bits; a result beyond them is refused
  kFloat,
  kString,  // UTF-8; lengths and indices count code points
  kList,
  kTuple,
  kDict,  // in order of insertion
  kRange,
  kView,      // dict.keys(), values() and items()
  kIterator,  // a Python generator: consumed once, no length, no text
  kCallable,
  kNamespace,
  kLoop  // the variable `loop`
};

class Value;

// What a value refers to. Immutable once built, except namespaces, iterators and loops.
struct Object {
  virtual ~Object() = default;
  int depth = 1;  // containers: 1 + the deepest element's, at most kMaxValueDepth
};

struct StringObject;
struct ListObject;
struct DictObject;
struct RangeObject;
struct ViewObject;
struct IteratorObject;
struct CallableObject;
struct NamespaceObject;

class Value {
 public:
  Value() = default;  // kMissing
  static Value none() { return Value(Type::kNone); }
  static Value undefined(std::string message);
  static Value boolean(bool value);
  static Value integer(int64_t value);
  static Value real(double value);
  static Value string(std::string text, bool markup = false);
  static Value list(std::vector<Value> items);
  static Value tuple(std::vector<Value> items);
  static Value dict(std::shared_ptr<const DictObject> dict);
  static Value range(int64_t start, int64_t stop, int64_t step);
  static Value object(Type type, std::shared_ptr<Object> object);
  // Values of a JSON document. Throws Error for numbers that JSON's parser may have rounded (beyond 64 bits),
  // ill-formed UTF-8 and nesting beyond kMaxValueDepth.
  static Value from_json(const nlohmann::ordered_json& json);

  Type type() const { return type_; }
  bool is(Type type) const { return type_ == type; }
  bool is_missing() const { return is(Type::kMissing); }
  bool is_undefined() const { return is(Type::kUndefined); }
  bool is_none() const { return is(Type::kNone); }
  bool is_given() const { return !is_missing() && !is_none(); }
  bool is_string() const { return is(Type::kString); }
  bool is_integral() const { return is(Type::kInt) || is(Type::kBool); }  // Python's bool is an int
  bool is_number() const { return is_integral() || is(Type::kFloat); }
  bool is_sequence() const { return is(Type::kList) || is(Type::kTuple); }

  bool as_bool() const { return integer_ != 0; }
  int64_t as_int() const { return integer_; }  // of an integral value
  double as_double() const { return is(Type::kFloat) ? real_ : static_cast<double>(integer_); }
  const std::string& text() const;          // of a string
  bool is_markup() const;                   // a string that `safe` or `escape` has marked
  int64_t num_code_points() const;          // of a string
  bool is_ascii() const;                    // of a string
  const std::vector<Value>& items() const;  // of a list or tuple
  const DictObject& entries() const;        // of a dict
  const RangeObject& as_range() const;
  const ViewObject& as_view() const;
  IteratorObject& as_iterator() const;
  const CallableObject& as_callable() const;
  NamespaceObject& as_namespace() const;
  const std::string& undefined_message() const;
  const std::shared_ptr<Object>& object() const { return object_; }
  int depth() const { return object_ ? object_->depth : 0; }

  bool truth() const;
  std::string_view type_name() const;  // Python's: "str", "NoneType"

 private:
  explicit Value(Type type) : type_(type) {}
  Type type_ = Type::kMissing;
  union {
    int64_t integer_ = 0;
    double real_;
  };
  std::shared_ptr<Object> object_;
};

struct StringObject final : Object {
  explicit StringObject(std::string value, bool is_markup);
  ~StringObject() override;
  const std::string text;
  const bool markup;
  mutable std::atomic<int64_t> num_code_points = -1;  // counted when first asked for
};

struct UndefinedObject final : Object {
  std::string message;
};

struct ListObject final : Object {
  explicit ListObject(std::vector<Value> values);
  ~ListObject() override;
  const std::vector<Value> items;
};

struct DictObject final : Object {
  using Entry = std::pair<Value, Value>;
  ~DictObject() override;
  // Throws for unhashable keys.
  const Value* find(const Value& key) const;
  const Value* find(std::string_view key) const;
  void set(Value key, Value value);
  void set(std::string_view key, Value value) { set(Value::string(std::string(key)), std::move(value)); }
  const std::vector<Entry>& entries() const { return entries_; }
  void clear();

 private:
  ptrdiff_t position(const Value& key) const;
  std::vector<Entry> entries_;
  std::unordered_multimap<size_t, size_t> index_;  // hash of the key to position, for large dicts
};

struct RangeObject final : Object {
  int64_t start, stop, step, length;
  int64_t at(int64_t i) const { return start + i * step; }
};

struct ViewObject final : Object {
  enum class Kind { kKeys, kValues, kItems } kind;
  std::shared_ptr<const DictObject> dict;
};

struct IteratorObject final : Object {
  std::function<bool(Value&)> next;  // false: exhausted
};

// Arguments of a call, filter or test.
struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

struct CallableObject : Object {
  std::string name;  // for errors: "method str.split", "macro 'render'"
  std::function<Value(Arguments)> call;
  std::shared_ptr<const DictObject> attributes;  // what Python sees as attributes of it; may be null
};

struct NamespaceObject final : Object {
  DictObject attributes;
};

// Binds arguments to parameter names as Python does; absent ones stay kMissing. `required`: how many must be
// there. Throws Fault beginning with `what`.
std::vector<Value> bind(const std::string& what, Arguments arguments,
                        const std::vector<std::string_view>& names, size_t required);

// Python's ==, and its hash (throws for unhashable values).
bool equal(const Value& a, const Value& b);
size_t hash(const Value& value);
// Python's a < b, as sorting needs it. Throws Fault for types without order.
bool less(const Value& a, const Value& b);

// Walks any iterable: an iterator for iterators, code points for strings. Throws Fault for the others.
class Iteration {
 public:
  explicit Iteration(const Value& iterable);
  bool next(Value& out);

 private:
  Value source_;
  size_t position_ = 0;
};
std::vector<Value> to_vector(const Value& iterable);
Value make_iterator(const Value& source, std::function<bool(Value&)> next);

// len(), or nothing for a value that has none.
std::optional<int64_t> length_of(const Value& value);

// A string that is markup where `original` is.
inline Value like(const Value& original, std::string text) {
  return Value::string(std::move(text), original.is_markup());
}

}  // namespace spot::jinja
