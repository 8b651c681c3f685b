#include "text/jinja/parser.h"

#include <algorithm>
#include <array>

#include "text/jinja/scopes.h"
#include "text/unicode.h"

namespace spot::jinja {
namespace {

std::string described(const Token& token) {
  switch (token.type) {
    case TokenType::kData:
      return "text";
    case TokenType::kBlockBegin:
      return "begin of statement block";
    case TokenType::kBlockEnd:
      return "end of statement block";
    case TokenType::kVariableBegin:
      return "begin of print statement";
    case TokenType::kVariableEnd:
      return "end of print statement";
    case TokenType::kString:
      return "a string";
    case TokenType::kInteger:
    case TokenType::kFloat:
      return "a number";
    case TokenType::kEnd:
      return "end of template";
    default:
      return "'" + token.text + "'";
  }
}

std::unique_ptr<Statement> make_statement(Statement::Kind kind, int line) {
  auto statement = std::make_unique<Statement>();
  statement->kind = kind;
  statement->line = line;
  return statement;
}

std::string joined(const std::vector<std::string_view>& words) {
  std::string out;
  for (std::string_view word : words) out += (out.empty() ? "'" : " or '") + std::string(word) + "'";
  return out;
}

}  // namespace

ExpressionPtr make_expression(Expression::Kind kind, int line) {
  auto expression = std::make_unique<Expression>();
  expression->kind = kind;
  expression->line = line;
  return expression;
}

Parser::Parser(std::string_view source) : tokens_(tokenize(source)) {}

Parser::Nesting::Nesting(Parser& owner) : parser(owner) {
  if (++parser.depth_ > kMaxSyntaxDepth) {
    --parser.depth_;
    throw SyntaxFault(parser.current().line, fmt::format("nested more than {} deep", kMaxSyntaxDepth));
  }
}

// --- tokens ---

Token Parser::take() {
  Token token = tokens_[position_];
  if (position_ + 1 < tokens_.size()) ++position_;
  return token;
}

bool Parser::is_operator(std::string_view text) const {
  return current().type == TokenType::kOperator && current().text == text;
}

bool Parser::is_word(std::string_view text) const {
  return current().type == TokenType::kName && current().text == text;
}

bool Parser::skip_operator(std::string_view text) {
  if (!is_operator(text)) return false;
  take();
  return true;
}

bool Parser::skip_word(std::string_view text) {
  if (!is_word(text)) return false;
  take();
  return true;
}

void Parser::expect_operator(std::string_view text) {
  if (!skip_operator(text)) unexpected(fmt::format("'{}'", text));
}

void Parser::expect_word(std::string_view text) {
  if (!skip_word(text)) unexpected(fmt::format("'{}'", text));
}

std::string Parser::expect_name() {
  if (current().type != TokenType::kName) unexpected("a name");
  return take().text;
}

void Parser::unexpected(std::string_view wanted) const {
  throw SyntaxFault(current().line, fmt::format("expected {}, got {}", wanted, described(current())));
}

// --- statements ---

Block Parser::parse_template() {
  Block block = parse_until({});
  return block;
}

// Text and tags up to a tag that begins with one of `end_words`, whose first word becomes the current token.
Block Parser::parse_until(const Words& end_words) {
  const Nesting nesting(*this);
  Block block;
  std::unique_ptr<Statement> output;
  const auto flush = [&] {
    if (output) block.push_back(std::move(output));
  };
  const auto add = [&](ExpressionPtr expression) {
    if (!output) output = make_statement(Statement::Kind::kOutput, expression->line);
    output->expressions.push_back(std::move(expression));
  };
  while (current().type != TokenType::kEnd) {
    if (current().type == TokenType::kData) {
      auto text = make_expression(Expression::Kind::kConstant, current().line);
      text->value = Value::string(take().text);
      add(std::move(text));
    } else if (current().type == TokenType::kVariableBegin) {
      take();
      add(parse_tuple());
      if (current().type != TokenType::kVariableEnd) unexpected("end of print statement");
      take();
    } else {
      flush();
      take();  // begin of block
      if (current().type != TokenType::kName) throw SyntaxFault(current().line, "tag name expected");
      if (std::find(end_words.begin(), end_words.end(), current().text) != end_words.end()) return block;
      if (auto statement = parse_statement()) block.push_back(std::move(statement));
      if (current().type != TokenType::kBlockEnd) unexpected("end of statement block");
      take();
    }
  }
  flush();
  if (!end_words.empty()) {
    throw SyntaxFault(current().line,
                      fmt::format("unexpected end of template, looking for {}", joined(end_words)));
  }
  return block;
}

Block Parser::parse_body(const Words& end_words) {
  skip_operator(":");
  if (current().type != TokenType::kBlockEnd) unexpected("end of statement block");
  take();
  return parse_until(end_words);
}

std::unique_ptr<Statement> Parser::parse_statement() {
  const int line = current().line;
  const std::string word = take().text;
  if (word == "for") return parse_for(line);
  if (word == "if") return parse_if(line);
  if (word == "set") return parse_set(line);
  if (word == "macro") return parse_macro(line);
  if (word == "call") return parse_call_block(line);
  if (word == "with") return parse_with(line);
  if (word == "print") {
    auto statement = make_statement(Statement::Kind::kOutput, line);
    while (current().type != TokenType::kBlockEnd) {
      if (!statement->expressions.empty()) expect_operator(",");
      statement->expressions.push_back(parse_expression());
    }
    return statement;
  }
  if (word == "filter") {
    auto statement = make_statement(Statement::Kind::kFilterBlock, line);
    statement->filter = parse_filter_chain(nullptr, true);
    statement->body.block = parse_body({"endfilter"});
    take();
    return statement;
  }
  if (word == "generation") {
    auto statement = make_statement(Statement::Kind::kGeneration, line);
    const int loops = std::exchange(loops_, 0);
    statement->body.block = parse_body({"endgeneration"});
    loops_ = loops;
    take();
    return statement;
  }
  if (word == "break" || word == "continue") {
    if (loops_ == 0) throw SyntaxFault(line, fmt::format("{} outside a loop", word));
    return make_statement(word == "break" ? Statement::Kind::kBreak : Statement::Kind::kContinue, line);
  }
  constexpr std::array<std::string_view, 6> kUnsupported = {"block",  "extends", "include",
                                                            "import", "from",    "autoescape"};
  if (std::find(kUnsupported.begin(), kUnsupported.end(), word) != kUnsupported.end())
    throw SyntaxFault(line, fmt::format("the tag {} is not supported", word));
  throw SyntaxFault(line, fmt::format("unknown tag '{}'", word));
}

std::unique_ptr<Statement> Parser::parse_for(int line) {
  auto statement = make_statement(Statement::Kind::kFor, line);
  statement->target = parse_target(false, {"in"});
  expect_word("in");
  statement->source = parse_tuple(false, {"recursive"});
  if (skip_word("if")) statement->test = parse_expression();
  statement->recursive = skip_word("recursive");
  ++loops_;
  statement->body.block = parse_body({"endfor", "else"});
  --loops_;
  if (take().text == "else") {
    statement->otherwise.block = parse_body({"endfor"});
    take();
  }
  return statement;
}

std::unique_ptr<Statement> Parser::parse_if(int line) {
  auto statement = make_statement(Statement::Kind::kIf, line);
  for (;;) {
    ExpressionPtr test = parse_tuple(false);
    Block block = parse_body({"elif", "else", "endif"});
    statement->branches.emplace_back(std::move(test), std::move(block));
    const std::string word = take().text;
    if (word == "elif") continue;
    if (word == "else") {
      statement->otherwise.block = parse_body({"endif"});
      take();
    }
    return statement;
  }
}

std::unique_ptr<Statement> Parser::parse_set(int line) {
  auto statement = make_statement(Statement::Kind::kSet, line);
  statement->target = parse_target(true, {});
  if (skip_operator("=")) {
    statement->source = parse_tuple();
    return statement;
  }
  statement->kind = Statement::Kind::kSetBlock;
  statement->filter = parse_filter_chain(nullptr, false);
  statement->body.block = parse_body({"endset"});
  take();
  return statement;
}

std::vector<Parameter> Parser::parse_parameters() {
  std::vector<Parameter> parameters;
  expect_operator("(");
  while (!is_operator(")")) {
    if (!parameters.empty()) expect_operator(",");
    Parameter parameter;
    const int line = current().line;
    parameter.name = expect_name();
    for (std::string_view constant : {"true", "false", "none", "True", "False", "None"})
      if (parameter.name == constant) throw SyntaxFault(line, fmt::format("can't assign to '{}'", constant));
    for (const Parameter& other : parameters)
      if (other.name == parameter.name)
        throw SyntaxFault(line, fmt::format("duplicate argument '{}'", parameter.name));
    if (skip_operator("=")) {
      parameter.default_value = parse_expression();
    } else if (!parameters.empty() && parameters.back().default_value) {
      throw SyntaxFault(line, "non-default argument follows default argument");
    }
    parameters.push_back(std::move(parameter));
  }
  expect_operator(")");
  return parameters;
}

std::unique_ptr<Statement> Parser::parse_macro(int line) {
  auto statement = make_statement(Statement::Kind::kMacro, line);
  statement->name = expect_name();
  for (std::string_view constant : {"true", "false", "none", "True", "False", "None"})
    if (statement->name == constant) throw SyntaxFault(line, fmt::format("can't assign to '{}'", constant));
  statement->parameters = parse_parameters();
  const int loops = std::exchange(loops_, 0);
  statement->body.block = parse_body({"endmacro"});
  loops_ = loops;
  take();
  return statement;
}

std::unique_ptr<Statement> Parser::parse_call_block(int line) {
  auto statement = make_statement(Statement::Kind::kCallBlock, line);
  if (is_operator("(")) statement->parameters = parse_parameters();
  statement->call = parse_expression();
  if (statement->call->kind != Expression::Kind::kCall) throw SyntaxFault(line, "expected call");
  const int loops = std::exchange(loops_, 0);
  statement->body.block = parse_body({"endcall"});
  loops_ = loops;
  take();
  return statement;
}

std::unique_ptr<Statement> Parser::parse_with(int line) {
  auto statement = make_statement(Statement::Kind::kWith, line);
  while (current().type != TokenType::kBlockEnd) {
    if (!statement->targets.empty()) expect_operator(",");
    statement->targets.push_back(parse_target(false, {}));
    expect_operator("=");
    statement->expressions.push_back(parse_expression());
  }
  statement->body.block = parse_body({"endwith"});
  take();
  return statement;
}

// What set, for and with assign to: names, tuples of them, and for set also namespace attributes.
ExpressionPtr Parser::parse_target(bool with_namespace, const Words& end_words) {
  const int line = current().line;
  std::vector<ExpressionPtr> targets;
  bool is_tuple = false;
  for (;;) {
    if (!targets.empty()) expect_operator(",");
    const bool ends =
        current().type == TokenType::kBlockEnd || current().type == TokenType::kVariableEnd ||
        is_operator(")") ||
        std::any_of(end_words.begin(), end_words.end(), [&](auto word) { return is_word(word); });
    if (ends) break;
    targets.push_back(parse_primary(with_namespace));
    if (!is_operator(",")) break;
    is_tuple = true;
  }
  ExpressionPtr target;
  if (is_tuple) {
    target = make_expression(Expression::Kind::kTuple, line);
    target->operands = std::move(targets);
  } else {
    if (targets.empty()) unexpected("an expression");
    target = std::move(targets[0]);
  }
  check_target(*target, with_namespace);
  return target;
}

void Parser::check_target(const Expression& target, bool with_namespace) {
  if (target.kind == Expression::Kind::kTuple) {
    for (const auto& item : target.operands) check_target(*item, with_namespace);
  } else if (target.kind != Expression::Kind::kName && target.kind != Expression::Kind::kNamespaceRef) {
    throw SyntaxFault(target.line, "can't assign to an expression");
  }
}

ScopedBlock parse(std::string_view source) {
  if (static_cast<int64_t>(source.size()) > kMaxTemplateBytes)
    throw SyntaxFault(1, fmt::format("longer than {} MiB", kMaxTemplateBytes >> 20));
  if (const size_t at = find_invalid_utf8(source); at != std::string_view::npos)
    throw SyntaxFault(1, fmt::format("not UTF-8 at byte {}", at));
  ScopedBlock block;
  block.block = Parser(source).parse_template();
  resolve_scopes(block);
  return block;
}

}  // namespace spot::jinja
