#include "text/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "text/unicode.h"
#include "text/unicode_categories.h"

namespace spot {
namespace {

constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// Rewrites a pattern for PCRE2, refusing what the two dialects read differently (^ $ . \w \d \h \b, nested
// classes, class intersections, scripts, ...). None of the published byte-level tokenizers uses those.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where) : pattern_(pattern), where_(where) {}

  std::string translate() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape();
      } else if (c == '[') {
        open_class();
      } else if (c == ']' && in_class_) {
        in_class_ = false;
        copy(1);
      } else if (c == '(' && !in_class_) {
        group();
      } else if (!in_class_ && (c == '^' || c == '$' || c == '.')) {
        refuse(std::string(1, c));
      } else if (!in_class_ && pattern_.substr(at_, 2) == "}+") {
        refuse("{n,m}+");  // possessive to one dialect, a repeated repetition to the other
      } else if (in_class_ && (c == '&' && pattern_.substr(at_, 2) == "&&")) {
        refuse("&&");
      } else {
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(const std::string& construct) const {
    fail("{}: the regular expression {} uses {} at byte {}, which is not supported", where_, pattern_,
         construct, at_);
  }

  void copy(size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }

  // Members of a character class, written inside the class we are in or as one of their own.
  void members(std::string_view text, bool negated) {
    if (negated && in_class_) refuse("a negated class inside a class");
    if (in_class_) {
      out_ += text;
    } else {
      out_ += negated ? "[^" : "[";
      out_ += text;
      out_ += ']';
    }
  }

  void escape() {
    if (at_ + 1 == pattern_.size()) refuse("a trailing backslash");
    const char c = pattern_[at_ + 1];
    if (c == 's' || c == 'S') {
      members(kWhiteSpace, c == 'S');
      at_ += 2;
    } else if (c == 'p' || c == 'P') {
      const size_t close = pattern_.find('}', at_);
      if (close == std::string_view::npos || pattern_[at_ + 2] != '{') refuse("\\p without {}");
      const std::string_view name = pattern_.substr(at_ + 3, close - at_ - 3);
      const auto* category = std::find_if(kUnicodeCategories.begin(), kUnicodeCategories.end(),
                                          [&](const UnicodeCategory& known) { return known.name == name; });
      if (category == kUnicodeCategories.end()) refuse(std::string(pattern_.substr(at_, close + 1 - at_)));
      std::string text = fmt::format("\\p{{{}}}", name);
      for (std::string_view additions : category->additions) text += additions;
      members(text, c == 'P');
      at_ = close + 1;
    } else if (pattern_.substr(at_, 3) == "\\x{") {
      copy(std::min(pattern_.find('}', at_), pattern_.size() - 1) + 1 - at_);
    } else if (c == 'r' || c == 'n' || c == 't' || c == 'f' || (c > ' ' && c < 0x7F && !std::isalnum(c))) {
      copy(2);
    } else {
      refuse(fmt::format("\\{}", c));
    }
  }

  void open_class() {
    if (in_class_) refuse("a class inside a class");
    in_class_ = true;
    copy(1);
    if (at_ < pattern_.size() && pattern_[at_] == '^') copy(1);
    if (at_ < pattern_.size() && pattern_[at_] == ']') refuse("an empty class");
  }

  void group() {
    constexpr std::array<std::string_view, 7> kKnown = {"(?:", "(?i:", "(?!", "(?=", "(?<!", "(?<=", "(?>"};
    if (pattern_.substr(at_, 2) != "(?") return copy(1);
    for (std::string_view opening : kKnown) {
      if (pattern_.substr(at_, opening.size()) == opening) return copy(opening.size());
    }
    refuse(std::string(pattern_.substr(at_, 4)));
  }

  std::string_view pattern_;
  const std::string& where_;
  size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

std::string pcre2_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

struct Regex::Code {
  pcre2_code* code;
  explicit Code(pcre2_code* c) : code(c) {}
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(std::string_view pattern, const std::string& where) {
  const std::string translated = Translator(pattern, where).translate();
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                                   PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (code == nullptr) {
    fail("{}: the regular expression {} is malformed: {}", where, pattern, pcre2_message(error));
  }
  code_ = std::make_shared<const Code>(code);
  // Where the processor has no just-in-time compiler, matching goes on interpreted.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
}

Regex Regex::of_pattern(const nlohmann::json& pattern, const std::string& where) {
  if (pattern.contains("Regex")) return Regex(pattern.at("Regex").get<std::string>(), where);
  const std::string text = pattern.at("String");
  if (text.empty()) fail("{}: a pattern is an empty string, which is not supported", where);
  std::string escaped;
  for (const char c : text) {
    if (c > ' ' && c < 0x7F && !std::isalnum(c)) escaped += '\\';
    escaped += c;
  }
  return Regex(escaped, where);
}

struct RegexMatcher::State {
  explicit State(std::shared_ptr<const Regex::Code> c) : code(std::move(c)) {
    match = pcre2_match_data_create_from_pattern(code->code, nullptr);
    context = pcre2_match_context_create(nullptr);
    if (match == nullptr || context == nullptr) fail("out of memory for a regular expression");
    // The default limits are a guard against patterns from strangers; they would fail on pieces of a
    // megabyte.
    pcre2_set_match_limit(context, ~uint32_t{0});
    pcre2_set_depth_limit(context, ~uint32_t{0});
    pcre2_set_heap_limit(context, ~uint32_t{0});
  }
  ~State() {
    if (stack) pcre2_jit_stack_free(stack);
    pcre2_match_context_free(context);
    pcre2_match_data_free(match);
  }
  std::shared_ptr<const Regex::Code> code;
  pcre2_match_data* match = nullptr;
  pcre2_match_context* context = nullptr;
  pcre2_jit_stack* stack = nullptr;
};

RegexMatcher::RegexMatcher(const Regex& regex) : state_(std::make_unique<State>(regex.code_)) {}
RegexMatcher::~RegexMatcher() = default;
RegexMatcher::RegexMatcher(RegexMatcher&&) noexcept = default;

bool RegexMatcher::find(std::string_view text, size_t from, Match& match) {
  const auto search = [&](uint32_t options) {
    return pcre2_match(state_->code->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                       PCRE2_NO_UTF_CHECK | options, state_->match, state_->context);
  };
  int found = search(0);
  if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
    // A long backtracking match: give it a growing stack, and at last the interpreter, which uses the heap.
    if (state_->stack == nullptr) {
      state_->stack = pcre2_jit_stack_create(32 << 10, 64 << 20, nullptr);
      pcre2_jit_stack_assign(state_->context, nullptr, state_->stack);
      found = search(0);
    }
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = search(PCRE2_NO_JIT);
  }
  if (found == PCRE2_ERROR_NOMATCH) return false;
  if (found < 0) fail("splitting text failed at byte {} of {}: {}", from, text.size(), pcre2_message(found));
  const PCRE2_SIZE* range = pcre2_get_ovector_pointer(state_->match);
  match = {range[0], range[1]};
  return true;
}

void RegexMatcher::for_each(std::string_view text, const std::function<void(size_t, size_t)>& found) {
  Match match{};
  size_t from = 0;
  bool any = false;
  for (size_t last_end = 0; from <= text.size() && find(text, from, match);) {
    if (match.begin == match.end && any && match.end == last_end) {
      if (from == text.size()) return;
      next_code_point(text, from);
      continue;
    }
    any = true;
    from = last_end = match.end;
    found(match.begin, match.end);
  }
}

std::string replace_all(const Regex& regex, std::string_view text, std::string_view content) {
  std::string out;
  size_t done = 0;
  RegexMatcher(regex).for_each(text, [&](size_t begin, size_t end) {
    out += text.substr(done, begin - done);
    out += content;
    done = end;
  });
  out += text.substr(done);
  return out;
}

}  // namespace spot
