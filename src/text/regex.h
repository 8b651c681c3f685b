// The regular expressions of tokenizer.json files, run by PCRE2 with just-in-time compilation.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace spot {

// A pattern in the dialect of tokenizer.json (Oniguruma), compiled so that it matches exactly what the
// reference implementation matches: \s is the White_Space property, and \p{L}, \p{M}, \p{N}, \p{P}, \p{S} and
// their parts cover Unicode 16 whatever version PCRE2 was built with. Constructs that the two dialects read
// differently are refused. Immutable; may be shared among threads.
class Regex {
 public:
  // Throws Error, beginning with `where`, when the pattern is malformed or uses an unsupported construct.
  Regex(std::string_view pattern, const std::string& where);
  // A `pattern` of tokenizer.json: {"Regex": ...}, or {"String": ...} for plain text, which must not be empty.
  static Regex of_pattern(const nlohmann::json& pattern, const std::string& where);

  struct Code;  // pcre2_code

 private:
  friend class RegexMatcher;
  std::shared_ptr<const Code> code_;
};

// The scratch memory of one thread's searches with one Regex, which must outlive it.
class RegexMatcher {
 public:
  explicit RegexMatcher(const Regex& regex);
  ~RegexMatcher();
  RegexMatcher(RegexMatcher&&) noexcept;

  struct Match {
    size_t begin, end;
  };
  // Finds the leftmost match in text[from..); text before `from` is visible to look-behind. False if there is
  // none. `text` must be well-formed UTF-8.
  bool find(std::string_view text, size_t from, Match& match);

  // Calls `found` with the begin and end of all matches, leftmost first and without overlap; an empty one does
  // not count where the one before ends.
  void for_each(std::string_view text, const std::function<void(size_t, size_t)>& found);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// `text` with every match replaced by `content`.
std::string replace_all(const Regex& regex, std::string_view text, std::string_view content);

}  // namespace spot
