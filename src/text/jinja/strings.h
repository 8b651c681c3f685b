// Algorithms on UTF-8 text with the results of Python's str methods.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace spot::jinja {

int64_t count_code_points(std::string_view text);
// The byte at which code point number `index` begins (the size for an index at or behind the end).
size_t byte_offset(std::string_view text, int64_t index);

// str.strip() of white space, at the chosen ends; and of the characters of a set.
std::string_view strip(std::string_view text, bool left = true, bool right = true);
std::string_view strip_characters(std::string_view text, std::string_view characters, bool left = true,
                                  bool right = true);

// str.split: at most `most` cuts (negative: no bound), counted from the end for rsplit.
std::vector<std::string_view> split(std::string_view text, std::string_view separator, int64_t most,
                                    bool from_right);
std::vector<std::string_view> split_space(std::string_view text, int64_t most, bool from_right);
std::vector<std::string_view> split_lines(std::string_view text, bool keep_ends);

std::string replace(std::string_view text, std::string_view part, std::string_view with, int64_t most);
// str.ljust, and with `on_the_left` str.rjust; str.center.
std::string pad(std::string_view text, int64_t width, std::string_view fill, bool on_the_left);
std::string center(std::string_view text, int64_t width, std::string_view fill);

bool is_all_lower(std::string_view text);  // str.islower
bool is_all_upper(std::string_view text);  // str.isupper
bool is_other_number(char32_t c);          // categories Nl and No

}  // namespace spot::jinja
