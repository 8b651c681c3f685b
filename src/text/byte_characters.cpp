#include "text/byte_characters.h"

#include <array>
#include <cstdint>

#include "text/unicode.h"

namespace spot {
namespace {

struct ByteTables {
  std::array<int16_t, 0x144> byte_of;  // by character; -1: stands for no byte
  std::array<std::string, 256> character_of;
};

const ByteTables& tables() {
  static const ByteTables tables = [] {
    ByteTables made;
    made.byte_of.fill(-1);
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const char32_t character = printable ? byte : next++;
      made.byte_of[character] = static_cast<int16_t>(byte);
      append_utf8(made.character_of[byte], character);
    }
    return made;
  }();
  return tables;
}

}  // namespace

std::optional<std::string> bytes_of_characters(std::string_view text) {
  const auto& byte_of = tables().byte_of;
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    const char32_t character = next_code_point(text, i);
    if (character >= byte_of.size() || byte_of[character] < 0) return std::nullopt;
    bytes += static_cast<char>(byte_of[character]);
  }
  return bytes;
}

std::string characters_of_bytes(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += tables().character_of[static_cast<unsigned char>(byte)];
  return text;
}

}  // namespace spot
