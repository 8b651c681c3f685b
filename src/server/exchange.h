// One API request on its way: prepared, queued in the engine, answered, or given up.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "server/connection.h"
#include "server/engine_loop.h"
#include "server/reply.h"

namespace spot::server {

// Lives in the thread of the server's io_context, but for the preparation.
class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  Exchange(uint64_t id, bool chat, std::shared_ptr<Connection> connection, HttpServer& server);

  // Parses, renders and encodes in the preparation threads, or where a schema is to be compiled in the thread for that, then
  // submits.
  void start(std::string body);
  void on_update(const EngineUpdate& update);
  void client_gone();
  // The server ends: tells the client, and gives up.
  void abort(const std::string& message);

  uint64_t id() const { return id_; }
  int64_t num_answers() const { return answers_; }

 private:
  struct Outcome;
  template <typename Work>
  void guarded(Outcome& outcome, const Work& work);
  void hand_over(Outcome outcome);
  void on_prepared(Outcome outcome);
  void fail(const ApiError& error);
  void finish();

  const uint64_t id_;
  const bool chat_;
  std::shared_ptr<Connection> connection_;
  HttpServer& server_;
  const std::chrono::steady_clock::time_point arrived_ = std::chrono::steady_clock::now();
  std::atomic<bool> gone_ = false;
  bool submitted_ = false, streams_ = false, begun_ = false;
  int64_t answers_ = 1;  // for the limit; of the request once it is known
  std::optional<Reply> reply_;
};

}  // namespace spot::server
