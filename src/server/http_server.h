// The HTTP side: one thread for all sockets, two that parse and encode, one that compiles schemas, beside the engine's own.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/connection.h"
#include "server/engine_loop.h"
#include "server/exchange.h"
#include "server/metrics.h"
#include "server/served_model.h"

namespace spot::server {

struct HttpOptions {
  std::string api_key;  // empty: none is asked for
  uint64_t max_body_bytes = uint64_t{16} << 20;
  int64_t max_bodies = 16;                      // as large as that, at one time; more are answered 503
  int64_t max_answers = 64 + 256;               // in progress and waiting; more are answered 429
  int64_t max_connections = 1024;               // more are answered 503
  size_t max_buffered_bytes = size_t{1} << 20;  // of a stream that its client does not read
  int64_t drain_seconds = 30;                   // for the answers in progress when the server is to end
};

// An address taken before the weights are read, so that one in use is known at once; whoever connects is refused until
// a server listens.
class BoundAddress {
 public:
  // port 0: any free one. Throws Error when the address is in use or not this machine's.
  BoundAddress(const std::string& host, int port);
  int port() const { return endpoint_.port(); }

 private:
  friend class HttpServer;
  boost::asio::io_context context_{1};
  boost::asio::ip::tcp::acceptor acceptor_{context_};
  boost::asio::ip::tcp::endpoint endpoint_;
};

class HttpServer {
 public:
  static constexpr int kRetrySoon = 1, kRetryLater = 10;  // seconds, for Retry-After

  // Takes the address and listens. All outlive the server.
  HttpServer(HttpOptions options, BoundAddress& address, const ServedModel& model, EngineLoop& engine,
             Metrics& metrics);

  // Serves until SIGTERM or SIGINT (then answers in progress have drain_seconds; a second signal ends at once), or
  // end(). Stops the engine loop before it returns.
  void run();
  // By any thread. What the engine's steps bring; and that it has failed, so that there is nothing more to serve.
  void deliver(std::vector<EngineUpdate> updates);
  void end(const std::string& reason);

  // For connections and exchanges, in the server's thread.
  const HttpOptions& options() const { return options_; }
  const ServedModel& model() const { return model_; }
  EngineLoop& engine() { return engine_; }
  Metrics& metrics() { return metrics_; }
  boost::asio::io_context& context() { return context_; }
  boost::asio::thread_pool& preparation() { return preparation_; }
  boost::asio::thread_pool& compilation() { return compilation_; }
  // A refusal that needs no body: no such route, no key, no room.
  std::optional<HttpReply> check_header(const HttpRequest& request) const;
  void handle(HttpRequest request, const std::shared_ptr<Connection>& connection);
  HttpReply error_reply(const ApiError& error) const;
  // Why no `more` answers can be taken, if so.
  std::optional<ApiError> refusal(int64_t more) const;
  void add_answers(int64_t count) { answers_ += count; }
  void add_body_bytes(int64_t count) { body_bytes_ += count; }
  bool has_room_for_bodies() const {
    return body_bytes_ <= options_.max_bodies * static_cast<int64_t>(options_.max_body_bytes);
  }
  void finished(const Exchange& exchange);
  void forget(const Connection* connection);

 private:
  void accept();
  void tick();
  void on_signal();
  void begin_drain(Connection::Clock::time_point deadline);
  void drain();
  void abort_all(const std::string& message);
  void begin_exchange(bool chat, std::string body, const std::shared_ptr<Connection>& connection);
  void in_preparation(const std::shared_ptr<Connection>& connection, std::function<Json()> work);
  HttpReply health() const;
  Json models() const;

  HttpOptions options_;
  const ServedModel& model_;
  EngineLoop& engine_;
  Metrics& metrics_;
  boost::asio::io_context context_{1};
  boost::asio::thread_pool preparation_{2};
  boost::asio::thread_pool compilation_{1};  // of schemas: other requests do not wait for them
  boost::asio::ip::tcp::acceptor acceptor_{context_};
  boost::asio::signal_set signals_;
  boost::asio::steady_timer timer_{context_}, pause_{context_};
  std::map<const Connection*, std::weak_ptr<Connection>> connections_;
  std::map<uint64_t, std::shared_ptr<Exchange>> exchanges_;
  uint64_t next_id_ = 1;
  int64_t answers_ = 0, body_bytes_ = 0;
  bool draining_ = false;
  Connection::Clock::time_point drain_deadline_, last_deadline_;
};

}  // namespace spot::server
