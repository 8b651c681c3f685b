// Letter case with the meaning of Python's str methods: full Unicode mappings, one character to several.
#pragma once

#include <string>
#include <string_view>

namespace spot {

// All take well-formed UTF-8.
std::string to_upper(std::string_view text);
std::string to_lower(std::string_view text);  // a final sigma is told from an inner one
std::string to_title(std::string_view text);  // str.title: each letter after a letter in lower case
std::string to_capitalized(
    std::string_view text);  // str.capitalize: the first character in title case, then lower
std::string swap_case(std::string_view text);

bool is_lower(char32_t c);    // Unicode property Lowercase
bool is_upper(char32_t c);    // Unicode property Uppercase
bool is_title(char32_t c);    // category Lt
bool is_letter(char32_t c);   // str.isalpha
bool is_decimal(char32_t c);  // str.isdecimal
bool is_digit(char32_t c);    // str.isdigit
// str.isspace of one character: white space and the four ASCII separators.
bool is_python_space(char32_t c);

}  // namespace spot
