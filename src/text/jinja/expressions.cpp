// The expressions of Jinja's grammar.
#include <algorithm>
#include <array>
#include <utility>

#include "text/jinja/parser.h"

namespace spot::jinja {
namespace {

using Kind = Expression::Kind;

ExpressionPtr binary(Kind kind, int line, ExpressionPtr left, ExpressionPtr right) {
  auto node = make_expression(kind, line);
  node->operands.push_back(std::move(left));
  node->operands.push_back(std::move(right));
  return node;
}

ExpressionPtr unary(Kind kind, int line, ExpressionPtr operand) {
  auto node = make_expression(kind, line);
  node->operands.push_back(std::move(operand));
  return node;
}

// A left-leaning chain such as a + b + c nests as deep as it is long.
constexpr int kMaxChain = 150;

void check_chain(int& length, int line) {
  if (++length > kMaxChain)
    throw SyntaxFault(line, fmt::format("a chain of more than {} operators", kMaxChain));
}

}  // namespace

ExpressionPtr Parser::parse_expression(bool with_condition) {
  const Nesting nesting(*this);
  return with_condition ? parse_condition() : parse_or();
}

// One expression, or several with commas as a tuple.
ExpressionPtr Parser::parse_tuple(bool with_condition, const Words& end_words, bool parenthesized) {
  const int line = current().line;
  std::vector<ExpressionPtr> items;
  bool is_tuple = false;
  for (;;) {
    if (!items.empty()) expect_operator(",");
    const bool ends =
        current().type == TokenType::kVariableEnd || current().type == TokenType::kBlockEnd ||
        is_operator(")") ||
        std::any_of(end_words.begin(), end_words.end(), [&](auto word) { return is_word(word); });
    if (ends) break;
    items.push_back(parse_expression(with_condition));
    if (!is_operator(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (!items.empty()) return std::move(items[0]);
    if (!parenthesized) unexpected("an expression");
  }
  auto node = make_expression(Kind::kTuple, line);
  node->operands = std::move(items);
  return node;
}

ExpressionPtr Parser::parse_condition() {
  int line = current().line, chain = 0;
  ExpressionPtr node = parse_or();
  while (skip_word("if")) {
    check_chain(chain, line);
    auto condition = make_expression(Kind::kCondition, line);
    condition->operands.push_back(parse_or());
    condition->operands.push_back(std::move(node));
    if (skip_word("else")) condition->operands.push_back(parse_expression());
    node = std::move(condition);
    line = current().line;
  }
  return node;
}

ExpressionPtr Parser::parse_or() {
  int line = current().line, chain = 0;
  ExpressionPtr left = parse_and();
  while (skip_word("or")) {
    check_chain(chain, line);
    left = binary(Kind::kOr, line, std::move(left), parse_and());
    line = current().line;
  }
  return left;
}

ExpressionPtr Parser::parse_and() {
  int line = current().line, chain = 0;
  ExpressionPtr left = parse_not();
  while (skip_word("and")) {
    check_chain(chain, line);
    left = binary(Kind::kAnd, line, std::move(left), parse_not());
    line = current().line;
  }
  return left;
}

ExpressionPtr Parser::parse_not() {
  if (!is_word("not")) return parse_compare();
  const Nesting nesting(*this);
  const int line = take().line;
  return unary(Kind::kNot, line, parse_not());
}

ExpressionPtr Parser::parse_compare() {
  constexpr std::array<std::pair<std::string_view, Comparison>, 6> kOperators = {
      {{"==", Comparison::kEqual},
       {"!=", Comparison::kNotEqual},
       {"<", Comparison::kLess},
       {"<=", Comparison::kLessEqual},
       {">", Comparison::kGreater},
       {">=", Comparison::kGreaterEqual}}};
  const int line = current().line;
  ExpressionPtr first = parse_sum();
  ExpressionPtr node;
  for (;;) {
    std::optional<Comparison> comparison;
    if (current().type == TokenType::kOperator) {
      for (const auto& [text, op] : kOperators)
        if (current().text == text) comparison = op;
    } else if (is_word("in")) {
      comparison = Comparison::kIn;
    } else if (is_word("not") && ahead().type == TokenType::kName && ahead().text == "in") {
      take();
      comparison = Comparison::kNotIn;
    }
    if (!comparison) break;
    take();
    if (!node) node = unary(Kind::kCompare, line, std::move(first));
    node->comparisons.push_back(*comparison);
    node->operands.push_back(parse_sum());
  }
  return node ? std::move(node) : std::move(first);
}

ExpressionPtr Parser::parse_sum() {
  int line = current().line, chain = 0;
  ExpressionPtr left = parse_concat();
  while (is_operator("+") || is_operator("-")) {
    check_chain(chain, line);
    const Operator op = take().text == "+" ? Operator::kAdd : Operator::kSubtract;
    left = binary(Kind::kBinary, line, std::move(left), parse_concat());
    left->op = op;
    line = current().line;
  }
  return left;
}

ExpressionPtr Parser::parse_concat() {
  const int line = current().line;
  ExpressionPtr first = parse_product();
  if (!is_operator("~")) return first;
  auto node = unary(Kind::kConcat, line, std::move(first));
  while (skip_operator("~")) node->operands.push_back(parse_product());
  return node;
}

ExpressionPtr Parser::parse_product() {
  int line = current().line, chain = 0;
  ExpressionPtr left = parse_power();
  for (;;) {
    std::optional<Operator> op;
    if (is_operator("*")) op = Operator::kMultiply;
    if (is_operator("/")) op = Operator::kDivide;
    if (is_operator("//")) op = Operator::kFloorDivide;
    if (is_operator("%")) op = Operator::kModulo;
    if (!op) return left;
    check_chain(chain, line);
    take();
    left = binary(Kind::kBinary, line, std::move(left), parse_power());
    left->op = *op;
    line = current().line;
  }
}

ExpressionPtr Parser::parse_power() {
  int line = current().line, chain = 0;
  ExpressionPtr left = parse_unary();
  while (skip_operator("**")) {
    check_chain(chain, line);
    left = binary(Kind::kBinary, line, std::move(left), parse_unary());
    left->op = Operator::kPower;
    line = current().line;
  }
  return left;
}

ExpressionPtr Parser::parse_unary(bool with_filter) {
  const Nesting nesting(*this);
  const int line = current().line;
  ExpressionPtr node;
  if (skip_operator("-")) {
    node = unary(Kind::kNegate, line, parse_unary(false));
  } else if (skip_operator("+")) {
    node = unary(Kind::kPlus, line, parse_unary(false));
  } else {
    node = parse_primary();
  }
  node = parse_postfix(std::move(node));
  return with_filter ? parse_filters_and_tests(std::move(node)) : std::move(node);
}

ExpressionPtr Parser::parse_primary(bool with_namespace) {
  const int line = current().line;
  if (is_operator("[")) return parse_list();
  if (is_operator("{")) return parse_dict();
  if (skip_operator("(")) {
    const Nesting nesting(*this);
    ExpressionPtr node = parse_tuple(true, {}, true);
    expect_operator(")");
    return node;
  }
  auto node = make_expression(Kind::kConstant, line);
  switch (current().type) {
    case TokenType::kName: {
      const std::string name = take().text;
      if (name == "true" || name == "True" || name == "false" || name == "False") {
        node->value = Value::boolean(name == "true" || name == "True");
      } else if (name == "none" || name == "None") {
        node->value = Value::none();
      } else {
        node->kind = Kind::kName;
        node->name = name;
        if (with_namespace && skip_operator(".")) {
          node->kind = Kind::kNamespaceRef;
          node->attribute = expect_name();
        }
      }
      return node;
    }
    case TokenType::kString: {
      std::string text;
      while (current().type == TokenType::kString) text += take().text;
      node->value = Value::string(std::move(text));
      return node;
    }
    case TokenType::kInteger:
      node->value = Value::integer(take().integer);
      return node;
    case TokenType::kFloat:
      node->value = Value::real(take().real);
      return node;
    default:
      unexpected("an expression");
  }
}

ExpressionPtr Parser::parse_list() {
  const Nesting nesting(*this);
  auto node = make_expression(Kind::kList, take().line);
  while (!is_operator("]")) {
    if (!node->operands.empty()) expect_operator(",");
    if (is_operator("]")) break;
    node->operands.push_back(parse_expression());
  }
  expect_operator("]");
  return node;
}

ExpressionPtr Parser::parse_dict() {
  const Nesting nesting(*this);
  auto node = make_expression(Kind::kDict, take().line);
  while (!is_operator("}")) {
    if (!node->operands.empty()) expect_operator(",");
    if (is_operator("}")) break;
    node->operands.push_back(parse_expression());
    expect_operator(":");
    node->operands.push_back(parse_expression());
  }
  expect_operator("}");
  return node;
}

ExpressionPtr Parser::parse_postfix(ExpressionPtr node) {
  for (int chain = 0;; check_chain(chain, current().line)) {
    if (is_operator(".") || is_operator("[")) {
      node = parse_subscript(std::move(node));
    } else if (is_operator("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExpressionPtr Parser::parse_filters_and_tests(ExpressionPtr node) {
  for (int chain = 0;; check_chain(chain, current().line)) {
    if (is_operator("|")) {
      node = parse_filter_chain(std::move(node), false);
    } else if (is_word("is")) {
      node = parse_test(std::move(node));
    } else if (is_operator("(")) {
      node = parse_call(std::move(node));
    } else {
      return node;
    }
  }
}

ExpressionPtr Parser::parse_subscript(ExpressionPtr node) {
  const Token token = take();
  if (token.text == ".") {
    if (current().type == TokenType::kName) {
      auto attribute = unary(Kind::kAttribute, token.line, std::move(node));
      attribute->name = take().text;
      return attribute;
    }
    if (current().type != TokenType::kInteger) unexpected("a name or number");
    auto key = make_expression(Kind::kConstant, current().line);
    key->value = Value::integer(take().integer);
    return binary(Kind::kItem, token.line, std::move(node), std::move(key));
  }
  std::vector<ExpressionPtr> parts(3);  // start, stop, step
  bool is_slice = false;
  if (!is_operator(":")) {
    if (is_operator("]")) throw SyntaxFault(token.line, "an empty subscript is not supported");
    parts[0] = parse_expression();
  }
  for (size_t i = 1; i < 3 && skip_operator(":"); ++i) {
    is_slice = true;
    if (!is_operator(":") && !is_operator("]") && !is_operator(",")) parts[i] = parse_expression();
  }
  if (is_operator(",")) {
    if (is_slice) throw SyntaxFault(token.line, "a subscript of several slices is not supported");
    auto tuple = make_expression(Kind::kTuple, token.line);
    tuple->operands.push_back(std::move(parts[0]));
    while (skip_operator(",")) {
      if (is_operator(":")) throw SyntaxFault(token.line, "a subscript of several slices is not supported");
      tuple->operands.push_back(parse_expression());
    }
    parts[0] = std::move(tuple);
  }
  expect_operator("]");
  if (!is_slice) return binary(Kind::kItem, token.line, std::move(node), std::move(parts[0]));
  auto slice = unary(Kind::kSlice, token.line, std::move(node));
  for (auto& part : parts) slice->operands.push_back(std::move(part));
  return slice;
}

ArgumentList Parser::parse_arguments() {
  const Nesting nesting(*this);
  const int line = current().line;
  expect_operator("(");
  ArgumentList arguments;
  const auto ensure = [&](bool condition) {
    if (!condition) throw SyntaxFault(line, "invalid syntax for function call expression");
  };
  bool first = true;
  while (!is_operator(")")) {
    if (!first) {
      expect_operator(",");
      if (is_operator(")")) break;
    }
    first = false;
    if (skip_operator("*")) {
      ensure(!arguments.rest && !arguments.named_rest);
      arguments.rest = parse_expression();
    } else if (skip_operator("**")) {
      ensure(!arguments.named_rest);
      arguments.named_rest = parse_expression();
    } else if (current().type == TokenType::kName && ahead().type == TokenType::kOperator &&
               ahead().text == "=") {
      ensure(!arguments.named_rest);
      const std::string name = take().text;
      take();
      for (const auto& [other, value] : arguments.named)
        if (other == name) throw SyntaxFault(line, fmt::format("keyword argument repeated: {}", name));
      arguments.named.emplace_back(name, parse_expression());
    } else {
      ensure(!arguments.rest && !arguments.named_rest && arguments.named.empty());
      arguments.positional.push_back(parse_expression());
    }
  }
  expect_operator(")");
  return arguments;
}

ExpressionPtr Parser::parse_call(ExpressionPtr node) {
  auto call = unary(Kind::kCall, current().line, std::move(node));
  call->arguments = parse_arguments();
  return call;
}

std::string Parser::parse_dotted_name() {
  std::string name = expect_name();
  while (skip_operator(".")) name += "." + expect_name();
  return name;
}

ExpressionPtr Parser::parse_filter_chain(ExpressionPtr node, bool starts_inline) {
  int chain = 0;
  while (is_operator("|") || starts_inline) {
    check_chain(chain, current().line);
    if (!starts_inline) take();
    starts_inline = false;
    auto filter = unary(Kind::kFilter, current().line, std::move(node));
    filter->name = parse_dotted_name();
    if (is_operator("(")) filter->arguments = parse_arguments();
    node = std::move(filter);
  }
  return node;
}

ExpressionPtr Parser::parse_test(ExpressionPtr node) {
  const Nesting nesting(*this);
  const int line = take().line;
  const bool negated = skip_word("not");
  auto test = unary(Kind::kTest, line, std::move(node));
  test->name = parse_dotted_name();
  const bool begins_value =
      current().type == TokenType::kString || current().type == TokenType::kInteger ||
      current().type == TokenType::kFloat || is_operator("[") || is_operator("{") ||
      (current().type == TokenType::kName && !is_word("else") && !is_word("or") && !is_word("and"));
  if (is_operator("(")) {
    test->arguments = parse_arguments();
  } else if (begins_value) {
    if (is_word("is")) throw SyntaxFault(current().line, "You cannot chain multiple tests with is");
    test->arguments.positional.push_back(parse_postfix(parse_primary()));
  }
  return negated ? unary(Kind::kNot, line, std::move(test)) : std::move(test);
}

}  // namespace spot::jinja
