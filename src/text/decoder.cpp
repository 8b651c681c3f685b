#include "text/decoder.h"

#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/json_numbers.h"

namespace spot {
namespace {

constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

bool is_one_character(std::string_view text) {
  if (text.empty()) return false;
  size_t end = 0;
  next_code_point(text, end);
  return end == text.size();
}

// The byte that <0x0A> names.
std::optional<char> named_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return std::nullopt;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const bool digit = c >= '0' && c <= '9', upper = c >= 'A' && c <= 'F', lower = c >= 'a' && c <= 'f';
    if (!digit && !upper && !lower) return std::nullopt;
    value = 16 * value + (digit ? c - '0' : c - (upper ? 'A' : 'a') + 10);
  }
  return static_cast<char>(value);
}

// Takes up to `most` times `character` off the front; how many.
size_t strip_front(std::string_view& text, std::string_view character, size_t most) {
  size_t count = 0;
  while (count < most && text.starts_with(character)) {
    text.remove_prefix(character.size());
    ++count;
  }
  return count;
}

size_t strip_end(std::string_view& text, std::string_view character, size_t most) {
  size_t count = 0;
  while (count < most && text.ends_with(character)) {
    text.remove_suffix(character.size());
    ++count;
  }
  return count;
}

}  // namespace

Decoder::Decoder(const nlohmann::json& json, const std::string& where) {
  if (json.is_null())
    fail("{}: there is no decoder; ByteLevel or one of a SentencePiece vocabulary is needed", where);
  add(json, where);
  if (is_byte_level_ && !steps_.empty())
    fail("{}: the decoder combines ByteLevel with others, which is not supported", where);
}

void Decoder::add(const nlohmann::json& json, const std::string& where) {
  const std::string type = json.at("type");
  if (type == "Sequence") {
    for (const auto& part : json.at("decoders")) add(part, where);
    return;
  }
  if (type == "ByteLevel") {
    is_byte_level_ = true;
    return;
  }
  Step step;
  step.fused = !steps_.empty() && (steps_.back().fused || steps_.back().kind == Step::Kind::fuse);
  const auto need_streamable = [&](bool streamable) {
    if (!streamable) fail("{}: the decoder {} after Fuse is not supported", where, type);
  };
  const auto character = [&](const char* key) {
    const std::string text = json.at(key);
    if (!is_one_character(text)) fail("{}: {} of the decoder {} is not one character", where, key, type);
    return text;
  };
  if (type == "Replace") {
    step.kind = Step::Kind::replace;
    step.content = json.at("content");
    step.regex = Regex::of_pattern(json.at("pattern"), where);
    need_streamable(!step.fused || is_one_character(json.at("pattern").value("String", "")));
  } else if (type == "ByteFallback") {
    step.kind = Step::Kind::byte_fallback;
    need_streamable(!step.fused);
  } else if (type == "Fuse") {
    step.kind = Step::Kind::fuse;
  } else if (type == "Strip") {
    step.kind = Step::Kind::strip;
    step.character = character("content");
    for (const auto& [name, count] : {std::pair{"start", &step.start}, {"stop", &step.stop}}) {
      const int32_t given = int32_in(json.at(name));
      if (given < 0) fail("{}: the decoder Strip has the {} {}; a count was expected", where, name, given);
      *count = static_cast<size_t>(given);
    }
  } else if (type == "Metaspace") {
    step.kind = Step::Kind::metaspace;
    step.character = character("replacement");
    step.regex = Regex::of_pattern({{"String", step.character}}, where);
    // Older files have add_prefix_space in place of prepend_scheme.
    step.drops_first =
        json.value("prepend_scheme", json.value("add_prefix_space", true) ? "always" : "never") != "never";
  } else {
    fail(
        "{}: the decoder {} is not supported; ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace and "
        "Sequence are",
        where, type);
  }
  steps_.push_back(std::move(step));
}

std::string DecoderState::push(std::string_view token) {
  std::string out;
  if (decoder_->is_byte_level_) {
    stream_.push(token, out);
  } else {
    push(0, std::string(token), out);
  }
  return out;
}

std::string DecoderState::finish() {
  std::string out;
  stream_.finish(out);
  for (size_t i = 0; i < states_.size(); ++i) {
    if (decoder_->steps_[i].kind == Decoder::Step::Kind::byte_fallback) release_bytes(i, out);
  }
  states_.assign(states_.size(), {});  // what Strip holds at the end is what it strips
  return out;
}

void DecoderState::push(size_t number, std::string token, std::string& out) {
  if (number == decoder_->steps_.size()) {
    out += token;
    return;
  }
  const Decoder::Step& step = decoder_->steps_[number];
  State& state = states_[number];
  switch (step.kind) {
    case Decoder::Step::Kind::replace:
      return push(number + 1, replace_all(*step.regex, token, step.content), out);
    case Decoder::Step::Kind::byte_fallback:
      if (const auto byte = named_byte(token)) {
        state.held += *byte;
        return;
      }
      release_bytes(number, out);
      return push(number + 1, std::move(token), out);
    case Decoder::Step::Kind::fuse:
      return push(number + 1, std::move(token), out);
    case Decoder::Step::Kind::strip:
      return push_strip(number, std::move(token), out);
    case Decoder::Step::Kind::metaspace: {
      const bool drops = step.drops_first && !state.past_front;
      if (!step.fused) state.past_front = true;
      return push(number + 1, replace_all(*step.regex, token, drops ? "" : " "), out);
    }
  }
}

void DecoderState::push_strip(size_t number, std::string token, std::string& out) {
  const Decoder::Step& step = decoder_->steps_[number];
  State& state = states_[number];
  std::string_view text = token;
  if (!step.fused) {
    strip_front(text, step.character, step.start);
    strip_end(text, step.character, step.stop);
    return push(number + 1, std::string(text), out);
  }
  if (!state.past_front) {
    state.stripped += strip_front(text, step.character, step.start - state.stripped);
    state.past_front = !text.empty() || state.stripped == step.start;
  }
  // Of the characters that could be the last ones, as many are held back as could be stripped.
  state.held += text;
  text = state.held;
  const size_t held = strip_end(text, step.character, step.stop) * step.character.size();
  std::string free(text);
  state.held.erase(0, state.held.size() - held);
  push(number + 1, std::move(free), out);
}

void DecoderState::release_bytes(size_t number, std::string& out) {
  const std::string bytes = std::move(states_[number].held);
  states_[number].held.clear();
  if (bytes.empty()) return;
  if (find_invalid_utf8(bytes) == std::string_view::npos) return push(number + 1, bytes, out);
  for (size_t i = 0; i < bytes.size(); ++i) push(number + 1, std::string(kReplacementCharacter), out);
}

}  // namespace spot
