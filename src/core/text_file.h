// What text and JSON from elsewhere begin with and how deep they go, looked at before they are read.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace spot {

// The mark that some editors put before UTF-8 text; it is no part of the text.
inline constexpr std::string_view kUtf8Mark = "\xef\xbb\xbf";
// Whether text begins with the mark of UTF-16.
bool is_utf16(std::string_view text);
// read_file without a mark at its beginning. Throws Error on UTF-16 too.
std::string read_text_file(const std::filesystem::path& path);

// Throws Error on the few lines that a clone without Git LFS has in place of a large file.
void refuse_pointer(std::string_view bytes, const std::string& name);

// Values nested deeper than this would exhaust the stack of those who walk through them.
inline constexpr int kMaxJsonDepth = 200;
// Throws Error ("{where}: ...") on JSON text nested deeper than that; says nothing of its other faults.
void check_json_nesting(std::string_view text, const std::string& where);

}  // namespace spot
