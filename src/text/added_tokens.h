// Tokens that are found in text as they are written, before any splitting: <|im_start|> and the like.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace spot {

// One entry of `added_tokens`.
struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool single_word = false;  // matches only where no word character adjoins it
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // takes the white space after it along
  bool normalized = true;    // is looked for in the normalized text, not in the text as given
  bool special = false;      // left out by decode(..., skip_special_tokens)

  static AddedToken from_json(const nlohmann::json& json, int32_t id);
};

// Finds added tokens, leftmost first and the longest of those that begin there. Immutable; may be shared
// among threads.
class AddedTokenMatcher {
 public:
  // `pattern_of` gives the text to look for (the content, normalized where that applies). Empty ones are left
  // out.
  AddedTokenMatcher(const std::vector<AddedToken>& tokens,
                    const std::function<std::string(const AddedToken&)>& pattern_of);

  struct Piece {
    std::string_view text;
    int32_t id;  // -1: text between added tokens
  };
  // Cuts well-formed UTF-8 into added tokens and the non-empty text between them.
  std::vector<Piece> split(std::string_view text) const;

 private:
  // A trie over the bytes of the patterns; node 0 is the root.
  struct Node {
    std::map<unsigned char, uint32_t> children;
    int32_t token = -1;  // index into tokens_
  };
  std::vector<Node> nodes_;
  std::vector<AddedToken> tokens_;
  std::vector<bool> first_bytes_;  // 256
};

}  // namespace spot
