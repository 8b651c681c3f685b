// Cuts text into the pieces that byte-pair merges never cross: the `pre_tokenizer` of a tokenizer.json.
#pragma once

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"

namespace spot {

// A chain of splits; each cuts every piece that the one before left. Immutable; may be shared among threads.
class PreTokenizer {
 public:
  // Reads Sequence, Split (of a regular expression), Digits and ByteLevel, or null. ByteLevel must be there
  // and last: what follows works on raw bytes. Throws Error, beginning with `where`, for anything else.
  PreTokenizer(const nlohmann::json& json, const std::string& where);

 private:
  friend class Splitter;
  enum class Keep { kAll, kMatches };
  struct Stage {
    std::optional<Regex> regex;  // none: only adds the space
    Keep keep;                   // whether text between matches is a piece of its own or dropped
    // A space is put before a piece that does not begin with one.
    bool add_prefix_space;
  };
  void add(const nlohmann::json& json, const std::string& where, bool& byte_level_seen);

  std::vector<Stage> stages_;
};

// One thread's use of a PreTokenizer, which must outlive it.
class Splitter {
 public:
  explicit Splitter(const PreTokenizer& pre_tokenizer);

  // Calls `piece` with the non-empty pieces of well-formed UTF-8 `text`, in order. A piece lives only during
  // its call.
  void split(std::string_view text, const std::function<void(std::string_view)>& piece) {
    run(0, text, piece);
  }

 private:
  void run(size_t stage, std::string_view text, const std::function<void(std::string_view)>& piece);

  const PreTokenizer& pre_tokenizer_;
  std::vector<std::optional<RegexMatcher>> matchers_;  // one a stage
};

}  // namespace spot
