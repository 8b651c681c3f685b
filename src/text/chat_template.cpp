#include "text/chat_template.h"

#include <algorithm>
#include <array>
#include <ctime>
#include <nlohmann/json.hpp>

#include "core/error.h"
#include "core/files.h"
#include "text/unicode.h"

namespace spot {
namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr std::string_view kStart = "<|im_start|>", kEnd = "<|im_end|>\n";
constexpr std::string_view kOpenThink = "<think>", kCloseThink = "</think>";

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Jinja's trim filter: white space of Unicode, and the four ASCII separators that Python counts as such.
std::string_view trim(std::string_view text) {
  const auto is_space = [](char32_t c) { return is_white_space(c) || (c >= 0x1C && c <= 0x1F); };
  while (!text.empty()) {
    size_t after = 0;
    if (!is_space(next_code_point(text, after))) break;
    text.remove_prefix(after);
  }
  while (!text.empty()) {
    const size_t before = previous_offset(text, text.size());
    size_t i = before;
    if (!is_space(next_code_point(text, i))) break;
    text = text.substr(0, before);
  }
  return text;
}

std::string_view strip_newlines_before(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of('\n'), text.size()));
}

std::string_view strip_newlines_after(std::string_view text) {
  return text.substr(0, text.find_last_not_of('\n') + 1);
}

std::string_view after_last(std::string_view text, std::string_view mark) {
  const size_t at = text.rfind(mark);
  return at == std::string_view::npos ? text : text.substr(at + mark.size());
}

void append(std::string& out, std::initializer_list<std::string_view> parts) {
  for (std::string_view part : parts) out += part;
}

// The text between `before` and the next `close`, unless a literal of the template ends right after `before`.
std::string_view text_between(std::string_view jinja, std::string_view before, std::string_view close) {
  for (size_t at = jinja.find(before); at != std::string_view::npos; at = jinja.find(before, at + 1)) {
    const std::string_view rest = jinja.substr(at + before.size());
    if (!rest.empty() && rest.front() != '\'' && rest.front() != '"') return rest.substr(0, rest.find(close));
  }
  return {};
}

// Whether template text holds <think> and one line break as the end of a literal. The break may be written as
// \n.
bool ends_in_open_think(std::string_view jinja) {
  for (std::string_view line_break : {"\\n", "\n"}) {
    for (std::string_view quote : {"'", "\""}) {
      if (contains(jinja, fmt::format("{}{}{}", kOpenThink, line_break, quote))) return true;
    }
  }
  return false;
}

// A user message that carries the answer of a tool is no question of the user's.
bool is_tool_response(std::string_view content) {
  return content.starts_with("<tool_response>") && content.ends_with("</tool_response>");
}

// Consecutive tool messages form one turn of the user.
void append_tool_message(const std::vector<ChatMessage>& messages, size_t i, std::string_view content,
                         std::string& out) {
  if (i == 0 || messages[i - 1].role != "tool") append(out, {kStart, "user"});
  append(out, {"\n<tool_response>\n", content, "\n</tool_response>"});
  if (i + 1 == messages.size() || messages[i + 1].role != "tool") out += kEnd;
}

std::string todays_date() {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  constexpr std::array kMonths = {"Jan", "Feb", "Mar", "Apr", "May", "Jun",
                                  "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"};
  return fmt::format("{:02} {} {}", local.tm_mday, kMonths[static_cast<size_t>(local.tm_mon)],
                     local.tm_year + 1900);
}

// chat_template is the text itself or, in older checkpoints, a list of named ones.
std::string template_in(const json& config) {
  const json& entry = config.contains("chat_template") ? config.at("chat_template") : json();
  if (entry.is_string()) return entry;
  if (!entry.is_array()) return {};
  for (const auto& named : entry) {
    if (named.at("name") == "default") return named.at("template");
  }
  return {};
}

}  // namespace

ChatTemplate ChatTemplate::load(const fs::path& folder) {
  const fs::path config_file = folder / "tokenizer_config.json", jinja_file = folder / "chat_template.jinja";
  if (!fs::is_directory(folder)) fail("{}: not a checkpoint folder", folder.string());
  const json config = fs::exists(config_file) ? read_json(config_file) : json::object();
  const bool own_file = fs::exists(jinja_file);
  try {
    const std::string jinja = own_file ? read_file(jinja_file) : template_in(config);
    if (jinja.empty()) {
      fail(
          "{}: has no chat template (no chat_template.jinja, and no chat_template in tokenizer_config.json); "
          "this is a base model, give it plain text",
          folder.string());
    }
    const json bos = config.contains("bos_token") ? config.at("bos_token") : json();
    const std::string bos_token = bos.is_object() ? bos.at("content") : bos.is_string() ? bos : json("");
    return ChatTemplate(jinja, bos_token, (own_file ? jinja_file : config_file).string());
  } catch (const json::exception& e) {
    fail("{}: not of the form of a tokenizer_config.json: {}", config_file.string(), e.what());
  }
}

ChatTemplate::ChatTemplate(std::string_view jinja, std::string bos_token, const std::string& where)
    : where_(where), bos_token_(std::move(bos_token)) {
  const auto unknown = [&](std::string_view why) {
    fail("{}: the chat template is of no known family (ChatML, Qwen3, Qwen3.5, Llama 3): {}", where, why);
  };
  if (contains(jinja, "<|start_header_id|>")) {
    if (!contains(jinja, "Cutting Knowledge Date")) {
      family_ = Family::kLlama3;
      return;
    }
    family_ = Family::kLlama31;
    if (contains(jinja, "if system_message")) unknown("its system prompt is optional");
    if (!contains(jinja, "strftime_now")) {
      date_ = text_between(jinja, "date_string = \"", "\"");
      if (date_.empty()) unknown("it names no date");
    }
    return;
  }
  if (!contains(jinja, kStart)) unknown("it holds neither <|im_start|> nor <|start_header_id|>");
  const std::string_view ending = jinja.substr(std::min(jinja.rfind("add_generation_prompt"), jinja.size()));
  if (contains(jinja, "last_query_index") && contains(jinja, "reasoning_content")) {
    family_ =
        contains(jinja, "render_content(") && contains(jinja, "|trim") ? Family::kQwen35 : Family::kQwen3;
    obeys_enable_thinking_ = contains(ending, "enable_thinking");
    opens_thinking_ = ends_in_open_think(ending);
    thinks_by_default_ = !contains(ending, "enable_thinking is true");
    return;
  }
  family_ = Family::kChatMl;
  for (std::string_view construct : {"think", "strftime", "macro", "reasoning"}) {
    if (contains(jinja, construct)) unknown(fmt::format("a ChatML template with \"{}\" in it", construct));
  }
  wraps_tool_responses_ = contains(jinja, "<tool_response>");
  if (contains(jinja, "loop.last") && !wraps_tool_responses_)
    unknown("it treats the last message differently");
  for (std::string_view line_break : {"\\n", "\n"}) {
    if (!default_system_.empty()) break;
    default_system_ = text_between(jinja, fmt::format("{}system{}", kStart, line_break), "<|im_end|>");
  }
  if (default_system_.find_first_of("'\"{}\\") != std::string::npos)
    unknown("its default system prompt is not plain text");
}

std::string ChatTemplate::render(const std::vector<ChatMessage>& messages, bool add_generation_prompt,
                                 std::optional<bool> enable_thinking) const {
  if (messages.empty()) fail("a chat prompt needs at least one message");
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (find_invalid_utf8(content) != std::string_view::npos) fail("message {} ({}) is not UTF-8", i, role);
    const bool tool =
        role == "tool" && (wraps_tool_responses_ || family_ == Family::kQwen3 || family_ == Family::kQwen35);
    if (role != "system" && role != "user" && role != "assistant" && !tool) {
      fail("message {} has the role {}, which the chat template of {} does not take", i, role, where_);
    }
  }
  std::string out;
  const bool is_llama = family_ == Family::kLlama3 || family_ == Family::kLlama31;
  if (is_llama) {
    render_llama3(messages, out);
  } else if (family_ == Family::kChatMl) {
    render_chatml(messages, out);
  } else {
    render_qwen3(messages, out);
  }
  if (!add_generation_prompt) return out;
  out += is_llama ? "<|start_header_id|>assistant<|end_header_id|>\n\n" : "<|im_start|>assistant\n";
  if (obeys_enable_thinking_ && !enable_thinking.value_or(thinks_by_default_)) {
    out += "<think>\n\n</think>\n\n";
  } else if (opens_thinking_) {
    out += "<think>\n";
  }
  return out;
}

void ChatTemplate::render_chatml(const std::vector<ChatMessage>& messages, std::string& out) const {
  if (!default_system_.empty() && messages.front().role != "system") {
    append(out, {kStart, "system\n", default_system_, kEnd});
  }
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& [role, content] = messages[i];
    if (role == "tool") {
      append_tool_message(messages, i, content, out);
    } else {
      append(out, {kStart, role, "\n", content, kEnd});
    }
  }
}

// The assistant's thoughts are kept only after the user's last question, where a chain of tool calls may go
// on.
void ChatTemplate::render_qwen3(const std::vector<ChatMessage>& messages, std::string& out) const {
  const bool trims = family_ == Family::kQwen35;
  const auto content_of = [&](const ChatMessage& message) {
    return trims ? trim(message.content) : std::string_view(message.content);
  };
  const auto question = std::find_if(messages.rbegin(), messages.rend(), [&](const ChatMessage& message) {
    return message.role == "user" && !is_tool_response(content_of(message));
  });
  if (question == messages.rend() && trims)
    fail("the chat template of {} needs a message of the user", where_);
  const size_t last_question =
      question == messages.rend() ? messages.size() - 1 : static_cast<size_t>(messages.rend() - question) - 1;
  for (size_t i = 0; i < messages.size(); ++i) {
    const std::string& role = messages[i].role;
    std::string_view content = content_of(messages[i]);
    if (role == "tool") {
      append_tool_message(messages, i, content, out);
      continue;
    }
    if (role == "system" && i > 0 && trims) {
      fail("message {} is a system message; the chat template of {} takes one only at the beginning", i,
           where_);
    }
    append(out, {kStart, role, "\n"});
    if (role == "assistant") {
      std::string_view thoughts;
      if (const size_t close = content.find(kCloseThink); close != std::string_view::npos) {
        thoughts = after_last(strip_newlines_after(content.substr(0, close)), kOpenThink);
        content = strip_newlines_before(after_last(content, kCloseThink));
      }
      thoughts = trims ? trim(thoughts) : strip_newlines_after(strip_newlines_before(thoughts));
      if (i > last_question && (trims || i + 1 == messages.size() || !thoughts.empty())) {
        append(out, {"<think>\n", thoughts, "\n</think>\n\n"});
        if (!trims) content = strip_newlines_before(content);
      }
    }
    append(out, {content, kEnd});
  }
}

void ChatTemplate::render_llama3(const std::vector<ChatMessage>& messages, std::string& out) const {
  const auto turn = [&](std::string_view role, std::string_view content) {
    append(out, {"<|start_header_id|>", role, "<|end_header_id|>\n\n", content, "<|eot_id|>"});
  };
  out += bos_token_;
  size_t first = 0;
  if (family_ == Family::kLlama31) {
    first = messages.front().role == "system" ? 1 : 0;
    turn("system",
         fmt::format("Cutting Knowledge Date: December 2023\nToday Date: {}\n\n{}",
                     date_.empty() ? todays_date() : date_, first ? trim(messages.front().content) : ""));
  }
  for (size_t i = first; i < messages.size(); ++i) turn(messages[i].role, trim(messages[i].content));
}

}  // namespace spot
