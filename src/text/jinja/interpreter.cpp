#include "text/jinja/interpreter.h"

#include <algorithm>

#include "text/jinja/filters.h"
#include "text/jinja/format.h"

namespace spot::jinja {

Interpreter::~Interpreter() {
  for (const auto& space : namespaces_) space->attributes.clear();
  for (const auto& scope : captured_scopes_) scope->slots.clear();
  for (const auto& loop : kept_loops_) loop->clear();
}

std::string Interpreter::render(const ScopedBlock& root, const Variables& variables) {
  add_globals();
  for (const auto& [name, value] : variables) context_[name] = value;
  const ScopePtr scope = open(root.loads, nullptr);
  captured_scopes_.push_back(scope);
  std::string out;
  run(root.block, scope, out);
  return out;
}

Interpreter::ScopePtr Interpreter::open(const std::vector<Load>& loads, const ScopePtr& parent) {
  auto scope = std::make_shared<Scope>();
  scope->parent = parent;
  enter(*scope, loads);
  return scope;
}

void Interpreter::enter(Scope& scope, const std::vector<Load>& loads) {
  spend(1 + static_cast<int64_t>(loads.size()) / 4);
  scope.slots.assign(loads.size(), Value());
  for (size_t i = 0; i < loads.size(); ++i) {
    const Load& load = loads[i];
    if (load.kind == Load::Kind::kContext) {
      const auto found = context_.find(load.name);
      if (found != context_.end()) scope.slots[i] = found->second;
    } else if (load.kind == Load::Kind::kOuter && load.slot >= 0) {
      const Scope* outer = scope.parent.get();
      for (int hops = load.hops; hops > 0; --hops) outer = outer->parent.get();
      scope.slots[i] = outer->slots[static_cast<size_t>(load.slot)];
    }
  }
}

void Interpreter::write(std::string& out, std::string_view text) {
  if (static_cast<int64_t>(out.size() + text.size()) > kMaxStringBytes)
    fault("the rendered text is longer than {} MiB", kMaxStringBytes >> 20);
  spend_bytes(text.size());
  out += text;
}

Interpreter::Flow Interpreter::run(const Block& block, const ScopePtr& scope, std::string& out) {
  for (const auto& statement : block)
    if (const Flow flow = run(*statement, scope, out); flow != Flow::kNormal) return flow;
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run(const Statement& statement, const ScopePtr& scope, std::string& out) {
  const Depth depth(*this);
  spend(1);
  line_ = statement.line;
  switch (statement.kind) {
    case Statement::Kind::kOutput:
      for (const auto& expression : statement.expressions) {
        const Value value = evaluate(*expression, scope);
        line_ = expression->line;
        if (value.is_string()) {
          write(out, value.text());
        } else {
          write(out, to_text(value));
        }
      }
      return Flow::kNormal;
    case Statement::Kind::kFor: {
      const Value source = evaluate(*statement.source, scope);
      line_ = statement.line;
      if (!statement.recursive) return run_loop(statement, scope, source, 0, out);
      write(out, recursive_loop(statement, scope, source, 0).text());
      return Flow::kNormal;
    }
    case Statement::Kind::kIf:
      return run_if(statement, scope, out);
    case Statement::Kind::kSet:
      return run_set(statement, scope);
    case Statement::Kind::kSetBlock:
    case Statement::Kind::kFilterBlock:
      return run_captured(statement, scope, out);
    case Statement::Kind::kMacro:
      scope->slots[static_cast<size_t>(statement.slot)] = make_macro(statement, scope);
      hold(256), captured_scopes_.push_back(scope);
      return Flow::kNormal;
    case Statement::Kind::kCallBlock:
      run_call_block(statement, scope, out);
      return Flow::kNormal;
    case Statement::Kind::kGeneration:
      write(out, call_macro(statement, scope, "generation", {}).text());
      return Flow::kNormal;
    case Statement::Kind::kWith:
      return run_with(statement, scope, out);
    case Statement::Kind::kBreak:
      return Flow::kBreak;
    case Statement::Kind::kContinue:
      return Flow::kContinue;
  }
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run_if(const Statement& statement, const ScopePtr& scope, std::string& out) {
  for (const auto& [test, block] : statement.branches)
    if (evaluate(*test, scope).truth()) return run(block, scope, out);
  return run(statement.otherwise.block, scope, out);
}

// --- loops ---

// The items of `source` that the loop's own `if` accepts, tested one by one as the loop asks for them.
Value Interpreter::filtered(const Statement& statement, const ScopePtr& scope, const Value& source) {
  struct State {
    std::unique_ptr<Iteration> iteration;
    ScopePtr scope;
  };
  auto state = std::make_shared<State>();
  return make_iterator(source, [this, &statement, scope, source, state](Value& out) {
    if (!state->iteration) {
      state->iteration = std::make_unique<Iteration>(source);
      state->scope = open(statement.test_loads, scope);
    }
    for (Value item; state->iteration->next(item);) {
      assign(*statement.test_target, item, state->scope);
      if (!evaluate(*statement.test, state->scope).truth()) continue;
      out = evaluate(*statement.test_target, state->scope);
      return true;
    }
    return false;
  });
}

Interpreter::Flow Interpreter::run_loop(const Statement& statement, const ScopePtr& scope,
                                        const Value& source, int64_t nesting, std::string& out) {
  const Value items = statement.test ? filtered(statement, scope, source) : source;
  const auto loop = std::make_shared<LoopObject>(items, nesting);
  const auto& loads = statement.body.loads;
  const bool shows_loop =
      !loads.empty() && loads[0].name == "loop" && loads[0].kind == Load::Kind::kParameter;
  if (statement.recursive) {
    loop->recurse = [this, &statement, scope, nesting](Arguments arguments) {
      const auto bound = bind("loop()", std::move(arguments), {"iterable"}, 1);
      return recursive_loop(statement, scope, bound[0], nesting + 1);
    };
  }
  // a loop that a namespace or a macro keeps would be part of a cycle
  struct Keep {
    std::vector<std::shared_ptr<LoopObject>>& kept;
    const std::shared_ptr<LoopObject>& loop;
    ~Keep() {
      if (loop.use_count() > 1) kept.push_back(loop);
    }
  } keep{kept_loops_, loop};
  const ScopePtr inner = open(loads, scope);
  struct Leave {
    Scope& scope;
    ~Leave() { std::fill(scope.slots.begin(), scope.slots.end(), Value()); }
  } leave{*inner};
  bool finished_one = false, is_first = true;
  for (Value item; loop->advance(item);) {
    if (!is_first) enter(*inner, loads);
    is_first = false;
    if (shows_loop) inner->slots[0] = Value::object(Type::kLoop, loop);
    assign(*statement.target, std::move(item), inner);
    const Flow flow = run(statement.body.block, inner, out);
    if (flow == Flow::kBreak) break;
    // jinja2 notes that there was an iteration at the end of the body, which continue skips
    if (flow == Flow::kNormal) finished_one = true;
    line_ = statement.line;
  }
  if (!finished_one && !statement.otherwise.block.empty())
    return run(statement.otherwise.block, open(statement.otherwise.loads, scope), out);
  return Flow::kNormal;
}

Value Interpreter::recursive_loop(const Statement& statement, const ScopePtr& scope, const Value& source,
                                  int64_t nesting) {
  const Depth depth(*this);
  std::string out;
  run_loop(statement, scope, source, nesting, out);
  return Value::string(std::move(out));
}

// --- assignments ---

void Interpreter::check_namespaces(const Expression& target, const ScopePtr& scope) {
  if (target.kind == Expression::Kind::kTuple) {
    for (const auto& item : target.operands) check_namespaces(*item, scope);
  } else if (target.kind == Expression::Kind::kNamespaceRef &&
             !variable(target, scope)->is(Type::kNamespace)) {
    line_ = target.line;
    fault("set {}.{}: cannot assign attribute on non-namespace object", target.name, target.attribute);
  }
}

void Interpreter::assign(const Expression& target, Value value, const ScopePtr& scope) {
  if (target.kind == Expression::Kind::kName) {
    *variable(target, scope) = std::move(value);
    return;
  }
  if (target.kind == Expression::Kind::kNamespaceRef) {
    if (target.attribute.starts_with("_"))
      fault("set {}.{}: a namespace takes no attribute that begins with an underscore", target.name,
            target.attribute);
    variable(target, scope)->as_namespace().attributes.set(target.attribute, std::move(value));
    return;
  }
  const size_t count = target.operands.size();
  if (value.is_none() || value.is_number() || value.is(Type::kCallable) || value.is(Type::kNamespace))
    fault("cannot unpack non-iterable '{}' object", value.type_name());
  std::vector<Value> items;
  Iteration iteration(value);
  for (Value item; iteration.next(item);) {
    if (items.size() == count) fault("too many values to unpack (expected {})", count);
    items.push_back(std::move(item));
  }
  if (items.size() < count) fault("not enough values to unpack (expected {}, got {})", count, items.size());
  for (size_t i = 0; i < count; ++i) assign(*target.operands[i], std::move(items[i]), scope);
}

Interpreter::Flow Interpreter::run_set(const Statement& statement, const ScopePtr& scope) {
  check_namespaces(*statement.target, scope);
  Value value = evaluate(*statement.source, scope);
  line_ = statement.line;
  assign(*statement.target, std::move(value), scope);
  return Flow::kNormal;
}

// A set or filter block: its text goes through the filters, then into a variable or out.
Interpreter::Flow Interpreter::run_captured(const Statement& statement, const ScopePtr& scope,
                                            std::string& out) {
  const ScopePtr inner = open(statement.body.loads, scope);
  std::string text;
  if (const Flow flow = run(statement.body.block, inner, text); flow != Flow::kNormal) return flow;
  Value value = Value::string(std::move(text));
  if (statement.filter) value = apply_filters(*statement.filter, inner, &value);
  line_ = statement.line;
  if (statement.kind == Statement::Kind::kSetBlock) {
    if (statement.target->kind == Expression::Kind::kNamespaceRef) check_namespaces(*statement.target, scope);
    assign(*statement.target, std::move(value), scope);
    return Flow::kNormal;
  }
  if (!value.is_string()) fault("filter block: the result is of type '{}', not a text", value.type_name());
  write(out, value.text());
  return Flow::kNormal;
}

Interpreter::Flow Interpreter::run_with(const Statement& statement, const ScopePtr& scope, std::string& out) {
  const ScopePtr inner = open(statement.body.loads, scope);
  for (size_t i = 0; i < statement.targets.size(); ++i)
    assign(*statement.targets[i], evaluate(*statement.expressions[i], scope), inner);
  return run(statement.body.block, inner, out);
}

// --- macros ---

Value Interpreter::make_macro(const Statement& statement, const ScopePtr& scope) {
  auto macro = std::make_shared<CallableObject>();
  const std::string name = statement.kind == Statement::Kind::kMacro ? statement.name : "caller";
  macro->name = fmt::format("macro '{}'", name);
  macro->call = [this, &statement, scope, name](Arguments arguments) {
    return call_macro(statement, scope, name, std::move(arguments));
  };
  auto attributes = std::make_shared<DictObject>();
  std::vector<Value> parameters;
  for (const Parameter& parameter : statement.parameters) parameters.push_back(Value::string(parameter.name));
  attributes->set("name", statement.kind == Statement::Kind::kMacro ? Value::string(name) : Value::none());
  attributes->set("arguments", Value::tuple(std::move(parameters)));
  attributes->set("catch_kwargs", Value::boolean(statement.takes_named));
  attributes->set("catch_varargs", Value::boolean(statement.takes_rest));
  attributes->set("caller", Value::boolean(statement.takes_caller));
  if (statement.kind != Statement::Kind::kMacro) macro->name = "macro anonymous";
  macro->attributes = std::move(attributes);
  return Value::object(Type::kCallable, std::move(macro));
}

Value Interpreter::call_macro(const Statement& statement, const ScopePtr& scope, const std::string& name,
                              Arguments arguments) {
  const Depth depth(*this);
  const int call_line = line_;
  const auto& parameters = statement.parameters;
  const ScopePtr inner = open(statement.body.loads, scope);
  const auto slot = [&](std::string_view variable_name) -> Value& {
    for (size_t i = 0; i < statement.body.loads.size(); ++i)
      if (statement.body.loads[i].name == variable_name) return inner->slots[i];
    fault("macro {}: no variable {}", name, variable_name);
  };
  const auto take_named = [&](std::string_view wanted) {
    Value found;
    for (size_t i = 0; i < arguments.named.size(); ++i) {
      if (arguments.named[i].first != wanted) continue;
      found = std::move(arguments.named[i].second);
      arguments.named.erase(arguments.named.begin() + static_cast<ptrdiff_t>(i));
      break;
    }
    return found;
  };
  const size_t given = std::min(arguments.positional.size(), parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i)
    slot(parameters[i].name) = i < given ? arguments.positional[i] : take_named(parameters[i].name);
  if (statement.takes_caller) {
    Value caller = take_named("caller");
    const bool absent = caller.is_missing() || caller.is_none();
    slot("caller") = absent ? Value::undefined("No caller defined") : std::move(caller);
  }
  if (statement.takes_named) {
    auto rest = std::make_shared<DictObject>();
    for (auto& [key, value] : arguments.named) rest->set(key, std::move(value));
    slot("kwargs") = Value::dict(std::move(rest));
  } else if (!arguments.named.empty()) {
    fault("macro '{}' takes no keyword argument '{}'", name, arguments.named[0].first);
  }
  if (statement.takes_rest) {
    slot("varargs") = Value::tuple(
        {arguments.positional.begin() + static_cast<ptrdiff_t>(given), arguments.positional.end()});
  } else if (arguments.positional.size() > parameters.size()) {
    fault("macro '{}' takes not more than {} argument(s)", name, parameters.size());
  }
  for (const Parameter& parameter : parameters) {
    Value& variable_value = slot(parameter.name);
    if (!variable_value.is_missing()) continue;
    Value otherwise = parameter.default_value
                          ? evaluate(*parameter.default_value, inner)
                          : Value::undefined(fmt::format("parameter '{}' was not provided", parameter.name));
    variable_value = std::move(otherwise);
  }
  std::string out;
  run(statement.body.block, inner, out);
  line_ = call_line;
  return Value::string(std::move(out));
}

void Interpreter::run_call_block(const Statement& statement, const ScopePtr& scope, std::string& out) {
  const Value caller = make_macro(statement, scope);
  const Value result = evaluate_call(*statement.call, scope, &caller);
  if (!result.is_string()) fault("call block: the result is of type '{}', not a text", result.type_name());
  write(out, result.text());
}

}  // namespace spot::jinja
