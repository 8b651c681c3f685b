#include "server/api_request.h"

#include <charconv>
#include <limits>

#include "server/fields.h"

namespace spot::server {
namespace {

constexpr int64_t kMostCompletions = 128, kMostPrompts = 128, kMostLogprobs = 20;
constexpr size_t kMostStops = 16, kMostBiases = 1024;
constexpr int64_t kMostTokens = int64_t{1} << 40;

// Members that other servers know and this one does not serve, with what they may say nonetheless because it changes
// nothing.
struct Unsupported {
  const char* name;
  Json harmless;
};

const std::vector<Unsupported>& unsupported() {
  static const std::vector<Unsupported> fields = {{"suffix", ""},
                                                  {"echo", false},
                                                  {"prompt_embeds", Json()},
                                                  {"prompt_logprobs", Json()},
                                                  {"use_beam_search", false},
                                                  {"length_penalty", 1.0},
                                                  {"min_tokens", 0},
                                                  {"bad_words", Json::array()},
                                                  {"allowed_token_ids", Json()},
                                                  {"include_stop_str_in_output", false},
                                                  {"skip_special_tokens", true},
                                                  {"truncate_prompt_tokens", Json()},
                                                  {"return_token_ids", false},
                                                  {"return_tokens_as_token_ids", false},
                                                  {"guided_regex", Json()},
                                                  {"guided_choice", Json()},
                                                  {"guided_grammar", Json()},
                                                  {"grammar", ""},
                                                  {"json_schema", Json()},
                                                  {"logits_processors", Json()},
                                                  {"kv_transfer_params", Json()},
                                                  {"priority", 0},
                                                  {"cache_salt", Json()},
                                                  {"mm_processor_kwargs", Json()},
                                                  {"functions", Json()},
                                                  {"function_call", Json()},
                                                  {"modalities", Json::array({"text"})},
                                                  {"audio", Json()},
                                                  {"prediction", Json()},
                                                  {"web_search_options", Json()},
                                                  {"store", false},
                                                  {"chat_template", Json()},
                                                  {"continue_final_message", false},
                                                  {"thinking_token_budget", Json()}};
  return fields;
}

void refuse_unsupported(const Fields& fields) {
  for (const auto& [name, harmless] : unsupported()) {
    const Json* value = fields.find(name);
    if (value && *value != harmless)
      refuse(name, "{} is {}; this server does not support it, leave it out", name, shown(*value));
  }
}

std::vector<int32_t> token_ids(const Json& list, const std::string& name) {
  std::vector<int32_t> ids;
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<double>() < 0 || id.get<double>() > 2147483647.0)
      refuse(name, "{} holds {}; token ids were expected", name, shown(id));
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

void parse_logit_bias(const Fields& fields, SamplingOptions& sampling) {
  const Json* bias = fields.find("logit_bias");
  if (!bias) return;
  if (!bias->is_object() || bias->size() > kMostBiases)
    refuse("logit_bias", "logit_bias must be an object of at most {} token ids", kMostBiases);
  for (const auto& [key, value] : bias->items()) {
    int32_t id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    // "05" too: it would name token 5 a second time.
    if (error != std::errc() || end != key.data() + key.size() || id < 0 || key != std::to_string(id))
      refuse("logit_bias", "logit_bias names '{}'; a token id was expected", key);
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100))
      refuse("logit_bias", "logit_bias of token {} is {}; -100 to 100 is possible", id, shown(value));
    sampling.logit_bias.emplace_back(id, value.get<double>());
  }
}

void parse_stops(const Fields& fields, ApiRequest& request) {
  if (const Json* stop = fields.find("stop")) {
    const Json list = stop->is_array() ? *stop : Json::array({*stop});
    if (list.size() > kMostStops) refuse("stop", "stop holds {} texts; at most {}", list.size(), kMostStops);
    for (const Json& text : list) {
      if (!text.is_string() || text.get_ref<const std::string&>().empty())
        refuse("stop", "stop holds {}; texts that are not empty were expected", shown(text));
      request.stop.push_back(text.get<std::string>());
    }
  }
  if (const Json* ids = fields.find("stop_token_ids")) {
    if (!ids->is_array()) refuse("stop_token_ids", "stop_token_ids is {}; a list was expected", shown(*ids));
    for (const int32_t id : token_ids(*ids, "stop_token_ids")) request.stop_ids.push_back(id);
  }
}

// The newer name counts where both are given.
void parse_max_tokens(const Fields& fields, ApiRequest& request) {
  for (const char* name : {"max_tokens", "max_completion_tokens"})
    if (fields.has(name)) request.max_tokens = fields.integer(name, 0, 1, kMostTokens);
}

// A schema, or the text of one.
Json schema_of(const Json& given, const std::string& field) {
  const Json schema = given.is_string() ? parse_value(given.get_ref<const std::string&>()) : given;
  if (!schema.is_object() && !schema.is_boolean())
    refuse(field, "{} is {}; a JSON schema was expected", field, shown(given));
  return schema;
}

// JSON objects of any kind, or what a schema describes: the OpenAI API's response_format, and vLLM's members.
void parse_output(const Fields& fields, ApiRequest& request) {
  std::string first;  // who said it
  const auto set = [&](const std::string& field, Json schema, const std::string& member = {}) {
    if (request.schema)
      refuse(field, "{} and {} both say what the answer is like; give one", first, field + member);
    request.schema = std::move(schema);
    request.schema_field = field;
    first = field + member;
  };
  const Json any_object = {{"type", "object"}};
  if (const Json* format = fields.find("response_format")) {
    if (!format->is_object())
      refuse("response_format", "response_format is {}; an object was expected", shown(*format));
    const std::string type = Fields(*format, "response_format.").text("type");
    if (type == "json_object") {
      set("response_format", any_object);
    } else if (type == "json_schema") {
      const auto named = format->find("json_schema");
      if (named == format->end() || !named->is_object() || !named->contains("schema"))
        refuse("response_format", "response_format.json_schema must be an object with a schema");
      set("response_format", schema_of(named->at("schema"), "response_format"));
    } else if (type != "text") {
      refuse("response_format",
             "response_format.type is '{}'; text, json_object and json_schema are possible", type);
    }
  }
  if (const Json* schema = fields.find("guided_json")) set("guided_json", schema_of(*schema, "guided_json"));
  const Json* outputs = fields.find("structured_outputs");
  if (!outputs) return;
  const std::string name = "structured_outputs";
  if (!outputs->is_object())
    refuse(name, "structured_outputs is {}; an object was expected", shown(*outputs));
  const Fields of(*outputs, name + ".");
  for (const char* other : {"regex", "choice", "grammar", "structural_tag"})
    if (of.has(other))
      refuse(name, "structured_outputs.{} is not supported; json and json_object are", other);
  if (const Json* schema = of.find("json")) set(name, schema_of(*schema, name), ".json");
  if (of.boolean("json_object", false)) set(name, any_object, ".json_object");
}

// What both kinds of requests have.
void parse_common(const Json& body, const SamplingOptions& defaults, ApiRequest& request) {
  const Fields fields(body);
  refuse_unsupported(fields);
  request.model = fields.text("model");
  request.attention = fields.text("attention");
  if (request.attention.empty() && fields.has("attention"))
    refuse("attention", "attention is empty; name a method, or leave it out");
  SamplingOptions& sampling = request.sampling = defaults;
  sampling.logprobs = -1;
  sampling.temperature = fields.number("temperature", defaults.temperature, 0, 100);
  sampling.top_p = fields.number("top_p", defaults.top_p, std::numeric_limits<double>::min(), 1);
  sampling.top_k = fields.integer("top_k", defaults.top_k, -1, kMostTokens);
  if (sampling.top_k < 0) sampling.top_k = 0;
  sampling.min_p = fields.number("min_p", defaults.min_p, 0, 1);
  sampling.repetition_penalty = fields.number("repetition_penalty", defaults.repetition_penalty, 1e-6, 1e6);
  sampling.presence_penalty = fields.number("presence_penalty", defaults.presence_penalty, -2, 2);
  sampling.frequency_penalty = fields.number("frequency_penalty", defaults.frequency_penalty, -2, 2);
  parse_logit_bias(fields, sampling);
  parse_stops(fields, request);
  parse_output(fields, request);
  if (fields.has("seed"))
    request.seed = static_cast<uint64_t>(fields.integer("seed", 0, std::numeric_limits<int64_t>::min() / 2,
                                                        std::numeric_limits<int64_t>::max() / 2));
  request.completions = fields.integer("n", 1, 1, kMostCompletions);
  if (fields.integer("best_of", request.completions, 1, kMostCompletions) != request.completions)
    refuse("best_of", "best_of differs from n; this server does not rank answers, leave it out");
  request.ignore_eos = fields.boolean("ignore_eos", false);
  request.stream = fields.boolean("stream", false);
  if (const Json* options = fields.find("stream_options")) {
    if (!options->is_object())
      refuse("stream_options", "stream_options is {}; an object was expected", shown(*options));
    if (!request.stream)
      refuse("stream_options", "stream_options are for streams; leave them out or set stream");
    const Fields stream(*options, "stream_options.");
    request.include_usage = stream.boolean("include_usage", false);
    request.continuous_usage = stream.boolean("continuous_usage_stats", false) && request.include_usage;
  }
}

// Checks a conversation and makes its tool calls what templates expect: arguments as objects, not as their text.
Json parse_messages(const Fields& fields) {
  const Json* given = fields.find("messages");
  if (!given || !given->is_array() || given->empty())
    refuse("messages", "messages must be a list of at least one message");
  Json messages = *given;
  for (size_t i = 0; i < messages.size(); ++i) {
    Json& message = messages[i];
    const std::string name = fmt::format("messages[{}]", i);
    if (!message.is_object() || !message.contains("role") || !message.at("role").is_string())
      refuse("messages", "{} must be an object with a role", name);
    const auto content = message.find("content");
    const bool has_content = content != message.end() && !content->is_null();
    if (has_content && content->is_array()) {
      for (size_t p = 0; p < content->size(); ++p) {
        const Json& part = (*content)[p];
        const bool is_text = part.is_object() && part.contains("type") && part.at("type") == "text" &&
                             part.contains("text") && part.at("text").is_string();
        if (!is_text)
          refuse("messages", "{}.content[{}] is not a text part; this server reads text alone", name, p);
      }
    } else if (has_content && !content->is_string()) {
      refuse("messages", "{}.content is {}; a text or a list of text parts was expected", name,
             shown(*content));
    }
    const auto calls = message.find("tool_calls");
    if (calls == message.end() || calls->is_null()) continue;
    if (!calls->is_array())
      refuse("messages", "{}.tool_calls is {}; a list was expected", name, shown(*calls));
    for (Json& call : *calls) {
      if (!call.is_object() || !call.contains("function") || !call.at("function").is_object() ||
          !call.at("function").contains("name"))
        refuse("messages", "{}.tool_calls holds {}; functions with a name were expected", name, shown(call));
      Json& function = call.at("function");
      if (!function.contains("arguments") || !function.at("arguments").is_string()) continue;
      Json arguments = parse_value(function.at("arguments").get_ref<const std::string&>());
      if (arguments.is_object()) function["arguments"] = std::move(arguments);
    }
  }
  return messages;
}

Json parse_tools(const Fields& fields, ApiRequest& request) {
  const Json* tools = fields.find("tools");
  const Json* choice = fields.find("tool_choice");
  if (choice && *choice != "auto" && *choice != "none")
    refuse("tool_choice", "tool_choice is {}; this server supports auto and none", shown(*choice));
  request.one_tool_call = !fields.boolean("parallel_tool_calls", true);
  if (!tools || (tools->is_array() && tools->empty()) || (choice && *choice == "none")) return {};
  if (!tools->is_array()) refuse("tools", "tools is {}; a list was expected", shown(*tools));
  for (const Json& tool : *tools)
    if (!tool.is_object() || !tool.contains("function") || !tool.at("function").is_object() ||
        !tool.at("function").contains("name") || !tool.at("function").at("name").is_string())
      refuse("tools", "tools holds {}; functions with a name were expected", shown(tool));
  request.with_tools = true;
  return *tools;
}

void parse_template_variables(const Fields& fields, ChatPrompt& prompt) {
  if (const Json* effort = fields.find("reasoning_effort")) {
    const std::string text = fields.text("reasoning_effort");
    prompt.variables["reasoning_effort"] = *effort;
    if (text == "none") prompt.variables["enable_thinking"] = false;
  }
  if (const Json* given = fields.find("chat_template_kwargs")) {
    if (!given->is_object())
      refuse("chat_template_kwargs", "chat_template_kwargs is {}; an object was expected", shown(*given));
    for (const auto& [name, value] : given->items()) {
      for (const char* own : {"messages", "tools", "documents", "add_generation_prompt"})
        if (name == own)
          refuse("chat_template_kwargs", "chat_template_kwargs holds {}, which is a field of its own", name);
      prompt.variables[name] = value;
    }
  }
  if (const Json* documents = fields.find("documents")) prompt.documents = *documents;
  prompt.add_generation_prompt = fields.boolean("add_generation_prompt", true);
}

}  // namespace

ApiRequest parse_completion(std::string_view text, const SamplingOptions& defaults) {
  const Json body = parse_object(text);
  const Fields fields(body);
  ApiRequest request;
  parse_common(body, defaults, request);
  const Json* prompt = fields.find("prompt");
  if (!prompt) refuse("prompt", "prompt is missing; give a text");
  if (prompt->is_string()) {
    request.prompts.emplace_back(prompt->get<std::string>());
  } else if (prompt->is_array() && !prompt->empty() && prompt->front().is_number()) {
    request.prompts.emplace_back(token_ids(*prompt, "prompt"));
  } else if (prompt->is_array() && !prompt->empty()) {
    for (const Json& one : *prompt) {
      if (one.is_string())
        request.prompts.emplace_back(one.get<std::string>());
      else if (one.is_array())
        request.prompts.emplace_back(token_ids(one, "prompt"));
      else
        refuse("prompt", "prompt holds {}; texts or lists of token ids were expected", shown(one));
    }
  } else {
    refuse("prompt", "prompt is {}; a text, token ids or a list of these was expected", shown(*prompt));
  }
  if (static_cast<int64_t>(request.prompts.size()) * request.completions > kMostPrompts)
    refuse("prompt", "{} prompts with n = {} ask for more than {} answers", request.prompts.size(),
           request.completions, kMostPrompts);
  request.max_tokens = 16;
  parse_max_tokens(fields, request);
  request.sampling.logprobs = fields.integer("logprobs", -1, 0, kMostLogprobs);
  request.add_special_tokens = fields.boolean("add_special_tokens", true);
  return request;
}

ApiRequest parse_chat(std::string_view text, const SamplingOptions& defaults) {
  const Json body = parse_object(text);
  const Fields fields(body);
  ApiRequest request;
  request.chat = true;
  parse_common(body, defaults, request);
  request.conversation.messages = parse_messages(fields);
  request.conversation.tools = parse_tools(fields, request);
  parse_template_variables(fields, request.conversation);
  parse_max_tokens(fields, request);
  const int64_t top = fields.integer("top_logprobs", -1, 0, kMostLogprobs);
  if (fields.boolean("logprobs", false))
    request.sampling.logprobs = std::max<int64_t>(top, 0);
  else if (top >= 0)
    refuse("top_logprobs", "top_logprobs is {} and logprobs is not set; set it", top);
  request.include_reasoning = fields.boolean("include_reasoning", true);
  // The template writes its own.
  request.add_special_tokens = fields.boolean("add_special_tokens", false);
  return request;
}

TokenizeRequest parse_tokenize(std::string_view text) {
  const Json body = parse_object(text);
  const Fields fields(body);
  TokenizeRequest request;
  request.return_texts = fields.boolean("return_token_strs", false);
  if (fields.has("messages")) {
    ApiRequest chat;
    request.conversation.messages = parse_messages(fields);
    request.conversation.tools = parse_tools(fields, chat);
    parse_template_variables(fields, request.conversation);
    request.add_special_tokens = fields.boolean("add_special_tokens", false);
    return request;
  }
  if (!fields.has("prompt")) refuse("prompt", "prompt is missing; give a text, or messages");
  request.prompt = fields.text("prompt");
  request.add_special_tokens = fields.boolean("add_special_tokens", true);
  return request;
}

std::vector<int32_t> parse_detokenize(std::string_view text) {
  const Json body = parse_object(text);
  const Json* tokens = Fields(body).find("tokens");
  if (!tokens || !tokens->is_array()) refuse("tokens", "tokens must be a list of token ids");
  return token_ids(*tokens, "tokens");
}

}  // namespace spot::server
