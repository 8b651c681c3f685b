// What is asked of the engine, and what it answers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/config.h"
#include "engine/sampler.h"
#include "engine/sampling.h"
#include "engine/token_constraint.h"

namespace spot {

struct Request {
  std::vector<int32_t> prompt;  // not empty
  // The first `context` tokens of the prompt are read as the method reads prompts (densely, or by its sparse
  // prefill); each of the others selects for itself, as in decode. -1: all of the prompt is context.
  int64_t context = -1;
  int64_t max_new_tokens = 256;
  int64_t completions = 1;  // independent answers; answer i draws with seed + i
  SamplingOptions sampling;
  std::vector<int64_t> stop_ids;          // end an answer and are not part of it
  std::vector<std::string> stop_strings;  // likewise; need an engine with a tokenizer
  int64_t method = 0;                     // index into AttentionStack::methods()
  MakeConstraint constraint;              // empty: any token may follow any other
};

// Throws Error naming the first thing that no engine could do with this model: an empty prompt, numbers out of range, more
// tokens than the model has positions.
void check_request(const Request& request, const ModelConfig& model);

enum class FinishReason {
  stop,       // a stop id, a stop string, or nothing could follow under the constraint
  length,     // max_new_tokens
  cancelled,  // Engine::cancel
  error       // Event::error says which
};

// Tokens that sparse queries attended to in one layer, summed over an answer's queries.
struct AttendedTokens {
  int64_t layer = 0;
  double queries = 0, attended = 0, visible = 0;
};

// One token of an answer, its end, or both.
struct Event {
  int64_t request = 0;     // as Engine::add named it
  int64_t completion = 0;  // which answer of the request
  std::optional<SampledToken> token;
  std::string text;  // what the token completes, with a tokenizer; never part of a stop string
  std::optional<FinishReason> finish;
  std::string error;
  std::vector<AttendedTokens> attended;  // with `finish`, by layer where the method is sparse
  // With the first token: tokens of the prompt that the prefix cache held, and how long the answer waited for its turn.
  int64_t cached_tokens = 0;
  double queue_seconds = 0;
};

}  // namespace spot
