// Tokens to a syntax tree: one recursive function a rule of Jinja's grammar.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/lexer.h"
#include "text/jinja/syntax.h"

namespace spot::jinja {

class Parser {
 public:
  explicit Parser(std::string_view source);
  Block parse_template();

 private:
  using Words = std::vector<std::string_view>;

  // parser.cpp: statements
  Block parse_until(const Words& end_words);
  Block parse_body(const Words& end_words);
  std::unique_ptr<Statement> parse_statement();
  std::unique_ptr<Statement> parse_for(int line);
  std::unique_ptr<Statement> parse_if(int line);
  std::unique_ptr<Statement> parse_set(int line);
  std::unique_ptr<Statement> parse_macro(int line);
  std::unique_ptr<Statement> parse_call_block(int line);
  std::unique_ptr<Statement> parse_with(int line);
  std::vector<Parameter> parse_parameters();
  ExpressionPtr parse_target(bool with_namespace, const Words& end_words);
  void check_target(const Expression& target, bool with_namespace);

  // expressions.cpp
  ExpressionPtr parse_expression(bool with_condition = true);
  ExpressionPtr parse_tuple(bool with_condition = true, const Words& end_words = {},
                            bool parenthesized = false);
  ExpressionPtr parse_condition();
  ExpressionPtr parse_or();
  ExpressionPtr parse_and();
  ExpressionPtr parse_not();
  ExpressionPtr parse_compare();
  ExpressionPtr parse_sum();
  ExpressionPtr parse_concat();
  ExpressionPtr parse_product();
  ExpressionPtr parse_power();
  ExpressionPtr parse_unary(bool with_filter = true);
  ExpressionPtr parse_primary(bool with_namespace = false);
  ExpressionPtr parse_list();
  ExpressionPtr parse_dict();
  ExpressionPtr parse_postfix(ExpressionPtr node);
  ExpressionPtr parse_filters_and_tests(ExpressionPtr node);
  ExpressionPtr parse_subscript(ExpressionPtr node);
  ExpressionPtr parse_call(ExpressionPtr node);
  ExpressionPtr parse_filter_chain(ExpressionPtr node, bool starts_inline);
  ExpressionPtr parse_test(ExpressionPtr node);
  ArgumentList parse_arguments();
  std::string parse_dotted_name();

  // tokens
  const Token& current() const { return tokens_[position_]; }
  const Token& ahead() const { return tokens_[std::min(position_ + 1, tokens_.size() - 1)]; }
  Token take();
  bool is_operator(std::string_view text) const;
  bool is_word(std::string_view text) const;
  bool skip_operator(std::string_view text);
  bool skip_word(std::string_view text);
  void expect_operator(std::string_view text);
  void expect_word(std::string_view text);
  std::string expect_name();
  [[noreturn]] void unexpected(std::string_view wanted) const;

  // Counts nesting while it lives.
  struct Nesting {
    explicit Nesting(Parser& parser);
    ~Nesting() { --parser.depth_; }
    Parser& parser;
  };

  std::vector<Token> tokens_;
  size_t position_ = 0;
  int depth_ = 0;
  int loops_ = 0;  // for statements that a break would find
};

ExpressionPtr make_expression(Expression::Kind kind, int line);

}  // namespace spot::jinja
