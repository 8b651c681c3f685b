// Attributes and methods of values other than text.
#include <algorithm>
#include <array>

#include "text/jinja/format.h"
#include "text/jinja/loop.h"
#include "text/jinja/operators.h"

namespace spot::jinja {
namespace {

template <size_t n>
bool one_of(const std::string& name, const std::array<std::string_view, n>& names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

// What the sandbox answers for an attribute that would change a list or dict.
Value unsafe(const Value& value, const std::string& name) {
  return Value::undefined(
      fmt::format("access to attribute '{}' of '{}' object is unsafe.", name, value.type_name()));
}

[[noreturn]] void unsupported(const Value& value, const std::string& name) {
  fault("attribute {} of '{}' is not supported", name, value.type_name());
}

Value view_of(const Value& dict, ViewObject::Kind kind) {
  auto view = std::make_shared<ViewObject>();
  view->depth = 1 + dict.depth();
  view->kind = kind;
  view->dict = std::static_pointer_cast<const DictObject>(dict.object());
  return Value::object(Type::kView, std::move(view));
}

Value dict_attribute(const Value& self, const std::string& name) {
  constexpr std::array<std::string_view, 5> kMutators = {"clear", "pop", "popitem", "setdefault", "update"};
  const auto no_arguments = [&](std::function<Value()> body) {
    return method_of(self, name, [name, body = std::move(body)](Arguments arguments) {
      bind("method " + name, std::move(arguments), {}, 0);
      return body();
    });
  };
  if (name == "get") {
    return method_of(self, name, [self](Arguments arguments) {
      if (!arguments.named.empty()) fault("method get takes no keyword arguments");
      const auto bound = bind("method get", std::move(arguments), {"key", "default"}, 1);
      if (const Value* found = self.entries().find(bound[0])) return *found;
      return bound[1].is_missing() ? Value::none() : bound[1];
    });
  }
  if (name == "items") return no_arguments([self] { return view_of(self, ViewObject::Kind::kItems); });
  if (name == "keys") return no_arguments([self] { return view_of(self, ViewObject::Kind::kKeys); });
  if (name == "values") return no_arguments([self] { return view_of(self, ViewObject::Kind::kValues); });
  if (name == "copy") return no_arguments([self] { return self; });
  if (one_of(name, kMutators)) return unsafe(self, name);
  if (name == "fromkeys") unsupported(self, name);
  return Value();
}

Value sequence_attribute(const Value& self, const std::string& name) {
  constexpr std::array<std::string_view, 8> kMutators = {"append", "clear", "pop",    "reverse",
                                                         "insert", "sort",  "extend", "remove"};
  if (name == "count") {
    return method_of(self, name, [self](Arguments arguments) {
      const auto bound = bind("method count", std::move(arguments), {"value"}, 1);
      return Value::integer(std::count_if(self.items().begin(), self.items().end(),
                                          [&](const Value& item) { return equal(item, bound[0]); }));
    });
  }
  if (name == "index") {
    return method_of(self, name, [self](Arguments arguments) {
      const auto bound = bind("method index", std::move(arguments), {"value", "start", "stop"}, 1);
      const auto length = static_cast<int64_t>(self.items().size());
      const auto place = [&](const Value& v, int64_t otherwise) {
        if (v.is_missing()) return otherwise;
        const int64_t at = as_index("method index", v);
        return std::clamp<int64_t>(at < 0 ? at + length : at, 0, length);
      };
      for (int64_t i = place(bound[1], 0); i < place(bound[2], length); ++i)
        if (equal(self.items()[static_cast<size_t>(i)], bound[0])) return Value::integer(i);
      fault("method index: the value is not in the list");
    });
  }
  if (self.is(Type::kTuple)) return Value();
  if (name == "copy") {
    return method_of(self, name, [self](Arguments arguments) {
      bind("method copy", std::move(arguments), {}, 0);
      return self;
    });
  }
  return one_of(name, kMutators) ? unsafe(self, name) : Value();
}

}  // namespace

Value method_of(const Value& self, std::string name, std::function<Value(Arguments)> call) {
  auto callable = std::make_shared<CallableObject>();
  callable->name = "method " + std::move(name);
  callable->depth = 1 + self.depth();
  callable->call = std::move(call);
  return Value::object(Type::kCallable, std::move(callable));
}

Value python_attribute(const Value& value, const std::string& name) {
  if (name.size() > 4 && name.starts_with("__") && name.ends_with("__"))
    fault("attribute {}: Python's internal attributes are not supported", name);
  switch (value.type()) {
    case Type::kString:
      return string_method(value, name);
    case Type::kDict:
      return dict_attribute(value, name);
    case Type::kList:
    case Type::kTuple:
      return sequence_attribute(value, name);
    case Type::kNamespace: {
      const Value* found = value.as_namespace().attributes.find(name);
      return found ? *found : Value();
    }
    case Type::kLoop:
      return loop_of(value).attribute(name, std::static_pointer_cast<LoopObject>(value.object()));
    case Type::kCallable: {
      const CallableObject& callable = value.as_callable();
      const Value* found = callable.attributes ? callable.attributes->find(name) : nullptr;
      return found ? *found : Value();
    }
    case Type::kBool:
    case Type::kInt: {
      constexpr std::array<std::string_view, 9> kNames = {"real",        "imag",      "numerator",
                                                          "denominator", "conjugate", "bit_length",
                                                          "bit_count",   "to_bytes",  "as_integer_ratio"};
      if (one_of(name, kNames) || name == "from_bytes" || name == "is_integer") unsupported(value, name);
      return Value();
    }
    case Type::kFloat: {
      constexpr std::array<std::string_view, 7> kNames = {"real", "imag",    "conjugate",       "is_integer",
                                                          "hex",  "fromhex", "as_integer_ratio"};
      if (one_of(name, kNames)) unsupported(value, name);
      return Value();
    }
    case Type::kRange: {
      const RangeObject& range = value.as_range();
      if (name == "start") return Value::integer(range.start);
      if (name == "stop") return Value::integer(range.stop);
      if (name == "step") return Value::integer(range.step);
      if (name == "count" || name == "index") unsupported(value, name);
      return Value();
    }
    case Type::kView:
      if (name == "mapping" || name == "isdisjoint") unsupported(value, name);
      return Value();
    case Type::kIterator:
      if (name.starts_with("gi_") || name == "send" || name == "throw" || name == "close")
        unsupported(value, name);
      return Value();
    default:
      return Value();
  }
}

}  // namespace spot::jinja
