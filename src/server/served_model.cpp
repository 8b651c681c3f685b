#include "server/served_model.h"

#include <random>

#include "core/error.h"

namespace spot::server {
namespace {

std::string render(const ChatPrompt& conversation, const ServedModel& model) {
  if (!model.chat_template) throw ApiError(400, model.no_template, "messages");
  try {
    return model.chat_template->render(conversation);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), "messages");
  }
}

std::vector<int32_t> encode(const std::string& text, bool special, const std::string& field,
                            const ServedModel& model) {
  try {
    return model.tokenizer.encode(text, special);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), field);
  }
}

MethodSpec method_of(const ApiRequest& api, const ServedModel& model) {
  const std::string& text = api.attention.empty() ? model.attention : api.attention;
  const std::string word = text.substr(0, text.find(':'));
  if (!model.attention_words.count(word)) {
    std::string words;
    for (const std::string& known : model.attention_words) words += (words.empty() ? "" : ", ") + known;
    refuse("attention", "attention '{}' is not served here; there is {}", word, words);
  }
  try {
    return parse_method(text, model.method_settings, model.selector ? &model.selector->config() : nullptr);
  } catch (const Error& error) {
    throw ApiError(400, error.what(), "attention");
  }
}

// Whether the prompt's last <think> is still open.
bool ends_in_reasoning(const std::string& prompt) {
  const size_t begin = prompt.rfind("<think>"), end = prompt.rfind("</think>");
  return begin != std::string::npos && (end == std::string::npos || end < begin);
}

MakeConstraint constraint_of(const ApiRequest& api, const AnswerFormat& format, const ServedModel& model) {
  if (!api.schema) return {};
  if (!model.compile_schema)
    refuse(
        api.schema_field,
        "{} cannot be served: this program was built without xgrammar (scripts/setup.sh brings its sources)",
        api.schema_field);
  AnswerOpening opening;
  if (format.reasoning) {
    opening.reasoning_begin = model.tokenizer.token_id("<think>");
    opening.reasoning_end = model.tokenizer.token_id("</think>");
    opening.in_reasoning = format.starts_in_reasoning;
  }
  if (format.tools) opening.tool_call = model.tokenizer.token_id("<tool_call>");
  try {
    return model.compile_schema(*api.schema, opening);
  } catch (const Error& error) {
    refuse(api.schema_field, "{}: {}", api.schema_field, error.what());
  }
}

void check_tokens(const std::vector<int32_t>& tokens, const std::string& field, const ServedModel& model) {
  for (const int32_t id : tokens)
    if (id >= model.vocab_size)
      refuse(field, "token {} lies outside the model's vocabulary of {}", id, model.vocab_size);
}

uint64_t fresh_seed() {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return random();
}

}  // namespace

PreparedRequest prepare(ApiRequest api, const ServedModel& model) {
  if (!api.model.empty() && api.model != model.name)
    throw ApiError(404,
                   fmt::format("the model '{}' is not served here; there is '{}'", api.model, model.name),
                   "model", "model_not_found");
  PreparedRequest prepared;
  prepared.method = method_of(api, model);
  std::vector<std::vector<int32_t>> prompts;
  if (api.chat) {
    const std::string text = render(api.conversation, model);
    prepared.format = {.reasoning = model.reasoning,
                       .starts_in_reasoning = model.reasoning && ends_in_reasoning(text),
                       .tools = model.tool_calls && api.with_tools,
                       .one_tool_call = api.one_tool_call,
                       .tool_list = api.conversation.tools};
    prompts.push_back(encode(text, api.add_special_tokens, "messages", model));
  } else {
    for (PromptInput& input : api.prompts) {
      if (auto* ids = std::get_if<std::vector<int32_t>>(&input))
        prompts.push_back(std::move(*ids));
      else
        prompts.push_back(encode(std::get<std::string>(input), api.add_special_tokens, "prompt", model));
    }
  }
  Request request;
  request.completions = api.completions;
  request.sampling = api.sampling;
  request.sampling.seed = api.seed.value_or(fresh_seed());
  for (const auto& [token, bias] : api.sampling.logit_bias)
    if (token >= model.vocab_size)
      refuse("logit_bias", "logit_bias: token {} lies outside the model's vocabulary of {}", token,
             model.vocab_size);
  try {
    request.sampling.check(model.vocab_size);
  } catch (const Error& error) {
    throw ApiError(400, error.what());
  }
  request.constraint = constraint_of(api, prepared.format, model);
  request.stop_strings = api.stop;
  request.stop_ids = api.stop_ids;
  if (!api.ignore_eos)
    request.stop_ids.insert(request.stop_ids.end(), model.stop_ids.begin(), model.stop_ids.end());
  const std::string field = api.chat ? "messages" : "prompt";
  for (std::vector<int32_t>& prompt : prompts) {
    if (prompt.empty()) refuse(field, "a prompt holds no token; give some text");
    check_tokens(prompt, field, model);
    const auto length = static_cast<int64_t>(prompt.size());
    const int64_t wanted = api.max_tokens.value_or(std::max<int64_t>(model.max_tokens - length, 1));
    if (length + wanted > model.max_tokens)
      throw ApiError(
          400,
          fmt::format("the prompt's {} tokens and {} new ones pass the {} tokens that are served; shorten "
                      "the prompt or ask for fewer",
                      length, wanted, model.max_tokens),
          field, "context_length_exceeded");
    request.prompt = std::move(prompt);
    request.max_new_tokens = wanted;
    prepared.requests.push_back(request);
  }
  prepared.api = std::move(api);
  return prepared;
}

std::vector<int32_t> tokenize(const TokenizeRequest& request, const ServedModel& model) {
  if (request.prompt) return encode(*request.prompt, request.add_special_tokens, "prompt", model);
  return encode(render(request.conversation, model), request.add_special_tokens, "messages", model);
}

std::string detokenize(const std::vector<int32_t>& tokens, const ServedModel& model) {
  check_tokens(tokens, "tokens", model);
  return model.tokenizer.decode(tokens);
}

}  // namespace spot::server
