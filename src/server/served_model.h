// What the server knows of its model besides the engine, and how a request becomes the engine's.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "attention/methods.h"
#include "engine/request.h"
#include "grammar/grammar.h"
#include "server/answer_parser.h"
#include "server/api_request.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace spot::server {

// Immutable while the server runs: any thread may read it.
struct ServedModel {
  std::string name;  // as requests name it
  Tokenizer tokenizer;
  std::optional<ChatTemplate> chat_template;
  std::string no_template;  // why there is none
  SamplingOptions sampling;
  std::vector<int64_t> stop_ids;
  int64_t vocab_size = 0;  // of the model
  int64_t max_tokens = 0;  // of prompt and answer
  int64_t created = 0;     // seconds since 1970
  // Methods: the server's own, what a request's leave unsaid, and the words that requests may use.
  std::string attention = "dense";
  MethodSettings method_settings;
  const Selector* selector = nullptr;
  std::set<std::string> attention_words;
  bool reasoning = false, tool_calls = false;  // are split off
  // SchemaCompiler::compile; empty in a build without xgrammar.
  std::function<MakeConstraint(const Json& schema, const AnswerOpening& opening)> compile_schema;
};

// A request, ready for the engine.
struct PreparedRequest {
  ApiRequest api;
  std::vector<Request> requests;  // one a prompt
  MethodSpec method;
  AnswerFormat format;

  int64_t num_answers() const { return static_cast<int64_t>(requests.size()) * api.completions; }
};

// Renders, encodes and checks. Takes up to a second for the longest prompts: not for a thread that others wait for.
// With a schema that is new it can take seconds. Throws ApiError.
PreparedRequest prepare(ApiRequest api, const ServedModel& model);

// The ids of a body of /tokenize.
std::vector<int32_t> tokenize(const TokenizeRequest& request, const ServedModel& model);
// The text of a body of /detokenize.
std::string detokenize(const std::vector<int32_t>& tokens, const ServedModel& model);

}  // namespace spot::server
