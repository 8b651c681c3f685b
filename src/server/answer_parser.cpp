#include "server/answer_parser.h"

#include <algorithm>
#include <optional>

#include "server/fields.h"

namespace spot::server {
namespace {

constexpr std::string_view kThink = "<think>", kThinkEnd = "</think>", kCall = "<tool_call>",
                           kCallEnd = "</tool_call>", kBlank = " \t\r\n";

// How much at the end of `text` may be the beginning of `tag`.
size_t beginning_at_end(std::string_view text, std::string_view tag) {
  for (size_t size = std::min(tag.size() - 1, text.size()); size > 0; --size)
    if (text.substr(text.size() - size) == tag.substr(0, size)) return size;
  return 0;
}

size_t without_trailing_breaks(std::string_view text) {
  while (!text.empty() && text.back() == '\n') text.remove_suffix(1);
  return text.size();
}

struct Call {
  std::string name, arguments;
};

// {"name": ..., "arguments": {...} or their text}, in any order.
std::optional<Call> json_call(std::string_view text) {
  const Json call = parse_value(text);
  if (!call.is_object() || !call.contains("name") || !call.at("name").is_string()) return {};
  const Json arguments = call.value("arguments", call.value("parameters", Json::object()));
  return Call{call.at("name").get<std::string>(),
              arguments.is_string() ? arguments.get<std::string>() : to_text(arguments)};
}

// The type that a tool's schema gives a parameter; empty where it does not say.
std::string parameter_type(const Json& tools, const std::string& function, const std::string& parameter) {
  if (!tools.is_array()) return {};
  for (const Json& tool : tools) {
    if (!tool.is_object() || tool.value("function", Json::object()).value("name", "") != function) continue;
    const auto pointer = Json::json_pointer("/function/parameters/properties");
    if (!tool.contains(pointer) || !tool.at(pointer).is_object() || !tool.at(pointer).contains(parameter))
      return {};
    const Json& schema = tool.at(pointer).at(parameter);
    return schema.is_object() && schema.contains("type") && schema.at("type").is_string()
               ? schema.at("type").get<std::string>()
               : "";
  }
  return {};
}

// <function=NAME> <parameter=P> value </parameter> ... </function>
std::optional<Call> xml_call(std::string_view text, const Json& tools) {
  const auto skip_blanks = [&] { text.remove_prefix(std::min(text.find_first_not_of(kBlank), text.size())); };
  const auto tag = [&](std::string_view begin) -> std::optional<std::string> {
    skip_blanks();
    const size_t end = text.find('>');
    if (text.substr(0, begin.size()) != begin || end == std::string_view::npos) return {};
    std::string name(text.substr(begin.size(), end - begin.size()));
    text.remove_prefix(end + 1);
    return name;
  };
  const auto function = tag("<function=");
  if (!function || function->empty()) return {};
  Json arguments = Json::object();
  while (const auto parameter = tag("<parameter=")) {
    const size_t end = text.find("</parameter>");
    if (end == std::string_view::npos) return {};
    std::string_view value = text.substr(0, end);
    if (!value.empty() && value.front() == '\n') value.remove_prefix(1);
    if (!value.empty() && value.back() == '\n') value.remove_suffix(1);
    text.remove_prefix(end + std::string_view("</parameter>").size());
    Json parsed = parameter_type(tools, *function, *parameter) == "string" ? Json() : parse_value(value);
    if (parsed.is_discarded() || (parsed.is_null() && value != "null")) parsed = std::string(value);
    arguments[*parameter] = std::move(parsed);
  }
  skip_blanks();
  if (text.substr(0, 11) != "</function>") return {};
  return Call{*function, to_text(arguments)};
}

// Reads the literal characters of a call's JSON before its arguments.
struct Scanner {
  std::string_view text;
  bool ended = false;  // the text ended before a mismatch

  void skip_blanks() { text.remove_prefix(std::min(text.find_first_not_of(kBlank), text.size())); }
  bool expect(std::string_view literal) {
    skip_blanks();
    if (text.substr(0, literal.size()) == literal) return text.remove_prefix(literal.size()), true;
    ended = literal.substr(0, text.size()) == text;
    return false;
  }
  // A JSON text, with its quotes.
  std::optional<std::string> quoted() {
    skip_blanks();
    if (text.empty()) return ended = true, std::nullopt;
    if (text.front() != '"') return std::nullopt;
    for (size_t i = 1; i < text.size(); ++i) {
      if (text[i] == '\\') {
        ++i;
      } else if (text[i] == '"') {
        std::string found(text.substr(0, i + 1));
        text.remove_prefix(i + 1);
        return found;
      }
    }
    return ended = true, std::nullopt;
  }
};

}  // namespace

AnswerParser::AnswerParser(AnswerFormat format, std::function<std::string()> new_call_id)
    : format_(std::move(format)), new_call_id_(std::move(new_call_id)) {
  if (!format_.reasoning) state_ = State::content;
  if (format_.reasoning && format_.starts_in_reasoning) state_ = State::reasoning, after_tag_ = true;
}

AnswerDelta AnswerParser::push(std::string_view text) {
  AnswerDelta delta;
  held_ += text;
  while (advance(delta, /*last=*/false)) {
  }
  return delta;
}

AnswerDelta AnswerParser::finish() {
  AnswerDelta delta;
  while (advance(delta, /*last=*/true)) {
  }
  return delta;
}

// One move; false when more text is needed.
bool AnswerParser::advance(AnswerDelta& delta, bool last) {
  switch (state_) {
    case State::start:
      return read_start(last);
    case State::reasoning:
      return read_reasoning(delta, last);
    case State::content:
      return read_content(delta, last);
    case State::call_name:
      return read_call_name(delta, last);
    case State::call_arguments:
      return read_call_arguments(delta);
    case State::call_end:
      return read_call_end(last);
    case State::call_whole:
      return read_call_whole(delta, last);
  }
  return false;
}

bool AnswerParser::read_start(bool last) {
  const size_t first = held_.find_first_not_of(kBlank);
  const std::string_view rest = first == std::string::npos ? "" : std::string_view(held_).substr(first);
  if (rest.substr(0, kThink.size()) == kThink) {
    held_.erase(0, first + kThink.size());
    state_ = State::reasoning, after_tag_ = true;
    return true;
  }
  if (!last && kThink.substr(0, rest.size()) == rest) return false;
  state_ = State::content;
  return true;
}

bool AnswerParser::read_reasoning(AnswerDelta& delta, bool last) {
  if (after_tag_) {
    held_.erase(0, std::min(held_.find_first_not_of('\n'), held_.size()));
    if (held_.empty()) return false;
    after_tag_ = false;
  }
  const size_t end = held_.find(kThinkEnd);
  if (end != std::string::npos) {
    delta.reasoning += held_.substr(0, without_trailing_breaks(std::string_view(held_).substr(0, end)));
    held_.erase(0, end + kThinkEnd.size());
    state_ = State::content, after_tag_ = true;
    return true;
  }
  size_t sure = held_.size();
  if (!last) {
    sure -= beginning_at_end(held_, kThinkEnd);
    sure = without_trailing_breaks(std::string_view(held_).substr(0, sure));
  }
  delta.reasoning += held_.substr(0, sure);
  held_.erase(0, sure);
  return false;
}

bool AnswerParser::read_content(AnswerDelta& delta, bool last) {
  if (after_tag_) {
    held_.erase(0, std::min(held_.find_first_not_of('\n'), held_.size()));
    if (held_.empty()) return false;
    after_tag_ = false;
  }
  if (!format_.tools) {
    delta.content += held_;
    held_.clear();
    return false;
  }
  const size_t begin = held_.find(kCall);
  if (begin != std::string::npos) {
    delta.content += held_.substr(0, without_trailing_breaks(std::string_view(held_).substr(0, begin)));
    held_.erase(0, begin + kCall.size());
    state_ = State::call_name;
    return true;
  }
  size_t sure = held_.size();
  if (!last) {
    sure -= beginning_at_end(held_, kCall);
    sure = without_trailing_breaks(std::string_view(held_).substr(0, sure));
  }
  delta.content += held_.substr(0, sure);
  held_.erase(0, sure);
  return false;
}

void AnswerParser::begin_call(AnswerDelta& delta, const std::string& name) {
  ++calls_;
  if (keeps_call())
    delta.calls.push_back({.index = calls_ - 1, .id = new_call_id_(), .name = name, .arguments = ""});
}

// {"name": "...", "arguments": { and no other order: what comes then can be passed on as it is.
bool AnswerParser::read_call_name(AnswerDelta& delta, bool last) {
  // What follows an end tag does not count, even within a name's quotes: when it came later, the call had ended.
  const size_t end = held_.find(kCallEnd);
  const std::string_view before_end = std::string_view(held_).substr(0, end);
  Scanner scanner{before_end};
  std::optional<std::string> name;
  const bool found = scanner.expect("{") && scanner.expect("\"name\"") && scanner.expect(":") &&
                     (name = scanner.quoted()) && scanner.expect(",") && scanner.expect("\"arguments\"") &&
                     scanner.expect(":") && (scanner.skip_blanks(), true) && scanner.expect("{");
  if (!found) {
    if (!scanner.ended || last || end != std::string::npos) {
      state_ = State::call_whole;
      return true;
    }
    return false;
  }
  const Json text = parse_value(*name);
  if (!text.is_string()) {
    state_ = State::call_whole;
    return true;
  }
  begin_call(delta, text.get<std::string>());
  held_ = "{" + held_.substr(before_end.size() - scanner.text.size());
  depth_ = 0, in_string_ = escaped_ = false;
  state_ = State::call_arguments;
  return true;
}

bool AnswerParser::read_call_arguments(AnswerDelta& delta) {
  if (held_.empty()) return false;
  size_t end = 0;
  bool whole = false;
  while (end < held_.size() && !whole) {
    const char c = held_[end++];
    if (in_string_) {
      if (escaped_)
        escaped_ = false;
      else if (c == '\\')
        escaped_ = true;
      else if (c == '"')
        in_string_ = false;
    } else if (c == '"') {
      in_string_ = true;
    } else if (c == '{' || c == '[') {
      ++depth_;
    } else if (c == '}' || c == ']') {
      whole = --depth_ == 0;
    }
  }
  if (keeps_call()) {
    if (delta.calls.empty() || delta.calls.back().index != calls_ - 1)
      delta.calls.push_back({.index = calls_ - 1, .id = "", .name = "", .arguments = ""});
    delta.calls.back().arguments += held_.substr(0, end);
  }
  held_.erase(0, end);
  if (whole) state_ = State::call_end;
  return whole;
}

bool AnswerParser::read_call_end(bool last) {
  const size_t end = held_.find(kCallEnd);
  if (end == std::string::npos) {
    if (last) held_.clear();
    return false;
  }
  held_.erase(0, end + kCallEnd.size());
  state_ = State::content, after_tag_ = true;
  return true;
}

bool AnswerParser::read_call_whole(AnswerDelta& delta, bool last) {
  const size_t end = held_.find(kCallEnd);
  if (end == std::string::npos && !last) return false;
  const std::string body = held_.substr(0, end);
  held_.erase(0, end == std::string::npos ? held_.size() : end + kCallEnd.size());
  std::optional<Call> call = json_call(body);
  if (!call) call = xml_call(body, format_.tool_list);
  state_ = State::content;
  if (!call) {
    delta.content += std::string(kCall) + body + (end == std::string::npos ? "" : std::string(kCallEnd));
    return !held_.empty();
  }
  begin_call(delta, call->name);
  if (keeps_call()) delta.calls.back().arguments = call->arguments;
  after_tag_ = true;
  return !held_.empty();
}

}  // namespace spot::server
