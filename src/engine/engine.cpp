#include "engine/engine.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/error.h"
#include "core/memory.h"

namespace spot {

struct Engine::Answer {
  Sequence sequence;
  int64_t request = 0, completion = 0, max_new_tokens = 0;
  std::vector<int64_t> stop_ids;
  std::unique_ptr<TextStream> text;
  std::unique_ptr<TokenConstraint> constraint;
  std::vector<int64_t> layers;  // of attended
  at::Tensor attended;          // [layers, 3] float64: AttendedTokens

  std::chrono::steady_clock::time_point added = std::chrono::steady_clock::now(), started;
  bool has_started = false;

  int64_t num_new() const { return sequence.length() - sequence.prompt_length; }
};

Engine::Engine(const Backbone& backbone, AttentionStack& attention, const EngineOptions& options)
    : backbone_(backbone),
      attention_(attention),
      options_(options),
      scheduler_(attention.cache(), {options.max_step_tokens, options.max_sequences, options.prefix_cache}),
      runner_(backbone, attention, {options.graphs, options.max_sequences, options.max_tokens}),
      sampler_(backbone.config().vocab_size, backbone.device()) {
  const int64_t positions = backbone.config().max_position_embeddings;
  if (options_.max_tokens == 0) options_.max_tokens = positions;
  if (options_.max_tokens < 1 || options_.max_tokens > positions)
    fail("sequences of {} tokens were asked for, the model has {} positions", options_.max_tokens, positions);
  const StateSlots& states = attention.cache().states();
  if (!states.empty() && states.num_free() < options_.max_sequences)
    fail("the cache has room for the states of {} sequences, the engine wants to run {}", states.num_free(),
         options_.max_sequences);
  own_methods_ = attention.methods().size();
  for (size_t i = 0; i < own_methods_; ++i) method_uses_.push_back({next_salt_++, 0});
}

Engine::~Engine() {
  for (auto& [id, answer] : answers_) scheduler_.remove(answer->sequence);
}

void check_request(const Request& request, const ModelConfig& model) {
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  if (prompt == 0) fail("a prompt holds no token; give some text");
  if (request.max_new_tokens < 0)
    fail("{} new tokens were asked for; give 0 or more", request.max_new_tokens);
  if (request.completions < 1) fail("{} completions were asked for; give at least 1", request.completions);
  if (request.context < -1 || request.context > prompt)
    fail("a context of {} tokens was given for a prompt of {}", request.context, prompt);
  const int64_t positions = model.max_position_embeddings;
  if (prompt > positions || request.max_new_tokens > positions - prompt)
    fail(
        "the prompt's {} tokens plus {} new ones pass the model's limit of {} positions; shorten the prompt or ask for "
        "fewer tokens",
        prompt, request.max_new_tokens, positions);
}

void Engine::check(const Request& request) const {
  check_request(request, backbone_.config());
  if (request.method < 0 || request.method >= static_cast<int64_t>(attention_.methods().size()))
    fail("attention method {} was asked for, the engine has {}", request.method, attention_.methods().size());
  if (!request.stop_strings.empty() && !options_.tokenizer)
    fail("stop strings need an engine with a tokenizer; give stop ids instead");
  const int64_t needed = static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens;
  if (needed > options_.max_tokens || !scheduler_.fits(needed))
    fail(
        "the prompt's {} tokens plus {} new ones pass the engine's room of {} tokens; make the cache larger or the "
        "request shorter",
        request.prompt.size(), request.max_new_tokens,
        std::min(options_.max_tokens, attention_.cache().num_pages() * attention_.cache().page_size()));
}

int64_t Engine::method(const MethodSpec& spec) {
  const std::vector<MethodSpec>& methods = attention_.methods();
  ++method_calls_;
  for (size_t i = 0; i < methods.size(); ++i) {
    if (!methods[i].reads_as(spec)) continue;
    method_uses_[i].last = method_calls_;
    return static_cast<int64_t>(i);
  }
  if (static_cast<int64_t>(methods.size()) < options_.max_methods) {
    const int64_t added = attention_.add_method(spec);
    method_uses_.push_back({next_salt_++, method_calls_});
    return added;
  }
  int64_t oldest = -1;
  for (size_t i = own_methods_; i < methods.size(); ++i) {
    const auto uses = [&](const auto& answer) {
      return answer.second->sequence.method == static_cast<int64_t>(i);
    };
    if (std::none_of(answers_.begin(), answers_.end(), uses) &&
        (oldest < 0 || method_uses_[i].last < method_uses_[static_cast<size_t>(oldest)].last))
      oldest = static_cast<int64_t>(i);
  }
  if (oldest < 0)
    fail("requests use {} attention methods already; ask for one of them, or wait", methods.size());
  attention_.replace_method(oldest, spec);
  runner_.forget(oldest);
  method_uses_[static_cast<size_t>(oldest)] = {next_salt_++, method_calls_};
  return oldest;
}

int64_t Engine::add(Request request) {
  check(request);
  const int64_t id = next_request_;
  const MethodSpec& method = attention_.methods()[static_cast<size_t>(request.method)];
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  std::vector<std::unique_ptr<Answer>> made;
  int64_t added = 0;
  try {
    for (int64_t i = 0; i < request.completions; ++i) {
      auto answer = std::make_unique<Answer>();
      answer->request = id;
      answer->completion = i;
      answer->max_new_tokens = request.max_new_tokens;
      answer->stop_ids = request.stop_ids;
      if (options_.tokenizer)
        answer->text = std::make_unique<TextStream>(*options_.tokenizer, request.stop_strings);
      if (request.constraint) answer->constraint = request.constraint();
      Sequence& sequence = answer->sequence;
      sequence.id = next_sequence_ + i;
      sequence.tokens = request.prompt;
      sequence.prompt_length = prompt;
      sequence.method = request.method;
      const int64_t context = request.context < 0 ? prompt : request.context;
      sequence.prefill_end = method.is_dense() ? std::numeric_limits<int64_t>::max() : context;
      sequence.context_end = context;
      sequence.salt =
          method.reads_sparsely(context) ? method_uses_[static_cast<size_t>(request.method)].salt : 0;
      SamplingOptions sampling = request.sampling;
      sampling.seed += static_cast<uint64_t>(i);
      sampler_.add(sequence.id, sampling, request.prompt);
      ++added;
      made.push_back(std::move(answer));
    }
  } catch (...) {
    for (int64_t i = 0; i < added; ++i) sampler_.remove(next_sequence_ + i);
    throw;
  }
  next_request_ += 1;
  next_sequence_ += request.completions;
  statistics_.prompt_tokens += prompt * request.completions;
  for (auto& answer : made) {
    if (request.max_new_tokens == 0) {
      sampler_.remove(answer->sequence.id);
      ended_.push_back({.request = id, .completion = answer->completion, .finish = FinishReason::length});
      continue;
    }
    scheduler_.add(answer->sequence);
    answers_.emplace(answer->sequence.id, std::move(answer));
  }
  return id;
}

bool Engine::idle() const {
  return answers_.empty() && ended_.empty();
}

void Engine::remove(int64_t sequence) {
  const auto found = answers_.find(sequence);
  scheduler_.remove(found->second->sequence);
  sampler_.remove(sequence);
  answers_.erase(found);
}

void Engine::cancel(int64_t request) {
  std::vector<int64_t> sequences;
  for (const auto& [id, answer] : answers_)
    if (answer->request == request) sequences.push_back(id);
  for (int64_t id : sequences) remove(id);
  std::erase_if(ended_, [&](const Event& event) { return event.request == request; });
}

std::vector<StepEntry> Engine::entries_of(const std::vector<Slice>& slices) const {
  std::vector<StepEntry> entries;
  for (const Slice& slice : slices) {
    const auto first = slice.sequence->tokens.begin() + slice.start;
    entries.push_back({.tokens = {.sequence = slice.sequence->cached,
                                  .tokens = {first, first + slice.count},
                                  .decode = slice.decode,
                                  .logits = slice.logits},
                       .route = {.method = slice.sequence->method,
                                 .selects = slice.selects,
                                 .context = slice.sequence->context_end}});
  }
  return entries;
}

// The forward pass, watched where the observer's turn has come.
StepResult Engine::run(const std::vector<Slice>& slices) {
  std::map<int64_t, const Answer*> observed;  // by the cache's sequence
  if (options_.observe_every > 0) {
    for (const Slice& slice : slices) {
      const Answer& answer = *answers_.at(slice.sequence->id);
      if (slice.decode && (answer.num_new() - 1) % options_.observe_every == 0)
        observed[slice.sequence->cached] = &answer;
    }
  }
  if (observed.empty()) return runner_.run(entries_of(slices));
  attention_.set_observer([&](const SelectionEvent& event) {
    if (event.chunk.sequence >= 0) return;  // of a prompt chunk
    const std::vector<int64_t>& sequences = event.inputs.batch.sequences;
    for (size_t row = 0; row < sequences.size(); ++row)
      if (const auto found = observed.find(sequences[row]); found != observed.end())
        options_.observer(event, static_cast<int64_t>(row), found->second->request,
                          found->second->completion);
  });
  try {
    StepResult result = runner_.run(entries_of(slices), /*eager=*/true);
    attention_.set_observer({});
    return result;
  } catch (...) {
    attention_.set_observer({});
    throw;
  }
}

std::vector<Event> Engine::step() {
  const c10::InferenceMode inference;
  std::vector<Event> events = std::move(ended_);
  ended_.clear();
  const std::vector<Slice> slices = scheduler_.schedule();
  if (slices.empty()) return events;
  const auto start = std::chrono::steady_clock::now();
  int64_t num_tokens = 0;
  for (const Slice& slice : slices) {
    num_tokens += slice.count;
    Answer& answer = *answers_.at(slice.sequence->id);
    if (!answer.has_started) answer.has_started = true, answer.started = start;
  }
  StepResult result;
  try {
    within_memory({.what = fmt::format("a step of {} tokens", num_tokens),
                   .remedy = "read fewer prompt tokens at once, or use bfloat16"},
                  [&] { result = run(slices); });
  } catch (...) {
    scheduler_.restart();
    ended_ = std::move(events);
    throw;
  }
  scheduler_.commit(slices);
  account(slices, result.attended);

  std::vector<int64_t> ids;
  for (const Slice& slice : slices)
    if (slice.logits) ids.push_back(slice.sequence->id);
  if (!ids.empty()) {
    const TokenMask mask = mask_of(ids, result.logits, events);
    const std::vector<SampledToken> sampled = sampler_.sample(result.logits, ids, mask);
    for (size_t i = 0; i < ids.size(); ++i) {
      Answer& answer = *answers_.at(ids[i]);
      statistics_.decode_tokens += answer.num_new() > 0;
      events.push_back(accept(answer, sampled[i]));
      if (events.back().finish) {
        if (!attention_.methods()[static_cast<size_t>(answer.sequence.method)].is_dense())
          events.back().attended = attended_by(answer);
        remove(ids[i]);
      }
    }
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const bool decode =
      std::all_of(slices.begin(), slices.end(), [](const Slice& slice) { return slice.decode; });
  (decode ? statistics_.decode_seconds : statistics_.prefill_seconds) += seconds;
  statistics_.steps += 1;
  for (const Slice& slice : slices) statistics_.read_tokens += slice.decode ? 0 : slice.count;
  return events;
}

TokenMask Engine::mask_of(std::vector<int64_t>& ids, at::Tensor& logits, std::vector<Event>& events) {
  TokenMask mask;
  std::vector<int64_t> constrained, kept, kept_ids;
  for (const int64_t id : ids)
    if (answers_.at(id)->constraint) constrained.push_back(id);
  if (constrained.empty()) return mask;
  const int64_t words = (backbone_.config().vocab_size + 31) / 32;
  mask.bits = at::empty({static_cast<int64_t>(constrained.size()), words},
                        at::TensorOptions().dtype(at::kInt).pinned_memory(backbone_.device().is_cuda()));
  auto* bits = mask.bits.mutable_data_ptr<int32_t>();
  for (size_t i = 0; i < ids.size(); ++i) {
    const Answer& answer = *answers_.at(ids[i]);
    if (answer.constraint) {
      if (!answer.constraint->allowed(bits + static_cast<int64_t>(mask.rows.size()) * words)) {
        events.push_back(
            {.request = answer.request,
             .completion = answer.completion,
             .finish = FinishReason::error,
             .error = fmt::format("request {}: {}", answer.request, answer.constraint->problem())});
        remove(ids[i]);
        continue;
      }
      mask.rows.push_back(static_cast<int64_t>(kept.size()));
    }
    kept.push_back(static_cast<int64_t>(i));
    kept_ids.push_back(ids[i]);
  }
  mask.bits = mask.bits.narrow(0, 0, static_cast<int64_t>(mask.rows.size()));
  if (kept.size() < ids.size()) {
    logits = logits.index_select(0, at::tensor(kept, at::kLong).to(logits.device()));
    ids = kept_ids;
  }
  return mask;
}

Event Engine::accept(Answer& answer, const SampledToken& sampled) {
  Event event{.request = answer.request, .completion = answer.completion};
  if (!sampled.error.empty()) {
    event.finish = FinishReason::error;
    event.error = fmt::format("request {}: {}", answer.request, sampled.error);
    return event;
  }
  if (std::find(answer.stop_ids.begin(), answer.stop_ids.end(), sampled.token) != answer.stop_ids.end()) {
    event.finish = FinishReason::stop;
    if (answer.text) event.text = answer.text->finish();
    return event;
  }
  if (answer.num_new() == 0) {
    event.cached_tokens = answer.sequence.reused;
    event.queue_seconds = std::chrono::duration<double>(answer.started - answer.added).count();
  }
  answer.sequence.tokens.push_back(sampled.token);
  event.token = sampled;
  if (answer.constraint) answer.constraint->accept(sampled.token);
  if (answer.text) event.text = answer.text->push(sampled.token);
  if ((answer.text && answer.text->stopped()) || (answer.constraint && answer.constraint->complete()))
    event.finish = FinishReason::stop;
  else if (answer.num_new() == answer.max_new_tokens)
    event.finish = FinishReason::length;
  if (event.finish && answer.text) event.text += answer.text->finish();
  return event;
}

void Engine::account(const std::vector<Slice>& slices, const std::vector<AttendedRows>& attended) {
  std::vector<int64_t> ids;
  for (const Slice& slice : slices) ids.push_back(slice.sequence->id);
  const auto alike = [](const AttendedRows& a, const AttendedRows& b) {
    return a.first == b.first && a.sums.sizes() == b.sums.sizes();
  };
  if (ids != account_ids_ ||
      !std::equal(account_.begin(), account_.end(), attended.begin(), attended.end(), alike))
    settle_accounts();
  account_ids_ = ids;
  if (!account_.empty()) {
    for (size_t i = 0; i < attended.size(); ++i) account_[i].sums.add_(attended[i].sums);
    return;
  }
  // Copies: a graph writes its results anew each step.
  for (const AttendedRows& rows : attended) account_.push_back({rows.first, rows.layers, rows.sums.clone()});
}

void Engine::settle_accounts() {
  for (const AttendedRows& rows : account_) {
    for (int64_t i = 0; i < rows.sums.size(1); ++i) {
      const auto index = static_cast<size_t>(rows.first + i);
      if (index >= account_ids_.size()) continue;  // padding
      const auto found = answers_.find(account_ids_[index]);
      if (found == answers_.end()) continue;
      Answer& answer = *found->second;
      answer.layers = rows.layers;
      const at::Tensor sums = rows.sums.select(1, i);
      answer.attended = answer.attended.defined() ? answer.attended + sums : sums;
    }
  }
  account_.clear();
  account_ids_.clear();
}

std::vector<AttendedTokens> Engine::attended_by(const Answer& answer) {
  settle_accounts();
  std::vector<AttendedTokens> attended;
  if (!answer.attended.defined()) return attended;
  const at::Tensor host = answer.attended.cpu();
  const auto values = host.accessor<double, 2>();
  for (int64_t i = 0; i < host.size(0); ++i)
    attended.push_back({answer.layers[static_cast<size_t>(i)], values[i][0], values[i][1], values[i][2]});
  return attended;
}

std::vector<AttendedTokens> Engine::attended(int64_t request, int64_t completion) {
  const c10::InferenceMode inference;
  for (const auto& [id, answer] : answers_)
    if (answer->request == request && answer->completion == completion) return attended_by(*answer);
  fail("answer {} of request {} is not in progress", completion, request);
}

EngineStatistics Engine::statistics() const {
  EngineStatistics statistics = statistics_;
  statistics.cached_tokens = scheduler_.cached_tokens();
  statistics.preemptions = scheduler_.num_preemptions();
  return statistics;
}

std::vector<std::vector<GeneratedAnswer>> generate(Engine& engine, const std::vector<Request>& requests,
                                                   const std::function<void(const Event&)>& on_event,
                                                   const std::function<void()>& on_step) {
  std::map<int64_t, size_t> places;  // of our requests among all of the engine's
  std::vector<std::vector<GeneratedAnswer>> answers;
  const auto cancel_all = [&] {
    for (const auto& [id, place] : places) engine.cancel(id);
  };
  try {
    for (const Request& request : requests) {
      places[engine.add(request)] = answers.size();
      answers.emplace_back(static_cast<size_t>(request.completions));
    }
    while (!engine.idle()) {
      for (const Event& event : engine.step()) {
        if (event.finish == FinishReason::error) fail("{}", event.error);
        if (on_event) on_event(event);
        const auto place = places.find(event.request);
        if (place == places.end()) continue;
        GeneratedAnswer& answer = answers[place->second][static_cast<size_t>(event.completion)];
        if (event.token) answer.tokens.push_back(event.token->token), answer.sampled.push_back(*event.token);
        answer.text += event.text;
        if (event.finish) answer.finish = *event.finish;
      }
      if (on_step) on_step();
    }
  } catch (...) {
    cancel_all();
    throw;
  }
  return answers;
}

}  // namespace spot
