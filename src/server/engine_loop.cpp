#include "server/engine_loop.h"

#include "core/error.h"
#include "core/notice.h"

namespace spot::server {
namespace {

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

EngineLoop::EngineLoop(Engine& engine, AttentionStack& stack, Metrics& metrics)
    : engine_(engine), stack_(stack), metrics_(metrics) {}

void EngineLoop::submit(Submission submission) {
  const std::lock_guard lock(mutex_);
  orders_.emplace_back(std::move(submission));
  changed_.notify_one();
}

void EngineLoop::cancel(uint64_t id) {
  const std::lock_guard lock(mutex_);
  orders_.emplace_back(id);
  changed_.notify_one();
}

void EngineLoop::stop() {
  const std::lock_guard lock(mutex_);
  stopping_ = true;
  changed_.notify_one();
}

void EngineLoop::take(Submission& submission, std::vector<EngineUpdate>& updates) {
  std::vector<int64_t>& names = names_[submission.id];
  try {
    const int64_t method = engine_.method(submission.method);
    for (size_t i = 0; i < submission.requests.size(); ++i) {
      Request& request = submission.requests[i];
      request.method = method;
      Part part{.id = submission.id,
                .part = static_cast<int64_t>(i),
                .open = request.completions,
                .prompt_tokens = static_cast<int64_t>(request.prompt.size()),
                .arrived = submission.arrived};
      metrics_.request_prompt_tokens.observe(static_cast<double>(part.prompt_tokens));
      metrics_.request_completions.observe(static_cast<double>(request.completions));
      metrics_.request_max_tokens.observe(static_cast<double>(request.max_new_tokens));
      const int64_t name = engine_.add(std::move(request));
      names.push_back(name);
      parts_.emplace(name, std::move(part));
    }
    updates.push_back({.id = submission.id, .kind = EngineUpdate::Kind::accepted});
  } catch (const Error& error) {
    drop(submission.id);
    updates.push_back({.id = submission.id, .kind = EngineUpdate::Kind::refused, .error = error.what()});
  } catch (const std::exception& error) {
    drop(submission.id);
    updates.push_back({.id = submission.id, .kind = EngineUpdate::Kind::failed, .error = first_line(error)});
  }
}

void EngineLoop::drop(uint64_t id) {
  const auto found = names_.find(id);
  if (found == names_.end()) return;
  for (const int64_t name : found->second) {
    engine_.cancel(name);
    if (const auto part = parts_.find(name); part != parts_.end()) {
      metrics_.ended("abort").add(static_cast<double>(part->second.open));
      parts_.erase(part);
    }
  }
  names_.erase(found);
}

void EngineLoop::observe(Part& part, const Event& event) {
  const Clock::time_point now = Clock::now();
  Part::Times& times = part.answers[event.completion];
  if (event.token) {
    if (times.tokens == 0) {
      times.first = now, times.queue_seconds = event.queue_seconds;
      metrics_.first_token.observe(seconds(part.arrived, now));
      metrics_.queue.observe(event.queue_seconds);
      metrics_.prompt_tokens.add(static_cast<double>(part.prompt_tokens));
      metrics_.cache_queries.add(static_cast<double>(part.prompt_tokens));
      metrics_.cache_hits.add(static_cast<double>(event.cached_tokens));
    } else {
      metrics_.between_tokens.observe(seconds(times.last, now));
    }
    times.last = now;
    ++times.tokens;
    metrics_.generation_tokens.add();
  }
  if (event.finish) observe_end(part, times, event);
}

void EngineLoop::observe_end(const Part& part, const Part::Times& times, const Event& event) {
  const bool failed = *event.finish == FinishReason::error;
  metrics_.ended(failed ? "error" : *event.finish == FinishReason::length ? "length" : "stop").add();
  const Clock::time_point now = Clock::now();
  metrics_.whole.observe(seconds(part.arrived, now));
  metrics_.request_generation_tokens.observe(static_cast<double>(times.tokens));
  for (const AttendedTokens& layer : event.attended) {
    metrics_.sparse_queries.add(layer.queries);
    metrics_.attended_tokens.add(layer.attended);
    metrics_.visible_tokens.add(layer.visible);
  }
  if (times.tokens == 0) return;
  const double to_first = seconds(part.arrived, times.first),
               prefill = std::max(to_first - times.queue_seconds, 0.0),
               decode = seconds(times.first, times.last);
  metrics_.prefill.observe(prefill);
  metrics_.decode.observe(decode);
  metrics_.inference.observe(prefill + decode);
  if (times.tokens > 1) metrics_.mean_between_tokens.observe(decode / static_cast<double>(times.tokens - 1));
}

void EngineLoop::set_gauges() {
  const PagedCache& cache = stack_.cache();
  metrics_.running.set(static_cast<double>(engine_.num_running()));
  metrics_.waiting.set(static_cast<double>(engine_.num_waiting()));
  metrics_.cache_usage.set(1 - static_cast<double>(cache.num_free_pages()) /
                                   static_cast<double>(cache.num_pages()));
  const EngineStatistics now = engine_.statistics();
  metrics_.preemptions.add(static_cast<double>(now.preemptions - before_.preemptions));
  if (now.steps > before_.steps)
    metrics_.step_tokens.observe(static_cast<double>(now.read_tokens - before_.read_tokens +
                                                     now.decode_tokens - before_.decode_tokens));
  before_ = now;
}

void EngineLoop::fail_all(const std::string& error, std::vector<EngineUpdate>& updates) {
  while (!names_.empty()) {
    const uint64_t id = names_.begin()->first;
    updates.push_back({.id = id, .kind = EngineUpdate::Kind::failed, .error = error});
    drop(id);
  }
}

bool EngineLoop::run(const Sink& sink) {
  int failures = 0;
  while (true) {
    std::vector<std::variant<Submission, uint64_t>> orders;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stopping_ || !orders_.empty() || !engine_.idle(); });
      if (stopping_) return true;
      orders.swap(orders_);
    }
    std::vector<EngineUpdate> updates;
    for (auto& order : orders) {
      if (auto* submission = std::get_if<Submission>(&order))
        take(*submission, updates);
      else
        drop(std::get<uint64_t>(order));
    }
    if (!updates.empty()) sink(std::exchange(updates, {}));
    try {
      for (Event& event : engine_.step()) {
        const auto found = parts_.find(event.request);
        if (found == parts_.end()) continue;
        Part& part = found->second;
        observe(part, event);
        const uint64_t id = part.id;
        const int64_t index = part.part;
        if (event.finish && --part.open == 0) {
          std::vector<int64_t>& names = names_.at(id);
          std::erase(names, event.request);
          if (names.empty()) names_.erase(id);
          parts_.erase(found);
        }
        updates.push_back({.id = id, .part = index, .event = std::move(event)});
      }
      failures = 0;
    } catch (const std::exception& error) {
      notice("error: a step failed: {}\n", first_line(error));
      fail_all(fmt::format("the engine failed: {}", first_line(error)), updates);
      healthy_ = ++failures < 3;
    }
    set_gauges();
    if (!updates.empty()) sink(std::move(updates));
    if (!healthy_) return false;
  }
}

}  // namespace spot::server
