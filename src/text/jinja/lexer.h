// Template source to tokens, with the settings that chat templates are written for: trim_blocks and
// lstrip_blocks on, one trailing line break dropped.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace spot::jinja {

enum class TokenType {
  kData,
  kBlockBegin,
  kBlockEnd,
  kVariableBegin,
  kVariableEnd,
  kName,
  kString,
  kInteger,
  kFloat,
  kOperator,
  kEnd
};

struct Token {
  TokenType type = TokenType::kEnd;
  int line = 1;
  std::string text;  // data, name, operator, and the value of a string
  int64_t integer = 0;
  double real = 0;
};

// Throws SyntaxFault; `source` must be well-formed UTF-8.
std::vector<Token> tokenize(std::string_view source);

}  // namespace spot::jinja
