#include "text/normalizer.h"

#include <nlohmann/json.hpp>

#include "core/error.h"

namespace spot {
namespace {

size_t white_space_at_front(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    size_t after = end;
    if (!is_white_space(next_code_point(text, after))) break;
    end = after;
  }
  return end;
}

size_t end_without_white_space(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t before = previous_offset(text, end);
    size_t after = before;
    if (!is_white_space(next_code_point(text, after))) break;
    end = before;
  }
  return end;
}

}  // namespace

Normalizer::Normalizer(const nlohmann::json& json, const std::string& where) {
  if (!json.is_null()) add(json, where);
}

void Normalizer::add(const nlohmann::json& json, const std::string& where) {
  const std::string type = json.at("type");
  if (type == "Sequence") {
    for (const auto& part : json.at("normalizers")) add(part, where);
    return;
  }
  Step step;
  if (const auto form = normalization_form(type)) {
    step.kind = Step::Kind::form;
    step.form = *form;
  } else if (type == "Lowercase") {
    step.kind = Step::Kind::lowercase;
  } else if (type == "Strip") {
    step.kind = Step::Kind::strip;
    step.left = json.at("strip_left");
    step.right = json.at("strip_right");
  } else if (type == "Prepend") {
    step.kind = Step::Kind::prepend;
    step.content = json.at("prepend");
  } else if (type == "Replace") {
    step.kind = Step::Kind::replace;
    step.content = json.at("content");
    step.regex = Regex::of_pattern(json.at("pattern"), where);
  } else {
    fail(
        "{}: the normalizer {} is not supported; NFC, NFD, NFKC, NFKD, Lowercase, Strip, Prepend, Replace, "
        "Sequence and null are",
        where, type);
  }
  steps_.push_back(std::move(step));
}

std::string Normalizer::apply(const Step& step, std::string_view text, bool& at_start) {
  switch (step.kind) {
    case Step::Kind::form:
      return spot::normalize(text, step.form);
    case Step::Kind::lowercase:
      return lowercase(text);
    case Step::Kind::strip: {
      const size_t begin = step.left ? white_space_at_front(text) : 0;
      if (begin > 0) at_start = false;
      text.remove_prefix(begin);
      return std::string(step.right ? text.substr(0, end_without_white_space(text)) : text);
    }
    case Step::Kind::prepend:
      return text.empty() ? std::string() : step.content + std::string(text);
    case Step::Kind::replace: {
      RegexMatcher::Match first{};
      if (RegexMatcher(*step.regex).find(text, 0, first) && first.begin == 0 && first.end > 0)
        at_start = !step.content.empty();
      return replace_all(*step.regex, text, step.content);
    }
  }
  fail("a normalizer of no known kind");
}

std::string Normalizer::normalize(std::string_view text, bool& at_start) const {
  std::string out(text);
  for (const Step& step : steps_) out = apply(step, out, at_start);
  return out;
}

}  // namespace spot
