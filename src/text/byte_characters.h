// Byte-level BPE prints each byte as one character: printable Latin-1 as itself, the other 68 bytes as U+0100
// up.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace spot {

// The bytes that `text` stands for, or nothing if it holds a character that stands for no byte.
std::optional<std::string> bytes_of_characters(std::string_view text);

std::string characters_of_bytes(std::string_view bytes);

}  // namespace spot
