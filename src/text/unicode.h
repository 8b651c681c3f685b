// What a tokenizer needs of Unicode: strict UTF-8, lossy decoding of byte streams, normalization, lower case
// and white space.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace spot {

// The byte offset of the first ill-formed sequence (overlong forms, surrogates and values above U+10FFFF
// included), or std::string_view::npos when `text` is well-formed UTF-8.
size_t find_invalid_utf8(std::string_view text);

// The code point that begins at text[offset]; moves offset behind it. `text` must be well-formed.
char32_t next_code_point(std::string_view text, size_t& offset);

// The offset at which the code point ending before `offset` begins. `text` must be well-formed, offset > 0.
size_t previous_offset(std::string_view text, size_t offset);

void append_utf8(std::string& out, char32_t code_point);

// Unicode property White_Space: what \s means in the pre-tokenizers' patterns.
bool is_white_space(char32_t code_point);

enum class NormalizationForm { nfc, nfd, nfkc, nfkd };
// "NFC", "NFD", "NFKC", "NFKD".
std::optional<NormalizationForm> normalization_form(std::string_view name);

// A normalization form of well-formed UTF-8, in linear time. Characters that entered Unicode after version 9
// are left as they are: the published tokenizers' reference normalizer stops at that version's tables, and a
// model has only ever seen its output.
std::string normalize(std::string_view text, NormalizationForm form);

// Every character's lower case by itself (no final sigma), as of Unicode 17.
std::string lowercase(std::string_view text);

// Turns a stream of bytes into well-formed UTF-8: a sequence is held back until it is complete, and every
// maximal ill-formed part becomes one U+FFFD (Unicode 3.9, "substitution of maximal subparts").
class Utf8Stream {
 public:
  // Appends to `out` all text that `bytes` completes.
  void push(std::string_view bytes, std::string& out);
  // Appends U+FFFD for an unfinished sequence, and starts anew.
  void finish(std::string& out);

 private:
  std::string pending_;
};

}  // namespace spot
