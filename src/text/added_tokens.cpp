#include "text/added_tokens.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "text/regex.h"
#include "text/unicode.h"

namespace spot {
namespace {

size_t begin_of_white_space_before(std::string_view text, size_t offset) {
  while (offset > 0) {
    const size_t before = previous_offset(text, offset);
    size_t i = before;
    if (!is_white_space(next_code_point(text, i))) break;
    offset = before;
  }
  return offset;
}

size_t end_of_white_space_from(std::string_view text, size_t offset) {
  while (offset < text.size()) {
    size_t after = offset;
    if (!is_white_space(next_code_point(text, after))) break;
    offset = after;
  }
  return offset;
}

// Letters, marks, decimal digits, letter-like numbers and symbols, connectors and joiners.
const Regex& word_character() {
  static const Regex regex(
      R"([\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{200c}\x{200d}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149})"
      R"(\x{1f150}-\x{1f169}\x{1f170}-\x{1f189}])",
      "added tokens");
  return regex;
}

bool word_character_adjoins(std::string_view text, size_t begin, size_t end) {
  RegexMatcher matcher(word_character());
  RegexMatcher::Match match;
  const auto is_word_character_at = [&](size_t offset) {
    size_t after = offset;
    next_code_point(text, after);
    return matcher.find(text.substr(offset, after - offset), 0, match);
  };
  return (begin > 0 && is_word_character_at(previous_offset(text, begin))) ||
         (end < text.size() && is_word_character_at(end));
}

}  // namespace

AddedToken AddedToken::from_json(const nlohmann::json& json, int32_t id) {
  AddedToken token;
  token.id = id;
  token.content = json.at("content");
  token.single_word = json.value("single_word", false);
  token.lstrip = json.value("lstrip", false);
  token.rstrip = json.value("rstrip", false);
  token.special = json.value("special", false);
  token.normalized = json.value("normalized", !token.special);
  return token;
}

AddedTokenMatcher::AddedTokenMatcher(const std::vector<AddedToken>& tokens,
                                     const std::function<std::string(const AddedToken&)>& pattern_of)
    : nodes_(1), tokens_(tokens), first_bytes_(256, false) {
  for (size_t index = 0; index < tokens_.size(); ++index) {
    const std::string pattern = pattern_of(tokens_[index]);
    if (pattern.empty()) continue;
    first_bytes_[static_cast<unsigned char>(pattern.front())] = true;
    uint32_t node = 0;
    for (const char byte : pattern) {
      const auto [child, is_new] = nodes_[node].children.try_emplace(static_cast<unsigned char>(byte),
                                                                     static_cast<uint32_t>(nodes_.size()));
      node = child->second;
      if (is_new) nodes_.emplace_back();
    }
    nodes_[node].token = static_cast<int32_t>(index);
  }
}

std::vector<AddedTokenMatcher::Piece> AddedTokenMatcher::split(std::string_view text) const {
  std::vector<Piece> pieces;
  size_t done = 0;  // all before is in `pieces`
  for (size_t at = 0; at < text.size();) {
    if (!first_bytes_[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    int32_t longest = -1;
    size_t end = at;
    uint32_t node = 0;
    for (size_t i = at; i < text.size(); ++i) {
      const auto child = nodes_[node].children.find(static_cast<unsigned char>(text[i]));
      if (child == nodes_[node].children.end()) break;
      node = child->second;
      if (nodes_[node].token >= 0) {
        longest = nodes_[node].token;
        end = i + 1;
      }
    }
    if (longest < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(longest)];
    const size_t match_begin = at;
    at = end;  // a match is used up even where single_word discards it
    if (token.single_word && word_character_adjoins(text, match_begin, end)) continue;
    const size_t begin = token.lstrip ? std::max(begin_of_white_space_before(text, match_begin), done)
                                      : std::max(match_begin, done);
    if (token.rstrip) end = end_of_white_space_from(text, end);
    if (done < begin) pieces.push_back({text.substr(done, begin - done), -1});
    pieces.push_back({text.substr(begin, end - std::min(begin, end)), token.id});
    done = std::max(done, end);
  }
  if (done < text.size()) pieces.push_back({text.substr(done), -1});
  return pieces;
}

}  // namespace spot
