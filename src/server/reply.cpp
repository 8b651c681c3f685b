#include "server/reply.h"

#include <algorithm>
#include <ctime>
#include <numeric>
#include <random>

namespace spot::server {
namespace {

std::string finish_word(FinishReason reason, bool called) {
  if (reason == FinishReason::length) return "length";
  return called ? "tool_calls" : "stop";
}

// JSON has no infinity.
double finite(float logprob) {
  return std::max(static_cast<double>(logprob), -9999.0);
}

int64_t characters_of(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

}  // namespace

std::string unique_id(const std::string& prefix) {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("{}{:016x}{:08x}", prefix, random(), static_cast<uint32_t>(random()));
}

Reply::Reply(const PreparedRequest& prepared, const ServedModel& model)
    : model_(model),
      chat_(prepared.api.chat),
      stream_(prepared.api.stream),
      include_usage_(prepared.api.include_usage),
      continuous_usage_(prepared.api.continuous_usage),
      logprobs_(prepared.api.logprobs()),
      reasoning_(prepared.api.include_reasoning),
      completions_(prepared.api.completions),
      top_logprobs_(prepared.api.sampling.logprobs),
      id_(unique_id(prepared.api.chat ? "chatcmpl-" : "cmpl-")),
      created_(std::time(nullptr)) {
  for (const Request& request : prepared.requests) {
    prompt_tokens_.push_back(static_cast<int64_t>(request.prompt.size()));
    cached_tokens_.push_back(0);
    for (int64_t i = 0; i < completions_; ++i)
      choices_.push_back({.parser = AnswerParser(prepared.format, [] { return unique_id("call_"); })});
  }
}

Json Reply::header(bool chunk) const {
  const char* object = chat_ ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  return {{"id", id_}, {"object", object}, {"created", created_}, {"model", model_.name}};
}

Json Reply::usage() const {
  const int64_t prompt = std::accumulate(prompt_tokens_.begin(), prompt_tokens_.end(), int64_t{0});
  const int64_t cached = std::accumulate(cached_tokens_.begin(), cached_tokens_.end(), int64_t{0});
  int64_t written = 0;
  for (const Choice& choice : choices_) written += choice.tokens;
  return {{"prompt_tokens", prompt},
          {"completion_tokens", written},
          {"total_tokens", prompt + written},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

Json Reply::logprobs_of(Choice& choice, const Event& event) const {
  if (!event.token) return {};
  const auto text_of = [&](int32_t id) { return model_.tokenizer.decode(std::vector<int32_t>{id}); };
  if (!chat_) {
    // Here a token's text is its name, so one that is no whole character is written by its bytes.
    const auto name_of = [&](int32_t id) {
      std::string text = text_of(id);
      if (text.find("\xEF\xBF\xBD") == std::string::npos || !model_.tokenizer.has_token(id)) return text;
      text = "bytes:";
      for (const char c : model_.tokenizer.token_text(id))
        text += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
      return text;
    };
    Json top = Json::object();
    // The chosen token is among them, likeliest or not.
    for (const TokenLogprob& other : event.token->top) top[name_of(other.token)] = finite(other.logprob);
    top[name_of(event.token->token)] = finite(event.token->logprob);
    return {{"text_offset", Json::array({choice.characters})},
            {"token_logprobs", Json::array({finite(event.token->logprob)})},
            {"tokens", Json::array({name_of(event.token->token)})},
            {"top_logprobs", Json::array({top_logprobs_ > 0 ? top : Json()})}};
  }
  const auto entry = [&](int32_t id, float logprob) -> Json {
    Json bytes = Json::array();
    if (model_.tokenizer.has_token(id))
      for (const char c : model_.tokenizer.token_text(id)) bytes.push_back(static_cast<unsigned char>(c));
    return {{"token", text_of(id)}, {"logprob", finite(logprob)}, {"bytes", bytes}};
  };
  Json one = entry(event.token->token, event.token->logprob);
  one["top_logprobs"] = Json::array();
  for (const TokenLogprob& other : event.token->top)
    one["top_logprobs"].push_back(entry(other.token, other.logprob));
  return {{"content", Json::array({one})}};
}

void Reply::join_logprobs(Choice& choice, const Json& more) const {
  if (more.is_null()) return;
  if (choice.logprobs.is_null()) {
    choice.logprobs = more;
    return;
  }
  for (const auto& [name, list] : more.items())
    for (const Json& one : list) choice.logprobs[name].push_back(one);
}

void Reply::join(Choice& choice, const AnswerDelta& delta) const {
  choice.whole.reasoning += delta.reasoning;
  choice.whole.content += delta.content;
  for (const ToolCallDelta& call : delta.calls) {
    if (!call.id.empty())
      choice.whole.calls.push_back(call);
    else
      choice.whole.calls.back().arguments += call.arguments;
  }
}

Json Reply::chat_delta(Choice& choice, const AnswerDelta& delta) const {
  Json json = Json::object();
  if (!choice.begun) json["role"] = "assistant";
  if (!choice.begun || !delta.content.empty()) json["content"] = delta.content;
  if (reasoning_ && !delta.reasoning.empty()) json["reasoning_content"] = delta.reasoning;
  for (const ToolCallDelta& call : delta.calls) {
    Json one = {{"index", call.index}};
    if (!call.id.empty()) one["id"] = call.id, one["type"] = "function";
    one["function"] = Json::object();
    if (!call.id.empty()) one["function"]["name"] = call.name;
    one["function"]["arguments"] = call.arguments;
    json["tool_calls"].push_back(std::move(one));
  }
  return json;
}

std::vector<std::string> Reply::on_event(int64_t prompt, const Event& event) {
  Choice& choice = choices_[static_cast<size_t>(prompt * completions_ + event.completion)];
  if (event.token && choice.tokens == 0) cached_tokens_[static_cast<size_t>(prompt)] = event.cached_tokens;
  choice.tokens += event.token.has_value();
  AnswerDelta delta;
  if (chat_) {
    delta = choice.parser.push(event.text);
    if (event.finish) {
      AnswerDelta rest = choice.parser.finish();
      delta.reasoning += rest.reasoning, delta.content += rest.content;
      delta.calls.insert(delta.calls.end(), rest.calls.begin(), rest.calls.end());
    }
  } else {
    delta.content = event.text;
  }
  const Json logprobs = logprobs_ ? logprobs_of(choice, event) : Json();
  choice.characters += characters_of(event.text);
  if (event.finish) {
    choice.finish = finish_word(*event.finish, choice.parser.num_calls() > 0);
    ++finished_;
  }
  if (!stream_) {
    join(choice, delta);
    join_logprobs(choice, logprobs);
    return {};
  }
  const bool shown =
      !delta.content.empty() || !delta.calls.empty() || (reasoning_ && !delta.reasoning.empty());
  if (!shown && !event.finish && logprobs.is_null() && choice.begun) return {};
  Json chunk = header(/*chunk=*/true);
  Json one = {{"index", &choice - choices_.data()}};
  if (chat_)
    one["delta"] = chat_delta(choice, delta);
  else
    one["text"] = delta.content;
  one["logprobs"] = logprobs;
  one["finish_reason"] = choice.finish.empty() ? Json() : Json(choice.finish);
  chunk["choices"] = Json::array({std::move(one)});
  if (include_usage_) chunk["usage"] = continuous_usage_ ? usage() : Json();
  choice.begun = true;
  return {to_text(chunk)};
}

std::vector<std::string> Reply::last_chunks() const {
  if (!include_usage_) return {};
  Json chunk = header(/*chunk=*/true);
  chunk["choices"] = Json::array();
  chunk["usage"] = usage();
  return {to_text(chunk)};
}

std::string Reply::body() const {
  Json json = header(/*chunk=*/false);
  json["choices"] = Json::array();
  for (size_t i = 0; i < choices_.size(); ++i) {
    const Choice& choice = choices_[i];
    Json one = {{"index", i}};
    if (chat_) {
      Json message = {{"role", "assistant"}, {"content", choice.whole.content}};
      if (choice.whole.content.empty() && !choice.whole.calls.empty()) message["content"] = nullptr;
      if (reasoning_ && !choice.whole.reasoning.empty())
        message["reasoning_content"] = choice.whole.reasoning;
      for (const ToolCallDelta& call : choice.whole.calls)
        message["tool_calls"].push_back({{"id", call.id},
                                         {"type", "function"},
                                         {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
      one["message"] = std::move(message);
    } else {
      one["text"] = choice.whole.content;
    }
    one["logprobs"] = choice.logprobs;
    one["finish_reason"] = choice.finish;
    json["choices"].push_back(std::move(one));
  }
  json["usage"] = usage();
  return to_text(json);
}

}  // namespace spot::server
