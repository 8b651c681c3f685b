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
  // Reads Sequence, Split, Digits, Punctuation, WhitespaceSplit, ByteLevel and Metaspace, or null. Throws
  // Error, beginning with `where`, for anything else, and for a second ByteLevel or a Metaspace after one.
  PreTokenizer(const nlohmann::json& json, const std::string& where);

  // Whether merges work on bytes; else on the characters of the pieces.
  bool is_byte_level() const { return is_byte_level_; }

 private:
  friend class Splitter;
  // What becomes of matches: pieces of their own, dropped, part of a neighbour, or joined with other matches.
  enum class Behavior { isolated, removed, merged_with_previous, merged_with_next, contiguous };
  struct Stage {
    // map_bytes writes each byte as a character, as ByteLevel does; what follows works on those.
    enum class Kind { split, prefix_space, map_bytes, metaspace } kind;
    std::optional<Regex> regex =
        {};  // split, metaspace: what its pieces begin with, unless it does not split
    Behavior behavior = Behavior::isolated;
    bool invert = false;           // what lies between matches counts as matches
    std::string replacement = {};  // metaspace: what stands for a space
    enum class Prepend { always, first, never } prepend = Prepend::never;  // metaspace: the replacement
  };
  void add(const nlohmann::json& json, const std::string& where);
  void add_split(Regex regex, Behavior behavior, bool invert = false);

  std::vector<Stage> stages_;
  bool is_byte_level_ = false;
  bool pieces_are_mapped_ = false;  // stages follow map_bytes
};

// One thread's use of a PreTokenizer, which must outlive it.
class Splitter {
 public:
  explicit Splitter(const PreTokenizer& pre_tokenizer);

  using Take = std::function<void(std::string_view)>;
  // Calls `piece` with the non-empty pieces of well-formed UTF-8 `text`, in order. A piece lives only during
  // its call. `at_start`: whether text begins where the whole text did.
  void split(std::string_view text, bool at_start, const Take& piece) { run(0, text, at_start, piece); }

 private:
  void run(size_t stage, std::string_view text, bool at_start, const Take& piece);
  void run_split(size_t stage, std::string_view text, bool at_start, const Take& piece);

  const PreTokenizer& pre_tokenizer_;
  std::vector<std::optional<RegexMatcher>> matchers_;  // one a stage
};

}  // namespace spot
