#include "text/pretokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "text/byte_characters.h"
#include "text/punctuation.h"

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
  if (!json.is_null()) add(json, where);
  const auto is_map = [](const Stage& stage) { return stage.kind == Stage::Kind::map_bytes; };
  pieces_are_mapped_ = !stages_.empty() && is_byte_level_ && !is_map(stages_.back());
  // Where nothing follows, the bytes themselves do.
  if (!pieces_are_mapped_) std::erase_if(stages_, is_map);
}

void PreTokenizer::add_split(Regex regex, Behavior behavior, bool invert) {
  stages_.push_back(
      {.kind = Stage::Kind::split, .regex = std::move(regex), .behavior = behavior, .invert = invert});
}

void PreTokenizer::add(const nlohmann::json& json, const std::string& where) {
  const auto behavior_of = [&](const std::string& name) {
    if (name == "Isolated") return Behavior::isolated;
    if (name == "Removed") return Behavior::removed;
    if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
    if (name == "MergedWithNext") return Behavior::merged_with_next;
    if (name == "Contiguous") return Behavior::contiguous;
    fail("{}: the behavior {} of a pre_tokenizer is not known", where, name);
  };
  const std::string type = json.at("type");
  if (is_byte_level_ && (type == "ByteLevel" || type == "Metaspace"))
    fail("{}: the pre_tokenizer {} comes after ByteLevel, which is not supported", where, type);
  if (type == "Sequence") {
    for (const auto& part : json.at("pretokenizers")) add(part, where);
  } else if (type == "ByteLevel") {
    is_byte_level_ = true;
    if (json.at("add_prefix_space").get<bool>()) stages_.push_back({.kind = Stage::Kind::prefix_space});
    if (json.value("use_regex", true)) add_split(Regex(kGpt2Pattern, where), Behavior::isolated);
    stages_.push_back({.kind = Stage::Kind::map_bytes});
  } else if (type == "Metaspace") {
    Stage stage{.kind = Stage::Kind::metaspace, .replacement = json.at("replacement")};
    // Older files have add_prefix_space in place of prepend_scheme.
    const std::string scheme =
        json.value("prepend_scheme", json.value("add_prefix_space", true) ? "always" : "never");
    if (scheme != "always" && scheme != "first" && scheme != "never")
      fail("{}: the prepend_scheme {} of Metaspace is not known", where, scheme);
    stage.prepend = scheme == "always"  ? Stage::Prepend::always
                    : scheme == "first" ? Stage::Prepend::first
                                        : Stage::Prepend::never;
    stages_.push_back(stage);
    if (json.value("split", true))
      add_split(Regex::of_pattern({{"String", stage.replacement}}, where), Behavior::merged_with_next);
  } else if (type == "Digits") {
    const bool individual = json.value("individual_digits", false);
    add_split(Regex(kNumber, where), individual ? Behavior::isolated : Behavior::contiguous);
  } else if (type == "Punctuation") {
    add_split(Regex(kPunctuationPattern, where), behavior_of(json.value("behavior", "Isolated")));
  } else if (type == "WhitespaceSplit") {
    add_split(Regex(R"(\s)", where), Behavior::removed);
  } else if (type == "Split") {
    add_split(Regex::of_pattern(json.at("pattern"), where), behavior_of(json.at("behavior")),
              json.value("invert", false));
  } else {
    fail(
        "{}: the pre_tokenizer {} is not supported; Sequence, Split, Digits, Punctuation, WhitespaceSplit, "
        "ByteLevel and Metaspace are",
        where, type);
  }
}

Splitter::Splitter(const PreTokenizer& pre_tokenizer) : pre_tokenizer_(pre_tokenizer) {
  for (const auto& stage : pre_tokenizer.stages_) {
    matchers_.emplace_back();
    if (stage.regex) matchers_.back().emplace(*stage.regex);
  }
}

void Splitter::run(size_t number, std::string_view text, bool at_start, const Take& piece) {
  using Kind = PreTokenizer::Stage::Kind;
  using Prepend = PreTokenizer::Stage::Prepend;
  if (text.empty()) return;
  if (number == pre_tokenizer_.stages_.size())
    return pre_tokenizer_.pieces_are_mapped_ ? piece(*bytes_of_characters(text)) : piece(text);
  const auto& stage = pre_tokenizer_.stages_[number];
  switch (stage.kind) {
    case Kind::split:
      return run_split(number, text, at_start, piece);
    case Kind::prefix_space:
      if (text.front() == ' ') return run(number + 1, text, at_start, piece);
      return run(number + 1, " " + std::string(text), at_start, piece);
    case Kind::map_bytes:
      return run(number + 1, characters_of_bytes(text), at_start, piece);
    case Kind::metaspace: {
      std::string changed;
      for (const char c : text) c == ' ' ? changed += stage.replacement : changed += c;
      const bool wanted = stage.prepend == Prepend::always || (stage.prepend == Prepend::first && at_start);
      if (wanted && !changed.starts_with(stage.replacement)) changed.insert(0, stage.replacement);
      return run(number + 1, changed, at_start, piece);
    }
  }
}

void Splitter::run_split(size_t number, std::string_view text, bool at_start, const Take& piece) {
  using Behavior = PreTokenizer::Behavior;
  const auto& stage = pre_tokenizer_.stages_[number];
  const auto take = [&](size_t begin, size_t end) {
    run(number + 1, text.substr(begin, end - begin), at_start && begin == 0, piece);
  };
  // Matches and what lies between them, in order; at most two are held back.
  struct Part {
    size_t begin, end;
    bool is_match;
  };
  std::optional<Part> held;  // a part that the next one may join
  bool held_takes_match = false;
  const auto flush = [&] {
    if (held) take(held->begin, held->end);
    held.reset();
  };
  const auto add = [&](Part part) {
    part.is_match ^= stage.invert;
    switch (stage.behavior) {
      case Behavior::isolated:
        return take(part.begin, part.end);
      case Behavior::removed:
        if (!part.is_match) take(part.begin, part.end);
        return;
      case Behavior::contiguous:
        if (held && held->is_match == part.is_match) {
          held->end = part.end;
        } else {
          flush();
          held = part;
        }
        return;
      case Behavior::merged_with_previous:  // a match joins the part before it, unless that was a match
        if (held && part.is_match && held_takes_match) {
          held->end = part.end;
        } else {
          flush();
          held = part;
        }
        held_takes_match = !part.is_match;
        return;
      case Behavior::merged_with_next:  // a match joins the part after it, unless that is a match
        if (held && held->is_match && !part.is_match) {
          held->end = part.end;
          held->is_match = false;
        } else {
          flush();
          held = part;
        }
        return;
    }
  };
  size_t done = 0;
  matchers_[number]->for_each(text, [&](size_t begin, size_t end) {
    if (done < begin) add({done, begin, false});
    add({begin, end, true});
    done = end;
  });
  if (done < text.size()) add({done, text.size(), false});
  flush();
}

}  // namespace spot
