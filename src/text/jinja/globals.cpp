// What every template finds without being given it: namespace, dict, range, raise_exception, strftime_now.
#include <chrono>
#include <ctime>

#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/operators.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

Value function(std::string name, std::function<Value(Arguments)> call) {
  auto callable = std::make_shared<CallableObject>();
  callable->name = std::move(name);
  callable->call = std::move(call);
  return Value::object(Type::kCallable, std::move(callable));
}

// dict(mapping or pairs, **named).
std::shared_ptr<DictObject> make_dict(const std::string& what, Arguments arguments) {
  if (arguments.positional.size() > 1) fault("{} expected at most 1 argument", what);
  auto dict = std::make_shared<DictObject>();
  for (const Value& source : arguments.positional) {
    if (source.is(Type::kDict)) {
      for (const auto& [key, value] : source.entries().entries()) dict->set(key, value);
      continue;
    }
    if (source.is(Type::kNamespace)) fault("{}: a namespace is not iterable", what);
    for (const Value& pair : to_vector(source)) {
      const auto items = to_vector(pair);
      if (items.size() != 2) fault("{}: an element has length {}, 2 is required", what, items.size());
      dict->set(items[0], items[1]);
    }
  }
  for (auto& [name, value] : arguments.named) dict->set(name, std::move(value));
  return dict;
}

Value range(Arguments arguments) {
  if (!arguments.named.empty()) fault("range() takes no keyword arguments");
  const auto& given = arguments.positional;
  if (given.empty() || given.size() > 3) fault("range() takes 1 to 3 arguments, {} are given", given.size());
  int64_t bounds[3] = {0, 0, 1};
  if (given.size() == 1) {
    bounds[1] = as_index("range()", given[0]);
  } else {
    for (size_t i = 0; i < given.size(); ++i) bounds[i] = as_index("range()", given[i]);
  }
  if (bounds[2] == 0) fault("range(): the step must not be zero");
  const Value out = Value::range(bounds[0], bounds[1], bounds[2]);
  if (out.as_range().length > 100'000) fault("range(): more than 100000 elements");
  return out;
}

Value strftime_now(Arguments arguments) {
  const auto bound = bind("strftime_now()", std::move(arguments), {"format"}, 1);
  if (!bound[0].is_string())
    fault("strftime_now(): the format must be a text, not '{}'", bound[0].type_name());
  const std::string& format = bound[0].text();
  if (format.size() > 1000) fault("strftime_now(): a format of more than 1000 bytes");
  const auto now = std::chrono::system_clock::now();
  const std::time_t seconds = std::chrono::system_clock::to_time_t(now);
  std::tm local{};
  localtime_r(&seconds, &local);
  std::string pattern;
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%' || i + 1 == format.size()) {
      pattern += format[i];
      continue;
    }
    const char letter = format[++i];
    constexpr std::string_view kKnown = "aAbBcdHIjmMpSUwWxXyYGuVDeFhnrRtTklsPgC%";
    if (letter == 'f') {
      const auto parts =
          std::chrono::duration_cast<std::chrono::microseconds>(now.time_since_epoch()).count();
      pattern += fmt::format("{:06}", parts % 1'000'000);
    } else if (letter == 'z' || letter == 'Z' || letter == ':') {
      fault("strftime_now(): time zones (%{}) are not supported", letter);
    } else if (letter == '-' && i + 1 < format.size()) {
      pattern += "%-", pattern += format[++i];
    } else if (kKnown.find(letter) == std::string_view::npos) {
      fault("strftime_now(): the directive %{} is not supported", letter);
    } else {
      pattern += '%', pattern += letter;
    }
  }
  // a space in front, since an empty result looks like too small a buffer
  std::string out(64 + 64 * pattern.size(), '\0');
  out.resize(std::strftime(out.data(), out.size(), (" " + pattern).c_str(), &local));
  return Value::string(out.substr(std::min<size_t>(1, out.size())));
}

Value raise_exception(Arguments arguments) {
  const auto bound = bind("raise_exception()", std::move(arguments), {"message"}, 1);
  fault("the template refuses this conversation: {}", to_text(bound[0]));
}

}  // namespace

Value Interpreter::make_namespace(Arguments arguments) {
  const auto attributes = make_dict("namespace()", std::move(arguments));
  auto space = std::make_shared<NamespaceObject>();
  for (const auto& [key, value] : attributes->entries()) {
    if (key.is_string() && key.text().starts_with("_"))
      fault("namespace(): no attribute may begin with an underscore, {} does", key.text());
    space->attributes.set(key, value);
  }
  hold(256);
  namespaces_.push_back(space);
  return Value::object(Type::kNamespace, std::move(space));
}

void Interpreter::add_globals() {
  context_["range"] = function("range()", range);
  context_["raise_exception"] = function("raise_exception()", raise_exception);
  context_["strftime_now"] = function("strftime_now()", strftime_now);
  context_["namespace"] =
      function("namespace()", [this](Arguments arguments) { return make_namespace(std::move(arguments)); });
  context_["dict"] = function(
      "dict()", [](Arguments arguments) { return Value::dict(make_dict("dict()", std::move(arguments))); });
  for (const char* name : {"lipsum", "cycler", "joiner"}) {
    context_[name] = function(fmt::format("{}()", name), [name](Arguments) -> Value {
      fault("the global function {} is not supported", name);
    });
  }
}

}  // namespace spot::jinja
