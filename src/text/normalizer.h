// What happens to text before it is split: the `normalizer` of a tokenizer.json.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"
#include "text/unicode.h"

namespace spot {

// A chain of rewritings. Immutable; may be shared among threads.
class Normalizer {
 public:
  // Reads NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace (of a string or a regular expression),
  // Sequence, or null. Throws Error, beginning with `where`, for anything else.
  Normalizer(const nlohmann::json& json, const std::string& where);

  bool is_empty() const { return steps_.empty(); }

  // Normalizes well-formed UTF-8. `at_start`: whether text's first character still stands for the beginning of
  // what was given; set to false where the beginning is stripped off.
  std::string normalize(std::string_view text, bool& at_start) const;
  std::string normalize(std::string_view text) const {
    bool at_start = true;
    return normalize(text, at_start);
  }

 private:
  struct Step {
    enum class Kind { form, lowercase, strip, prepend, replace } kind;
    NormalizationForm form = NormalizationForm::nfc;
    bool left = false, right = false;  // strip
    std::string content;               // prepend, replace
    std::optional<Regex> regex;        // replace
  };
  void add(const nlohmann::json& json, const std::string& where);
  static std::string apply(const Step& step, std::string_view text, bool& at_start);

  std::vector<Step> steps_;
};

}  // namespace spot
