// The answers of a request in the JSON of the OpenAI API, whole or in chunks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/request.h"
#include "server/answer_parser.h"
#include "server/served_model.h"

namespace spot::server {

class Reply {
 public:
  // `model` outlives the reply.
  Reply(const PreparedRequest& prepared, const ServedModel& model);

  // Takes an event of prompt `prompt` in; the chunks that it gives, each a JSON text (none without stream). Events of
  // FinishReason::error are the caller's.
  std::vector<std::string> on_event(int64_t prompt, const Event& event);
  // Every answer has ended.
  bool done() const { return finished_ == static_cast<int64_t>(choices_.size()); }
  // When done: the chunks that end a stream (usage), or the whole reply.
  std::vector<std::string> last_chunks() const;
  std::string body() const;

 private:
  struct Choice {
    AnswerParser parser;
    AnswerDelta whole;  // all deltas joined, without stream
    Json logprobs;      // in the API's form
    std::string finish;
    int64_t tokens = 0, characters = 0;
    bool begun = false;
  };
  Json header(bool chunk) const;
  Json usage() const;
  Json logprobs_of(Choice& choice, const Event& event) const;
  Json chat_delta(Choice& choice, const AnswerDelta& delta) const;
  void join(Choice& choice, const AnswerDelta& delta) const;
  void join_logprobs(Choice& choice, const Json& more) const;

  const ServedModel& model_;
  bool chat_, stream_, include_usage_, continuous_usage_, logprobs_, reasoning_;
  int64_t completions_, top_logprobs_;
  std::string id_;
  int64_t created_;
  std::vector<int64_t> prompt_tokens_, cached_tokens_;  // by prompt
  std::vector<Choice> choices_;
  int64_t finished_ = 0;
};

// A name that no other reply has: the prefix and 24 random hexadecimal digits.
std::string unique_id(const std::string& prefix);

}  // namespace spot::server
