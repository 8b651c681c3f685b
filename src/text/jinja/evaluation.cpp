// Expressions.
#include "text/jinja/filters.h"
#include "text/jinja/format.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/operators.h"

namespace spot::jinja {

using Kind = Expression::Kind;

Value* Interpreter::variable(const Expression& name, const ScopePtr& scope) {
  if (name.hops < 0) {
    line_ = name.line;
    fault("the variable {} is out of reach here", name.name);
  }
  Scope* holder = scope.get();
  for (int hops = name.hops; hops > 0; --hops) holder = holder->parent.get();
  return &holder->slots[static_cast<size_t>(name.slot)];
}

Value Interpreter::evaluate(const Expression& expression, const ScopePtr& scope) {
  const Depth depth(*this);
  spend(1);
  const auto& operands = expression.operands;
  switch (expression.kind) {
    case Kind::kConstant:
      return expression.value;
    case Kind::kName: {
      const Value& value = *variable(expression, scope);
      return value.is_missing() ? Value::undefined(fmt::format("'{}' is undefined", expression.name)) : value;
    }
    case Kind::kCondition:
      if (evaluate(*operands[0], scope).truth()) return evaluate(*operands[1], scope);
      if (operands.size() > 2) return evaluate(*operands[2], scope);
      return Value::undefined(fmt::format(
          "the inline if-expression on line {} evaluated to false and no else section was defined.",
          expression.line));
    case Kind::kAnd: {
      Value left = evaluate(*operands[0], scope);
      return left.truth() ? evaluate(*operands[1], scope) : left;
    }
    case Kind::kOr: {
      Value left = evaluate(*operands[0], scope);
      return left.truth() ? left : evaluate(*operands[1], scope);
    }
    case Kind::kNot:
      return Value::boolean(!evaluate(*operands[0], scope).truth());
    case Kind::kCompare:
      return evaluate_compare(expression, scope);
    case Kind::kDict:
      return evaluate_dict(expression, scope);
    case Kind::kCall:
      return evaluate_call(expression, scope, nullptr);
    case Kind::kFilter:
      return apply_filters(expression, scope, nullptr);
    case Kind::kSlice:
      return evaluate_slice(expression, scope);
    case Kind::kTest: {
      const Value value = evaluate(*operands[0], scope);
      Arguments arguments = evaluate_arguments(expression.arguments, scope);
      line_ = expression.line;
      return Value::boolean(apply_test(expression.name, value, std::move(arguments)));
    }
    case Kind::kAttribute: {
      const Value value = evaluate(*operands[0], scope);
      line_ = expression.line;
      return get_attribute(value, expression.name);
    }
    case Kind::kItem: {
      const Value value = evaluate(*operands[0], scope);
      const Value key = evaluate(*operands[1], scope);
      line_ = expression.line;
      return get_item(value, key);
    }
    case Kind::kBinary: {
      const Value left = evaluate(*operands[0], scope);
      const Value right = evaluate(*operands[1], scope);
      line_ = expression.line;
      return apply(expression.op, left, right);
    }
    case Kind::kNegate:
    case Kind::kPlus: {
      const Value value = evaluate(*operands[0], scope);
      line_ = expression.line;
      return expression.kind == Kind::kNegate ? negate(value) : plus(value);
    }
    case Kind::kList:
    case Kind::kTuple:
    case Kind::kConcat:
      return evaluate_operands(expression, scope);
    case Kind::kNamespaceRef:
      break;
  }
  fault("a namespace attribute is no expression");
}

Value Interpreter::evaluate_operands(const Expression& expression, const ScopePtr& scope) {
  std::vector<Value> values;
  values.reserve(expression.operands.size());
  for (const auto& operand : expression.operands) values.push_back(evaluate(*operand, scope));
  line_ = expression.line;
  if (expression.kind == Kind::kList) return Value::list(std::move(values));
  if (expression.kind == Kind::kTuple) return Value::tuple(std::move(values));
  std::string text;
  for (const Value& value : values) {
    text += value.is_string() ? value.text() : to_text(value);
    if (static_cast<int64_t>(text.size()) > kMaxStringBytes)
      fault("operator ~: a text of more than {} MiB", kMaxStringBytes >> 20);
  }
  return Value::string(std::move(text));
}

Value Interpreter::evaluate_dict(const Expression& expression, const ScopePtr& scope) {
  auto dict = std::make_shared<DictObject>();
  for (size_t i = 0; i < expression.operands.size(); i += 2) {
    Value key = evaluate(*expression.operands[i], scope);
    Value value = evaluate(*expression.operands[i + 1], scope);
    line_ = expression.line;
    dict->set(std::move(key), std::move(value));
  }
  return Value::dict(std::move(dict));
}

Value Interpreter::evaluate_compare(const Expression& expression, const ScopePtr& scope) {
  Value left = evaluate(*expression.operands[0], scope);
  for (size_t i = 0; i < expression.comparisons.size(); ++i) {
    Value right = evaluate(*expression.operands[i + 1], scope);
    line_ = expression.line;
    if (!compare(expression.comparisons[i], left, right)) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

Value Interpreter::evaluate_slice(const Expression& expression, const ScopePtr& scope) {
  const Value value = evaluate(*expression.operands[0], scope);
  Value bounds[3];
  for (size_t i = 0; i < 3; ++i)
    if (expression.operands[i + 1]) bounds[i] = evaluate(*expression.operands[i + 1], scope);
  line_ = expression.line;
  return slice(value, bounds[0], bounds[1], bounds[2]);
}

Arguments Interpreter::evaluate_arguments(const ArgumentList& list, const ScopePtr& scope) {
  Arguments arguments;
  for (const auto& argument : list.positional) arguments.positional.push_back(evaluate(*argument, scope));
  for (const auto& [name, argument] : list.named)
    arguments.named.emplace_back(name, evaluate(*argument, scope));
  if (list.rest) {
    for (Value& value : to_vector(evaluate(*list.rest, scope)))
      arguments.positional.push_back(std::move(value));
  }
  if (list.named_rest) {
    const Value more = evaluate(*list.named_rest, scope);
    require_defined(more);
    if (!more.is(Type::kDict)) fault("argument after ** must be a mapping, not '{}'", more.type_name());
    for (const auto& [name, value] : more.entries().entries()) {
      if (!name.is_string()) fault("keywords must be strings");
      for (const auto& [other, ignored] : arguments.named)
        if (other == name.text()) fault("multiple values for keyword argument '{}'", other);
      arguments.named.emplace_back(name.text(), value);
    }
  }
  return arguments;
}

Value Interpreter::call(const Value& callee, Arguments arguments) {
  const Depth depth(*this);
  require_defined(callee);
  if (callee.is(Type::kLoop)) {
    if (!loop_of(callee).recurse)
      fault("loop(): the loop must have the 'recursive' marker to be called recursively");
    const auto recurse = loop_of(callee).recurse;
    return recurse(std::move(arguments));
  }
  if (!callee.is(Type::kCallable)) fault("'{}' object is not callable", callee.type_name());
  return callee.as_callable().call(std::move(arguments));
}

Value Interpreter::evaluate_call(const Expression& expression, const ScopePtr& scope, const Value* caller) {
  const Value callee = evaluate(*expression.operands[0], scope);
  Arguments arguments = evaluate_arguments(expression.arguments, scope);
  if (caller) {
    for (const auto& [name, value] : arguments.named)
      if (name == "caller") fault("keyword argument repeated: caller");
    arguments.named.emplace_back("caller", *caller);
  }
  line_ = expression.line;
  return call(callee, std::move(arguments));
}

// `innermost` stands for the missing operand of the first filter in a set or filter block.
Value Interpreter::apply_filters(const Expression& expression, const ScopePtr& scope,
                                 const Value* innermost) {
  const Depth depth(*this);
  Value value;
  if (!expression.operands[0]) {
    value = *innermost;
  } else if (innermost && expression.operands[0]->kind == Kind::kFilter) {
    value = apply_filters(*expression.operands[0], scope, innermost);
  } else {
    value = evaluate(*expression.operands[0], scope);
  }
  Arguments arguments = evaluate_arguments(expression.arguments, scope);
  line_ = expression.line;
  return apply_filter(expression.name, value, std::move(arguments));
}

}  // namespace spot::jinja
