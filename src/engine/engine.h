// Many requests through one model: continuous batching over a paged cache.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "engine/request.h"
#include "engine/runner.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/text_stream.h"
#include "text/tokenizer.h"

namespace spot {

struct EngineOptions {
  int64_t max_step_tokens = 2048;  // tokens of one forward pass: decode rows, and prompt chunks beside them
  int64_t max_sequences = 16;      // answers in progress at once
  int64_t max_tokens = 0;          // of one sequence, prompt and answer; 0: the model's positions
  int64_t max_methods = 32;        // that method() keeps, those of the stack among them
  bool prefix_cache = true;
  bool graphs = true;                    // on a GPU
  const Tokenizer* tokenizer = nullptr;  // for the text of events, and stop strings
  // Called for the decode rows of a sparse layer, every `observe_every` tokens of an answer (0: never): such steps run
  // eagerly. `row` is the event's, `request` and `completion` are whose it is.
  int64_t observe_every = 0;
  std::function<void(const SelectionEvent&, int64_t row, int64_t request, int64_t completion)> observer;
};

struct EngineStatistics {
  int64_t prompt_tokens = 0;  // of all requests
  int64_t cached_tokens = 0;  // those taken from the prefix cache
  int64_t read_tokens = 0;    // prompt tokens (and those of answers that gave way) run so far
  int64_t decode_tokens = 0;  // answers' tokens but for their first
  int64_t steps = 0, preemptions = 0;
  double prefill_seconds = 0, decode_seconds = 0;  // steps with prompt chunks, and steps without
};

// Not thread-safe. All text of float32 models is equal whatever shares the engine and however steps are cut: what a
// token sees is read in the same way always.
class Engine {
 public:
  // Backbone and stack outlive the engine; its sequences are the only ones in the stack's cache. Throws Error when the
  // options do not fit the stack.
  Engine(const Backbone& backbone, AttentionStack& attention, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // The request's number. Throws Error, and nothing has changed, when it is empty, out of range or longer than the
  // model or the cache can hold.
  int64_t add(Request request);
  // One forward pass and what it brought. Does nothing when idle. When the pass throws, the next step tries again.
  std::vector<Event> step();
  // Ends a request; its pages are free at once and step() has no more events of it. Unknown and finished ones are
  // let pass.
  void cancel(int64_t request);
  bool idle() const;
  // The index of a method that reads as `spec` does, for Request::method: one of the stack's, or a new one, in place of
  // the least recently asked for that no request uses when there are max_methods; those that the stack was made with
  // stay. Throws Error as AttentionStack::add_method does, and when all are in use.
  int64_t method(const MethodSpec& spec);

  // Captures the graphs of decode steps ahead of time.
  void capture(int64_t method, int64_t rows) { runner_.capture(method, rows); }
  EngineStatistics statistics() const;
  int64_t num_running() const { return scheduler_.num_running(); }
  int64_t num_waiting() const { return scheduler_.num_waiting(); }
  // By sparse layer, of an answer in progress. Waits for the device.
  std::vector<AttendedTokens> attended(int64_t request, int64_t completion = 0);

 private:
  struct Answer;
  void check(const Request& request) const;
  std::vector<StepEntry> entries_of(const std::vector<Slice>& slices) const;
  StepResult run(const std::vector<Slice>& slices);
  // Adds what sparse queries attended to up to their answers: of a run of equal batches once, at its end.
  void account(const std::vector<Slice>& slices, const std::vector<AttendedRows>& attended);
  void settle_accounts();
  std::vector<AttendedTokens> attended_by(const Answer& answer);
  Event accept(Answer& answer, const SampledToken& sampled);
  // The tokens that answers under a constraint may have next. Ends, in `events`, those that can have none.
  TokenMask mask_of(std::vector<int64_t>& ids, at::Tensor& logits, std::vector<Event>& events);
  void remove(int64_t sequence);

  const Backbone& backbone_;
  AttentionStack& attention_;
  EngineOptions options_;
  Scheduler scheduler_;
  Runner runner_;
  Sampler sampler_;
  std::map<int64_t, std::unique_ptr<Answer>> answers_;  // by sequence id
  int64_t next_request_ = 0, next_sequence_ = 0;
  EngineStatistics statistics_;
  struct MethodUse {
    uint64_t salt = 0;  // of its sparse prefill: never one that another method had
    int64_t last = 0;   // call of method()
  };
  std::vector<MethodUse> method_uses_;  // by method
  size_t own_methods_ = 0;              // which the stack was made with
  uint64_t next_salt_ = 1;
  int64_t method_calls_ = 0;
  std::vector<Event> ended_;          // of requests that end without a step
  std::vector<int64_t> account_ids_;  // the sequences of the batches in account_
  std::vector<AttendedRows> account_;
};

// One request's answers, whole.
struct GeneratedAnswer {
  std::vector<int32_t> tokens;
  std::vector<SampledToken> sampled;  // the same with their log-probabilities
  std::string text;                   // with a tokenizer
  FinishReason finish = FinishReason::length;
};

// Adds all requests and steps until the engine is idle. Answers by request and completion. Throws Error when a
// request is refused (then none runs) or ends with an error. `on_event` sees every event as it comes, `on_step` is
// called after every step.
std::vector<std::vector<GeneratedAnswer>> generate(Engine& engine, const std::vector<Request>& requests,
                                                   const std::function<void(const Event&)>& on_event = {},
                                                   const std::function<void()>& on_step = {});

}  // namespace spot
