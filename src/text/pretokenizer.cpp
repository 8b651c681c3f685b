#include "text/pretokenizer.h"

#include <nlohmann/json.hpp>

#include "core/error.h"

namespace spot {
namespace {

// The pattern of GPT-2, which ByteLevel splits with when `use_regex` is set.
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// Digits asks the standard library of the reference implementation what a number is, not its regular
// expressions; that one also knows the numbers of Unicode 17.
constexpr std::string_view kNumber = R"([\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}])";

}  // namespace

PreTokenizer::PreTokenizer(const nlohmann::json& json, const std::string& where) {
  bool byte_level_seen = false;
  if (!json.is_null()) add(json, where, byte_level_seen);
  if (!byte_level_seen) {
    fail("{}: the pre_tokenizer has no ByteLevel part; only byte-level BPE tokenizers are supported", where);
  }
}

void PreTokenizer::add(const nlohmann::json& json, const std::string& where, bool& byte_level_seen) {
  const std::string type = json.at("type");
  if (type == "Sequence") {
    for (const auto& part : json.at("pretokenizers")) add(part, where, byte_level_seen);
    return;
  }
  if (byte_level_seen)
    fail("{}: the pre_tokenizer {} comes after ByteLevel, which is not supported", where, type);
  if (type == "ByteLevel") {
    byte_level_seen = true;
    const bool add_prefix_space = json.at("add_prefix_space");
    const bool use_regex = json.value("use_regex", true);
    stages_.push_back({std::nullopt, Keep::kAll, add_prefix_space});
    if (use_regex) stages_.back().regex.emplace(kGpt2Pattern, where);
  } else if (type == "Digits") {
    const bool individual = json.value("individual_digits", false);
    stages_.push_back({Regex(std::string(kNumber) + (individual ? "" : "+"), where), Keep::kAll, false});
  } else if (type == "Split") {
    const auto& pattern = json.at("pattern");
    const std::string behavior = json.at("behavior");
    const bool invert = json.value("invert", false);
    if (!pattern.contains("Regex"))
      fail("{}: a Split by a plain string is not supported, only by Regex", where);
    // "Removed" with `invert` keeps the matches and drops what lies between.
    const bool removes_gaps = behavior == "Removed" && invert;
    if (behavior != "Isolated" && !removes_gaps) {
      fail("{}: a Split with behavior {} and invert {} is not supported, only Isolated is", where, behavior,
           invert);
    }
    stages_.push_back({Regex(pattern.at("Regex").get<std::string>(), where),
                       removes_gaps ? Keep::kMatches : Keep::kAll, false});
  } else {
    fail("{}: the pre_tokenizer {} is not supported; Sequence, Split, Digits and ByteLevel are", where, type);
  }
}

Splitter::Splitter(const PreTokenizer& pre_tokenizer) : pre_tokenizer_(pre_tokenizer) {
  for (const auto& stage : pre_tokenizer.stages_) {
    matchers_.emplace_back();
    if (stage.regex) matchers_.back().emplace(*stage.regex);
  }
}

void Splitter::run(size_t number, std::string_view text, const std::function<void(std::string_view)>& piece) {
  if (text.empty()) return;
  if (number == pre_tokenizer_.stages_.size()) return piece(text);
  const auto& stage = pre_tokenizer_.stages_[number];
  std::string prefixed;
  if (stage.add_prefix_space && text.front() != ' ') {
    prefixed.reserve(text.size() + 1);
    prefixed += ' ';
    prefixed += text;
    text = prefixed;
  }
  if (!stage.regex) return run(number + 1, text, piece);
  RegexMatcher& matcher = *matchers_[number];
  RegexMatcher::Match match;
  size_t done = 0;
  while (done < text.size() && matcher.find(text, done, match) && match.end > match.begin) {
    if (stage.keep == PreTokenizer::Keep::kAll) run(number + 1, text.substr(done, match.begin - done), piece);
    run(number + 1, text.substr(match.begin, match.end - match.begin), piece);
    done = match.end;
  }
  if (stage.keep == PreTokenizer::Keep::kAll) run(number + 1, text.substr(done), piece);
}

}  // namespace spot
