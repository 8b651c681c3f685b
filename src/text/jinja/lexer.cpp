#include "text/jinja/lexer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>

#include "text/jinja/strings.h"
#include "text/jinja/syntax.h"
#include "text/unicode.h"
#include "text/unicode_case.h"

namespace spot::jinja {
namespace {

bool is_digit_character(char c) {
  return c >= '0' && c <= '9';
}

std::string normalize_newlines(std::string_view source) {
  std::string out;
  for (size_t i = 0; i < source.size(); ++i) {
    if (source[i] == '\r') {
      out += '\n';
      if (i + 1 < source.size() && source[i + 1] == '\n') ++i;
    } else {
      out += source[i];
    }
  }
  if (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}

class Lexer {
 public:
  explicit Lexer(std::string_view source) : source_(normalize_newlines(source)) {}

  std::vector<Token> run() {
    while (position_ < source_.size()) root();
    push(TokenType::kEnd, "");
    return std::move(tokens_);
  }

 private:
  bool at(size_t position, std::string_view text) const {
    return std::string_view(source_).substr(position).starts_with(text);
  }

  void push(TokenType type, std::string_view text) { tokens_.push_back({type, line_, std::string(text)}); }

  // Moves behind `count` bytes and counts their lines.
  void advance(size_t count) {
    const std::string_view passed = std::string_view(source_).substr(position_, count);
    line_ += static_cast<int>(std::count(passed.begin(), passed.end(), '\n'));
    if (!passed.empty()) line_starting_ = passed.back() == '\n';
    position_ += count;
  }

  size_t space_after(size_t position) const {
    while (position < source_.size()) {
      size_t next = position;
      if (!is_python_space(next_code_point(source_, next))) break;
      position = next;
    }
    return position;
  }

  // The length of {%[-+]? raw -?%} at `begin` (0: there is none), and its sign.
  size_t raw_begin(size_t begin, char& sign) const {
    size_t i = begin + 2;
    sign = 0;
    if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) sign = source_[i++];
    i = space_after(i);
    if (!at(i, "raw")) return 0;
    i = space_after(i + 3);
    if (at(i, "-%}")) return space_after(i + 3) - begin;
    return at(i, "%}") ? i + 2 - begin : 0;
  }

  // Emits text before a tag, stripped as its sign and lstrip_blocks say.
  void data_before(size_t end, char sign, bool is_variable) {
    std::string_view text = std::string_view(source_).substr(position_, end - position_);
    if (sign == '-') {
      text = strip(text, false, true);
    } else if (sign != '+' && !is_variable) {
      const size_t newline = text.rfind('\n');
      const size_t begin = newline == std::string_view::npos ? 0 : newline + 1;
      if ((begin > 0 || line_starting_) && begin < text.size() && strip(text.substr(begin)).empty())
        text = text.substr(0, begin);
    }
    if (!text.empty()) push(TokenType::kData, text);
    advance(end - position_);
  }

  void root() {
    size_t tag = position_;
    for (;; ++tag) {
      tag = source_.find('{', tag);
      if (tag == std::string::npos || tag + 1 >= source_.size()) {
        push(TokenType::kData, std::string_view(source_).substr(position_));
        return advance(source_.size() - position_);
      }
      if (source_[tag + 1] == '%' || source_[tag + 1] == '{' || source_[tag + 1] == '#') break;
    }
    const char kind = source_[tag + 1];
    char sign = 0;
    if (kind == '%') {
      if (const size_t length = raw_begin(tag, sign)) {
        data_before(tag, sign, false);
        advance(length);
        return raw();
      }
    }
    sign = tag + 2 < source_.size() && (source_[tag + 2] == '-' || source_[tag + 2] == '+') ? source_[tag + 2]
                                                                                            : 0;
    data_before(tag, sign, kind == '{');
    const int line = line_;
    if (kind != '#') push(kind == '%' ? TokenType::kBlockBegin : TokenType::kVariableBegin, "");
    advance(sign ? 3 : 2);
    if (kind == '#') return comment(line);
    tag_body(kind == '%');
  }

  void comment(int line) {
    size_t end = source_.find("#}", position_);
    if (end == std::string::npos) throw SyntaxFault(line, "a comment {# is not closed");
    const char before = end > position_ ? source_[end - 1] : 0;
    advance(end + 2 - position_);
    if (before == '-') {
      advance(space_after(position_) - position_);
    } else if (before != '+' && at(position_, "\n")) {
      advance(1);
    }
  }

  void raw() {
    const int line = line_;
    for (size_t tag = source_.find("{%", position_); tag != std::string::npos;
         tag = source_.find("{%", tag + 1)) {
      size_t i = tag + 2;
      char sign = 0;
      if (i < source_.size() && (source_[i] == '-' || source_[i] == '+')) sign = source_[i++];
      i = space_after(i);
      if (!at(i, "endraw")) continue;
      i = space_after(i + 6);
      size_t end = 0;
      if (at(i, "+%}")) {
        end = i + 3;
      } else if (at(i, "-%}")) {
        end = space_after(i + 3);
      } else if (at(i, "%}")) {
        end = i + 2 + (at(i + 2, "\n") ? 1 : 0);
      } else {
        continue;
      }
      data_before(tag, sign, false);
      return advance(end - position_);
    }
    throw SyntaxFault(line, "a raw block is not closed");
  }

  void tag_body(bool is_block) {
    const int begin_line = line_;
    std::string open;  // the closing brackets that are due
    while (position_ < source_.size()) {
      if (open.empty() && tag_end(is_block)) return;
      const char c = source_[position_];
      if (const size_t after = space_after(position_); after > position_) {
        advance(after - position_);
      } else if (is_digit_character(c)) {
        number();
      } else if (c == '\'' || c == '"') {
        string(c);
      } else if (const size_t length = name_length()) {
        push(TokenType::kName, std::string_view(source_).substr(position_, length));
        advance(length);
      } else {
        operator_token(open);
      }
    }
    throw SyntaxFault(begin_line, is_block ? "a tag {% is not closed" : "a tag {{ is not closed");
  }

  bool tag_end(bool is_block) {
    if (is_block) {
      if (at(position_, "+%}") || at(position_, "-%}") || at(position_, "%}")) {
        const char sign = source_[position_];
        push(TokenType::kBlockEnd, "");
        advance(sign == '%' ? 2 : 3);
        if (sign == '-') advance(space_after(position_) - position_);
        if (sign == '%' && at(position_, "\n")) advance(1);
        return true;
      }
      return false;
    }
    if (at(position_, "-}}")) {
      push(TokenType::kVariableEnd, "");
      advance(3);
      advance(space_after(position_) - position_);
      return true;
    }
    if (at(position_, "}}")) {
      push(TokenType::kVariableEnd, "");
      advance(2);
      return true;
    }
    return false;
  }

  size_t name_length() const {
    size_t i = position_;
    while (i < source_.size()) {
      size_t next = i;
      const char32_t c = next_code_point(source_, next);
      const bool ascii =
          (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (c >= '0' && c <= '9');
      if (!ascii && !(c >= 0x80 && is_letter(c))) break;
      i = next;
    }
    return i - position_;
  }

  // Digits with single underscores between them, from `i` on; the end of them.
  size_t digits(size_t i, std::string_view allowed = "0123456789") const {
    const auto is_one = [&](size_t at) {
      return at < source_.size() && allowed.find(source_[at]) != std::string_view::npos;
    };
    while (is_one(i) || (i < source_.size() && source_[i] == '_' && is_one(i + 1) && i > position_)) ++i;
    return i;
  }

  std::string without_underscores(size_t end) const {
    std::string text = source_.substr(position_, end - position_);
    text.erase(std::remove(text.begin(), text.end(), '_'), text.end());
    return text;
  }

  void number() {
    const size_t whole = digits(position_);
    size_t end = whole;
    if (end + 1 < source_.size() && source_[end] == '.' && is_digit_character(source_[end + 1]))
      end = digits(end + 1);
    if (end < source_.size() && (source_[end] | 32) == 'e') {
      size_t exponent = end + 1;
      if (exponent < source_.size() && (source_[exponent] == '+' || source_[exponent] == '-')) ++exponent;
      if (exponent < source_.size() && is_digit_character(source_[exponent])) end = digits(exponent);
    }
    const bool after_point = position_ > 0 && source_[position_ - 1] == '.';
    if (end > whole && !after_point) {
      Token token{TokenType::kFloat, line_, ""};
      token.real = std::strtod(without_underscores(end).c_str(), nullptr);
      if (token.real > 1.7976931348623157e308)
        throw SyntaxFault(line_, "a number beyond a float's range is not supported");
      tokens_.push_back(token);
      return advance(end - position_);
    }
    int base = 10;
    size_t integer_end = whole;
    const auto prefixed = [&](char letter, int other, std::string_view allowed) {
      if (source_[position_] != '0' || position_ + 1 >= source_.size() ||
          (source_[position_ + 1] | 32) != letter)
        return;
      const size_t last = digits(position_ + 2, allowed);
      if (last > position_ + 2) base = other, integer_end = last;
    };
    prefixed('b', 2, "01"), prefixed('o', 8, "01234567"), prefixed('x', 16, "0123456789abcdefABCDEF");
    if (base == 10 && source_[position_] == '0') integer_end = digits(position_, "0");
    const std::string text = without_underscores(integer_end);
    Token token{TokenType::kInteger, line_, ""};
    const char* first = text.data() + (base == 10 ? 0 : 2);
    if (std::from_chars(first, text.data() + text.size(), token.integer, base).ec != std::errc())
      throw SyntaxFault(line_, "an integer beyond 64 bits is not supported");
    tokens_.push_back(token);
    advance(integer_end - position_);
  }

  void string(char quote) {
    size_t end = position_ + 1;
    while (end < source_.size() && source_[end] != quote) end += source_[end] == '\\' ? 2 : 1;
    if (end >= source_.size()) throw SyntaxFault(line_, fmt::format("unexpected char {}", quote));
    push(TokenType::kString, unescape(std::string_view(source_).substr(position_ + 1, end - position_ - 1)));
    advance(end + 1 - position_);
  }

  std::string unescape(std::string_view text) const {
    constexpr std::string_view kNames = "abfnrtv\\'\"", kValues = "\a\b\f\n\r\t\v\\'\"";
    std::string out;
    for (size_t i = 0; i < text.size();) {
      if (text[i] != '\\') {
        out += text[i++];
        continue;
      }
      const char c = text[++i];
      if (const size_t at = kNames.find(c); at != std::string_view::npos) {
        out += kValues[at], ++i;
      } else if (c == '\n') {
        ++i;
      } else if (c >= '0' && c <= '7') {
        uint32_t code = 0;
        for (int n = 0; n < 3 && i < text.size() && text[i] >= '0' && text[i] <= '7'; ++n)
          code = code * 8 + static_cast<uint32_t>(text[i++] - '0');
        append_utf8(out, code);
      } else if (c == 'x' || c == 'u' || c == 'U') {
        const size_t length = c == 'x' ? 2 : c == 'u' ? 4 : 8;
        uint32_t code = 0;
        const char* first = text.data() + i + 1;
        const bool whole = i + 1 + length <= text.size();
        const auto parsed = whole ? std::from_chars(first, first + length, code, 16)
                                  : std::from_chars_result{first, std::errc::invalid_argument};
        if (parsed.ec != std::errc() || parsed.ptr != first + length)
          throw SyntaxFault(line_, fmt::format("a truncated \\{} escape in a string", c));
        if (code > 0x10FFFF) throw SyntaxFault(line_, "an escape beyond U+10FFFF in a string");
        if (code >= 0xD800 && code < 0xE000)
          throw SyntaxFault(line_, "a surrogate escape in a string is not supported");
        append_utf8(out, code);
        i += 1 + length;
      } else if (c == 'N') {
        throw SyntaxFault(line_, "the escape \\N in a string is not supported");
      } else {  // unknown escapes stay as they are; beyond ASCII, Python shows the character's own escape
        out += '\\';
        const char32_t code = next_code_point(text, i);
        if (code < 0x80) {
          out += static_cast<char>(code);
        } else {
          const auto value = static_cast<uint32_t>(code);
          out += code < 0x100     ? fmt::format("x{:02x}", value)
                 : code < 0x10000 ? fmt::format("u{:04x}", value)
                                  : fmt::format("U{:08x}", value);
        }
      }
    }
    return out;
  }

  void operator_token(std::string& open) {
    constexpr std::array<std::string_view, 26> kOperators = {
        "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[",
        "]",  "(",  ")",  "{",  "}",  ">",  "<", "=", ".", ":", "|", ",", ";"};
    for (std::string_view text : kOperators) {
      if (!at(position_, text)) continue;
      const char c = text[0];
      if (c == '(' || c == '[' || c == '{') open += c == '(' ? ')' : c == '[' ? ']' : '}';
      if (c == ')' || c == ']' || c == '}') {
        if (open.empty()) throw SyntaxFault(line_, fmt::format("unexpected '{}'", c));
        if (open.back() != c)
          throw SyntaxFault(line_, fmt::format("unexpected '{}', expected '{}'", c, open.back()));
        open.pop_back();
      }
      push(TokenType::kOperator, text);
      return advance(text.size());
    }
    size_t end = position_;
    next_code_point(source_, end);
    throw SyntaxFault(line_, fmt::format("unexpected char {}", source_.substr(position_, end - position_)));
  }

  std::string source_;
  std::vector<Token> tokens_;
  size_t position_ = 0;
  int line_ = 1;
  bool line_starting_ = true;
};

}  // namespace

std::vector<Token> tokenize(std::string_view source) {
  return Lexer(source).run();
}

}  // namespace spot::jinja
