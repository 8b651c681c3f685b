// The request bodies of the API: JSON to what is asked for. No model is needed to read them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "engine/sampling.h"
#include "server/api_error.h"
#include "text/chat_template.h"

namespace spot::server {

using PromptInput = std::variant<std::string, std::vector<int32_t>>;  // text, or token ids

// A body of /v1/completions or /v1/chat/completions.
struct ApiRequest {
  bool chat = false;
  std::string model;
  std::vector<PromptInput> prompts;  // completions: one or more
  ChatPrompt conversation;           // chat
  std::optional<int64_t> max_tokens;
  std::optional<uint64_t> seed;
  SamplingOptions sampling;  // but for the seed
  int64_t completions = 1;   // of each prompt
  std::vector<std::string> stop;
  std::vector<int64_t> stop_ids;  // besides the model's
  bool ignore_eos = false;
  bool stream = false, include_usage = false, continuous_usage = false;
  bool add_special_tokens = true;
  std::string attention;  // a method (attention/methods.h); empty: the server's
  bool with_tools = false, one_tool_call = false;
  bool include_reasoning = true;
  std::optional<Json> schema;  // that the answer, or a chat's content, is valid under
  std::string schema_field;    // which member gave it

  bool logprobs() const { return sampling.logprobs >= 0; }
};

// Where the request says nothing, sampling is as in `defaults`. Members that are known and cannot be served throw
// ApiError (400) naming the member, unless they ask for what is done anyway; unknown ones are let pass.
ApiRequest parse_completion(std::string_view body, const SamplingOptions& defaults);
ApiRequest parse_chat(std::string_view body, const SamplingOptions& defaults);

// A body of /tokenize: a text or a conversation.
struct TokenizeRequest {
  std::optional<std::string> prompt;
  ChatPrompt conversation;
  bool add_special_tokens = true;
  bool return_texts = false;
};
TokenizeRequest parse_tokenize(std::string_view body);
// A body of /detokenize.
std::vector<int32_t> parse_detokenize(std::string_view body);

}  // namespace spot::server
