// The engine's thread: takes requests in, steps, and hands out what the steps bring.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "engine/engine.h"
#include "server/metrics.h"

namespace spot::server {

struct Submission {
  uint64_t id = 0;                // the caller's name
  std::vector<Request> requests;  // their method is set here
  MethodSpec method;
  std::chrono::steady_clock::time_point arrived;
};

struct EngineUpdate {
  enum class Kind { accepted, refused, event, failed };
  uint64_t id = 0;
  Kind kind = Kind::event;
  int64_t part = 0;   // which of the submission's requests
  Event event;        // with Kind::event
  std::string error;  // with refused: the request's fault; failed: not the request's
};

// Requests are the caller's from submit() to their last event, an update that is refused or failed, or cancel().
class EngineLoop {
 public:
  // Called by the engine's thread, after each step.
  using Sink = std::function<void(std::vector<EngineUpdate>)>;

  // All outlive the loop.
  EngineLoop(Engine& engine, AttentionStack& stack, Metrics& metrics);

  // By any thread.
  void submit(Submission submission);
  void cancel(uint64_t id);
  void stop();
  // Whether steps succeed. False for good after three failures on end; run() then returns.
  bool healthy() const { return healthy_; }

  // Runs until stop(), in the calling thread. False when the engine failed.
  bool run(const Sink& sink);

 private:
  struct Part {  // one engine request
    uint64_t id = 0;
    int64_t part = 0, open = 0;  // answers that have not ended
    int64_t prompt_tokens = 0;
    std::chrono::steady_clock::time_point arrived;
    struct Times {
      std::chrono::steady_clock::time_point first, last;
      int64_t tokens = 0;
      double queue_seconds = 0;
    };
    std::map<int64_t, Times> answers;
  };
  void take(Submission& submission, std::vector<EngineUpdate>& updates);
  void drop(uint64_t id);
  void observe(Part& part, const Event& event);
  void observe_end(const Part& part, const Part::Times& times, const Event& event);
  void set_gauges();
  void fail_all(const std::string& error, std::vector<EngineUpdate>& updates);

  Engine& engine_;
  AttentionStack& stack_;
  Metrics& metrics_;
  std::map<int64_t, Part> parts_;                   // by the engine's request
  std::map<uint64_t, std::vector<int64_t>> names_;  // the caller's to the engine's
  EngineStatistics before_;
  std::atomic<bool> healthy_ = true;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::variant<Submission, uint64_t>> orders_;  // in order; a number is to be cancelled
  bool stopping_ = false;
};

}  // namespace spot::server
