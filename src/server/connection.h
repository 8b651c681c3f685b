// One client's connection: reads requests, writes replies, and sees the client go at any time between.
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace spot::server {

class Exchange;
class HttpServer;

using HttpRequest = boost::beast::http::request<boost::beast::http::string_body>;

struct HttpReply {
  int status = 200;
  std::string type = "application/json", body;
  std::vector<std::pair<std::string, std::string>> headers;
  bool close = false;  // the connection afterwards
};

// Lives in the thread of the server's io_context alone, as long as an operation of its socket does.
class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Clock = std::chrono::steady_clock;

  Connection(boost::asio::ip::tcp::socket socket, HttpServer& server);
  ~Connection();
  void start();

  // Answers the request: whole, or by a stream of server-sent events. Do nothing once the client has gone.
  void reply(HttpReply reply);
  void begin_stream();
  void stream(std::string_view events);
  // `whole`: the client learns that nothing is missing.
  void end_stream(bool whole);

  // Who answers the request that was just read; told when the client goes.
  void set_exchange(std::shared_ptr<Exchange> exchange) { exchange_ = std::move(exchange); }
  // Once a second: closes what is overdue, sends a comment where a stream has been silent.
  void tick(Clock::time_point now);
  // No more requests: closes with the end of the reply, or now where it waits for a further request.
  void close_after_reply() { closing_ = true; }
  void close_when_idle();
  // Closes at once, whatever is under way. `reason` as Metrics::dropped names it.
  void drop(const char* reason);

 private:
  enum class State { reading, answering, streaming, lingering, closed };
  void read_header();
  void on_header(boost::system::error_code error);
  void read_body();
  bool hold_body(size_t bytes);
  void on_request();
  void refuse_and_close(int status, const std::string& message);
  void watch();
  void send(std::string_view bytes);
  void write_some();
  void on_written();
  void linger();
  void close();

  boost::asio::ip::tcp::socket socket_;
  HttpServer& server_;
  boost::beast::flat_buffer buffer_;
  std::optional<boost::beast::http::request_parser<boost::beast::http::string_body>> parser_;
  State state_ = State::reading;
  bool keep_alive_ = false, chunked_ = false, head_only_ = false, closing_ = false, whole_ = false;
  bool ended_ = false;     // the reply is complete but for what is still to be written
  bool watching_ = false;  // a read is pending beside the answer
  std::shared_ptr<Exchange> exchange_;
  std::string pending_, in_flight_;
  size_t written_ = 0;     // of in_flight_
  size_t body_bytes_ = 0;  // of the request, as the server counts them
  bool writing_ = false;
  std::string scratch_;
  Clock::time_point read_deadline_, body_deadline_, write_deadline_, last_write_;
};

}  // namespace spot::server
