// Filters on lists, dicts and other iterables.
#include <algorithm>
#include <unordered_map>

#include "text/jinja/filters.h"
#include "text/jinja/format.h"
#include "text/jinja/operators.h"
#include "text/jinja/strings.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

bool is_set(const Value& value) {
  return !value.is_missing() && value.truth();
}
Value without_case(const Value& value) {
  return value.is_string() ? Value::string(to_lower(value.text())) : value;
}

// A generator whose elements are computed all at once when the first is asked for.
Value generator(const Value& source, std::function<std::vector<Value>()> make) {
  struct State {
    std::vector<Value> items;
    size_t next = 0;
    bool made = false;
  };
  return make_iterator(source, [make = std::move(make), state = std::make_shared<State>()](Value& out) {
    if (!state->made) state->made = true, state->items = make();
    if (state->next == state->items.size()) return false;
    out = std::move(state->items[state->next++]);
    return true;
  });
}

Value first(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  Iteration iteration(value);
  Value item;
  return iteration.next(item) ? item : Value::undefined("No first item, sequence was empty.");
}

Value last(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  if (value.is(Type::kIterator)) fault("{}: a generator is not reversible; make it a list first", what);
  const auto items = to_vector(value);
  return items.empty() ? Value::undefined("No last item, sequence was empty.") : items.back();
}

Value length(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  const auto count = length_of(value);
  if (!count) fault("{}: object of type '{}' has no length", what, value.type_name());
  return Value::integer(*count);
}

Value list(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return Value::list(to_vector(value));
}

Value join(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"d", "attribute"}, 0);
  const std::string separator = bound[0].is_missing() ? "" : to_text(bound[0]);
  std::string out;
  bool is_first = true;
  Iteration iteration(value);
  for (Value item; iteration.next(item);) {
    if (!is_first) out += separator;
    is_first = false;
    out += to_text(look_up(item, bound[1]));
    if (static_cast<int64_t>(out.size()) > kMaxStringBytes)
      fault("{}: a text of more than {} MiB", what, kMaxStringBytes >> 20);
  }
  return Value::string(std::move(out));
}

// What map does to an item: looks up an attribute or applies a filter.
std::function<Value(const Value&)> mapping(const std::string& what, Arguments arguments) {
  const bool by_attribute = arguments.positional.empty() &&
                            std::any_of(arguments.named.begin(), arguments.named.end(),
                                        [](const auto& named) { return named.first == "attribute"; });
  if (!by_attribute) {
    if (arguments.positional.empty()) fault("{} requires a filter argument", what);
    const Value name = arguments.positional[0];
    arguments.positional.erase(arguments.positional.begin());
    if (!name.is_string()) fault("{}: the filter's name must be a text", what);
    return [name, arguments](const Value& item) { return apply_filter(name.text(), item, arguments); };
  }
  const auto bound = bind(what, std::move(arguments), {"attribute", "default"}, 1);
  const Value attribute = bound[0], otherwise = bound[1];
  if (!otherwise.is_given()) return [attribute](const Value& item) { return look_up(item, attribute); };
  return [attribute, otherwise](const Value& item) {
    Value found = item;
    for (const Value& part : attribute_path(attribute)) {
      found = get_item(found, part);
      if (found.is_undefined()) found = otherwise;
    }
    return found;
  };
}

Value map(const std::string& what, const Value& value, Arguments arguments) {
  struct State {
    std::unique_ptr<Iteration> iteration;
    std::function<Value(const Value&)> change;
  };
  return make_iterator(value, [what, value, arguments, state = std::make_shared<State>()](Value& out) {
    if (!state->iteration) {
      if (!value.truth()) return false;
      state->change = mapping(what, arguments);
      state->iteration = std::make_unique<Iteration>(value);
    }
    Value item;
    if (!state->iteration->next(item)) return false;
    out = state->change(item);
    return true;
  });
}

template <bool keep, bool by_attribute>
Value select(const std::string& what, const Value& value, Arguments arguments) {
  struct State {
    std::unique_ptr<Iteration> iteration;
    Value attribute, name;
    Arguments arguments;
  };
  auto state = std::make_shared<State>();
  state->arguments = std::move(arguments);
  return make_iterator(value, [what, value, state](Value& out) {
    if (!state->iteration) {
      if (!value.truth()) return false;
      auto& positional = state->arguments.positional;
      if (by_attribute) {
        if (positional.empty()) fault("{}: missing parameter for attribute name", what);
        state->attribute = positional[0];
        positional.erase(positional.begin());
      }
      if (!positional.empty()) {
        state->name = positional[0];
        if (!state->name.is_string()) fault("{}: the test's name must be a text", what);
        positional.erase(positional.begin());
      }
      state->iteration = std::make_unique<Iteration>(value);
    }
    for (Value item; state->iteration->next(item);) {
      const Value subject = by_attribute ? look_up(item, state->attribute) : item;
      const bool holds = state->name.is_missing() ? subject.truth()
                                                  : apply_test(state->name.text(), subject, state->arguments);
      if (holds != keep) continue;
      out = std::move(item);
      return true;
    }
    return false;
  });
}

// The values that sorting compares: one for each comma-separated attribute.
std::vector<Value> sort_keys(const Value& item, const Value& attribute, bool case_sensitive) {
  std::vector<Value> keys;
  const auto add = [&](const Value& part) {
    const Value found = look_up(item, part);
    keys.push_back(case_sensitive ? found : without_case(found));
  };
  if (attribute.is_string()) {
    for (std::string_view part : split(attribute.text(), ",", -1, false))
      add(Value::string(std::string(part)));
  } else {
    add(attribute);
  }
  return keys;
}

using Keyed = std::pair<Value, Value>;  // key, item

// Python's sorted: stable, also in reverse.
std::vector<Value> sorted(std::vector<Keyed> keyed, bool reverse) {
  if (reverse) std::reverse(keyed.begin(), keyed.end());
  std::stable_sort(keyed.begin(), keyed.end(),
                   [](const Keyed& a, const Keyed& b) { return less(a.first, b.first); });
  if (reverse) std::reverse(keyed.begin(), keyed.end());
  std::vector<Value> out;
  out.reserve(keyed.size());
  for (auto& [key, item] : keyed) out.push_back(std::move(item));
  return out;
}

Value sort(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"reverse", "case_sensitive", "attribute"}, 0);
  std::vector<Keyed> keyed;
  for (const Value& item : to_vector(value))
    keyed.emplace_back(Value::list(sort_keys(item, bound[2], is_set(bound[1]))), item);
  return Value::list(sorted(std::move(keyed), is_set(bound[0])));
}

Value dict_sort(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"case_sensitive", "by", "reverse"}, 0);
  const std::string by = bound[1].is_missing() ? "key" : bound[1].is_string() ? bound[1].text() : "";
  if (by != "key" && by != "value") fault("{}: can only sort by \"key\" or \"value\"", what);
  require_defined(value);
  if (!value.is(Type::kDict)) fault("{}: '{}' is not a dict", what, value.type_name());
  std::vector<Keyed> keyed;
  for (const auto& [key, item] : value.entries().entries()) {
    const Value& subject = by == "key" ? key : item;
    keyed.emplace_back(is_set(bound[0]) ? subject : without_case(subject), Value::tuple({key, item}));
  }
  return Value::list(sorted(std::move(keyed), is_set(bound[2])));
}

template <bool largest>
Value extreme(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"case_sensitive", "attribute"}, 0);
  Value best, best_key;
  Iteration iteration(value);
  for (Value item; iteration.next(item);) {
    const Value found = look_up(item, bound[1]);
    const Value key = is_set(bound[0]) ? found : without_case(found);
    if (!best.is_missing() && !(largest ? less(best_key, key) : less(key, best_key))) continue;
    best = item, best_key = key;
  }
  return best.is_missing() ? Value::undefined("No aggregated item, sequence was empty.") : best;
}

Value sum(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"attribute", "start"}, 0);
  Value total = bound[1].is_missing() ? Value::integer(0) : bound[1];
  if (total.is_string()) fault("{}: can't sum strings", what);
  Iteration iteration(value);
  for (Value item; iteration.next(item);) total = apply(Operator::kAdd, total, look_up(item, bound[0]));
  return total;
}

Value unique(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"case_sensitive", "attribute"}, 0);
  struct State {
    std::unique_ptr<Iteration> iteration;
    DictObject seen;
  };
  return make_iterator(value, [bound, value, state = std::make_shared<State>()](Value& out) {
    if (!state->iteration) state->iteration = std::make_unique<Iteration>(value);
    for (Value item; state->iteration->next(item);) {
      const Value found = look_up(item, bound[1]);
      const Value key = is_set(bound[0]) ? found : without_case(found);
      if (state->seen.find(key)) continue;
      state->seen.set(key, Value::none());
      out = std::move(item);
      return true;
    }
    return false;
  });
}

Value reverse(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  if (value.is_string()) return slice(value, Value::none(), Value::none(), Value::integer(-1));
  std::vector<Value> items = to_vector(value);
  std::reverse(items.begin(), items.end());
  if (value.is(Type::kIterator)) return Value::list(std::move(items));
  return generator(value, [items] { return items; });
}

Value batch(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"linecount", "fill_with"}, 1);
  return generator(value, [what, value, bound] {
    std::vector<Value> rows, row;
    Iteration iteration(value);
    for (Value item; iteration.next(item);) {
      if (equal(Value::integer(static_cast<int64_t>(row.size())), bound[0]))
        rows.push_back(Value::list(std::exchange(row, {})));
      row.push_back(item);
    }
    if (row.empty()) return rows;
    if (bound[1].is_given()) {
      const int64_t count = as_index(what, bound[0]);
      if (count > 1'000'000) fault("{}: a batch of more than 1000000", what);
      while (static_cast<int64_t>(row.size()) < count) row.push_back(bound[1]);
    }
    rows.push_back(Value::list(std::move(row)));
    return rows;
  });
}

Value slice_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"slices", "fill_with"}, 1);
  return generator(value, [what, value, bound] {
    const auto items = to_vector(value);
    const int64_t slices = as_index(what, bound[0]), length = static_cast<int64_t>(items.size());
    if (slices == 0) fault("{}: division by zero", what);
    if (slices > 1'000'000) fault("{}: more than 1000000 slices", what);
    std::vector<Value> out;
    if (slices < 0) return out;
    const int64_t each = length / slices, extra = length % slices;
    auto next = items.begin();
    for (int64_t i = 0; i < slices; ++i) {
      const auto end = next + each + (i < extra ? 1 : 0);
      std::vector<Value> part(next, end);
      if (bound[1].is_given() && i >= extra) part.push_back(bound[1]);
      out.push_back(Value::list(std::move(part)));
      next = end;
    }
    return out;
  });
}

Value items(const std::string& what, const Value& value, Arguments arguments) {
  bind(what, std::move(arguments), {}, 0);
  return generator(value, [what, value] {
    std::vector<Value> pairs;
    if (value.is_undefined()) return pairs;
    if (!value.is(Type::kDict)) fault("{}: Can only get item pairs from a mapping.", what);
    for (const auto& [key, item] : value.entries().entries()) pairs.push_back(Value::tuple({key, item}));
    return pairs;
  });
}

Value default_filter(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"default_value", "boolean"}, 0);
  if (!value.is_undefined() && !(is_set(bound[1]) && !value.truth())) return value;
  return bound[0].is_missing() ? Value::string("") : bound[0];
}

Value attr(const std::string& what, const Value& value, Arguments arguments) {
  const auto bound = bind(what, std::move(arguments), {"name"}, 1);
  if (!bound[0].is_string()) fault("{}: the attribute's name must be a text", what);
  if (value.is_undefined()) fault("{}", value.undefined_message());
  const Value found = python_attribute(value, bound[0].text());
  if (!found.is_missing()) return found;
  return Value::undefined(fmt::format("'{}' object has no attribute {}", value.type_name(), repr(bound[0])));
}

}  // namespace

Filter find_sequence_filter(std::string_view name) {
  static const std::unordered_map<std::string_view, Filter> table = {
      {"first", first},
      {"last", last},
      {"length", length},
      {"count", length},
      {"list", list},
      {"join", join},
      {"map", map},
      {"select", select<true, false>},
      {"reject", select<false, false>},
      {"selectattr", select<true, true>},
      {"rejectattr", select<false, true>},
      {"sort", sort},
      {"dictsort", dict_sort},
      {"min", extreme<false>},
      {"max", extreme<true>},
      {"sum", sum},
      {"unique", unique},
      {"reverse", reverse},
      {"batch", batch},
      {"slice", slice_filter},
      {"items", items},
      {"default", default_filter},
      {"d", default_filter},
      {"attr", attr},
  };
  const auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace spot::jinja
