// Conversations to prompt text, in the form a checkpoint was tuned on.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace spot {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"; with the Qwen families also "tool"
  std::string content;
};

// The chat template of a checkpoint. The published ones are programs in Jinja; here the family is recognised
// and its rules are followed:
//   ChatML (SmolLM2, Qwen2.5, Qwen3-2507), with the default system prompt that the template may carry;
//   Qwen3, with its <think> blocks; Qwen3.5, likewise, opening the block itself and trimming contents;
//   Llama 3, and Llama 3.1 to 3.3 with their dates in the system prompt.
// Tools and images are not rendered. Immutable.
class ChatTemplate {
 public:
  // Reads chat_template.jinja of a checkpoint folder, or else `chat_template` of its tokenizer_config.json.
  // Throws Error if there is none (base models have none) or it is of no known family.
  static ChatTemplate load(const std::filesystem::path& folder);

  // Recognises template text; `where` begins its errors. `bos_token` is what Llama 3 begins with.
  ChatTemplate(std::string_view jinja, std::string bos_token, const std::string& where);

  // The prompt text: encode it without special tokens, it holds its own. With `add_generation_prompt` it ends
  // where the assistant's answer begins. `enable_thinking` as the Qwen3 templates know it: false closes the
  // <think> block at once, nothing leaves the choice to the template; other families ignore it. Throws Error
  // for no messages, an unknown role and a system message that is not the first where the family takes none
  // there.
  std::string render(const std::vector<ChatMessage>& messages, bool add_generation_prompt = true,
                     std::optional<bool> enable_thinking = std::nullopt) const;

 private:
  enum class Family { kChatMl, kQwen3, kQwen35, kLlama3, kLlama31 };
  void render_chatml(const std::vector<ChatMessage>& messages, std::string& out) const;
  void render_qwen3(const std::vector<ChatMessage>& messages, std::string& out) const;
  void render_llama3(const std::vector<ChatMessage>& messages, std::string& out) const;

  Family family_;
  std::string where_, bos_token_;
  std::string default_system_;         // ChatML: used where the first message is no system message
  bool wraps_tool_responses_ = false;  // ChatML: Qwen's form of tool messages
  // What follows the head of the generation prompt: with thinking on an opened <think> block or nothing, with
  // it off an empty block. Without obeys_enable_thinking_ it is on.
  bool opens_thinking_ = false, obeys_enable_thinking_ = false, thinks_by_default_ = true;
  std::string date_;  // Llama 3.1 to 3.3: the date in the system prompt; empty: today's
};

}  // namespace spot
