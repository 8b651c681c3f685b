// Conversations to prompt text, by the chat template that a checkpoint was tuned on.
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/jinja/template.h"

namespace spot {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", "tool" and what else the template takes
  std::string content;
};

// What a template is given, in the JSON of the OpenAI API.
struct ChatPrompt {
  // [{"role": ..., "content": text or [{"type": "text", "text": ...}], "tool_calls": ..., ...}]. Members that are
  // null are left out, and reasoning is passed under all its names (reasoning_content, thinking).
  nlohmann::ordered_json messages = nlohmann::ordered_json::array();
  nlohmann::ordered_json tools, documents;  // arrays, or null
  // Further variables, such as enable_thinking; they hide the special tokens of the same name.
  nlohmann::ordered_json variables = nlohmann::ordered_json::object();
  // The prompt then ends where the assistant's answer begins.
  bool add_generation_prompt = true;

  static ChatPrompt of(const std::vector<ChatMessage>& messages);
};

// The chat template of a checkpoint, a program in Jinja (see text/jinja/template.h). Immutable.
class ChatTemplate {
 public:
  // Reads a checkpoint's templates: chat_template.jinja and additional_chat_templates/*.jinja; or else
  // `chat_template` of tokenizer_config.json, a text or a list of named ones; or else of chat_template.json. With
  // `file`, that Jinja file in place of them. The special tokens come from tokenizer_config.json. Throws Error
  // if there is no template (base models have none) or it cannot be run here.
  static ChatTemplate load(const std::filesystem::path& folder,
                           const std::optional<std::filesystem::path>& file = std::nullopt);

  // The prompt text: encode it without special tokens, it holds its own. Of several templates, `tool_use` renders
  // prompts with tools and `default` all others. Content that is a list of text parts becomes one text, the parts
  // on lines of their own, where the template does not render such lists like texts. Throws Error for no
  // messages, for content other than text, and for what the template itself refuses.
  std::string render(const ChatPrompt& prompt) const;

 private:
  struct Source {
    std::string name;
    jinja::Template program;
    bool takes_parts;  // renders a list of text parts as it does the text
  };
  ChatTemplate(const std::filesystem::path& folder,
               std::vector<std::pair<std::string, std::string>> templates, const std::string& where);
  const Source& choose(bool with_tools) const;
  std::string run(const jinja::Template& program, const ChatPrompt& prompt) const;

  std::string where_;
  std::vector<std::pair<std::string, std::string>> special_tokens_;  // bos_token and so on, to their texts
  std::vector<Source> sources_;
};

}  // namespace spot
