#include "server/connection.h"

#include <fmt/format.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <boost/asio/buffer.hpp>
#include <boost/beast/http/read.hpp>

#include "server/exchange.h"
#include "server/header_rules.h"
#include "server/http_server.h"

namespace spot::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using namespace std::chrono_literals;

constexpr auto kNever = Connection::Clock::time_point::max();
constexpr auto kHeaderTime = 30s, kIdleTime = 75s, kBodyStall = 30s, kBodyTime = 600s, kWriteStall = 30s,
               kPing = 10s, kLinger = 2s;
constexpr size_t kMostHeader = 32 << 10, kMostBuffer = 128 << 10, kMostPipelined = 64 << 10;
constexpr int kSendBuffer =
    256 << 10;  // of the kernel: what a slow reader may be behind besides our own bound

void set_socket_options(asio::ip::tcp::socket& socket) {
  error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::send_buffer_size(kSendBuffer), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);
  // A client whose machine has gone is noticed within half a minute.
  const auto set = [&](int name, int value) {
    setsockopt(socket.native_handle(), IPPROTO_TCP, name, &value, sizeof value);
  };
  set(TCP_KEEPIDLE, 15), set(TCP_KEEPINTVL, 5), set(TCP_KEEPCNT, 3), set(TCP_USER_TIMEOUT, 30000);
}

}  // namespace

Connection::Connection(asio::ip::tcp::socket socket, HttpServer& server)
    : socket_(std::move(socket)),
      server_(server),
      buffer_(kMostBuffer),
      read_deadline_(kNever),
      body_deadline_(kNever),
      write_deadline_(kNever) {
  set_socket_options(socket_);
  server_.metrics().connections.add(1);
}

Connection::~Connection() {
  server_.metrics().connections.add(-1);
}

void Connection::start() {
  read_header();
}

void Connection::read_header() {
  state_ = State::reading;
  parser_.emplace();
  parser_->header_limit(kMostHeader);
  parser_->body_limit(server_.options().max_body_bytes);
  read_deadline_ = Clock::now() + (keep_alive_ && buffer_.size() == 0 ? kIdleTime : kHeaderTime);
  http::async_read_header(socket_, buffer_, *parser_,
                          [self = shared_from_this()](error_code error, size_t) { self->on_header(error); });
}

void Connection::on_header(error_code error) {
  if (state_ == State::closed) return;
  if (error == http::error::body_limit)
    return refuse_and_close(413, fmt::format("the body is larger than the {} bytes that are taken",
                                             server_.options().max_body_bytes));
  if (error == http::error::header_limit || error == http::error::buffer_overflow)
    return refuse_and_close(431, fmt::format("the header is larger than {} bytes", kMostHeader));
  if (error.category() == make_error_code(http::error::bad_version).category() &&
      error != http::error::end_of_stream && error != http::error::partial_message)
    return refuse_and_close(400, "this is no HTTP request: " + error.message());
  if (error) return close();
  const auto& request = parser_->get();
  keep_alive_ = request.keep_alive();
  head_only_ = request.method() == http::verb::head;
  chunked_ = request.version() >= 11;
  if (const auto refusal = server_.check_header(request)) {
    HttpReply reply = *refusal;
    reply.close = reply.close || !parser_->is_done();  // a body that nobody reads is on its way
    state_ = State::answering;
    return this->reply(std::move(reply));
  }
  if (waits_to_send(request) && !parser_->is_done()) send("HTTP/1.1 100 Continue\r\n\r\n");
  body_deadline_ = Clock::now() + kBodyTime;
  read_body();
}

// Bodies count from their first byte to the beginning of their answer.
bool Connection::hold_body(size_t bytes) {
  server_.add_body_bytes(static_cast<int64_t>(bytes) - static_cast<int64_t>(body_bytes_));
  body_bytes_ = bytes;
  return bytes == 0 || server_.has_room_for_bodies();
}

void Connection::read_body() {
  if (!hold_body(parser_->get().body().size()))
    return refuse_and_close(503, "the bodies of other requests take all the room that there is; try again");
  if (parser_->is_done()) return on_request();
  read_deadline_ = Clock::now() + kBodyStall;
  http::async_read_some(socket_, buffer_, *parser_, [self = shared_from_this()](error_code error, size_t) {
    if (self->state_ == State::closed) return;
    if (error == http::error::body_limit)
      return self->refuse_and_close(413, fmt::format("the body is larger than the {} bytes that are taken",
                                                     self->server_.options().max_body_bytes));
    if (error == http::error::end_of_stream || error == http::error::partial_message) return self->close();
    if (error.category() == make_error_code(http::error::bad_version).category() && error)
      return self->refuse_and_close(400, "this is no HTTP request: " + error.message());
    if (error) return self->close();
    self->read_body();
  });
}

void Connection::on_request() {
  read_deadline_ = body_deadline_ = kNever;
  state_ = State::answering;
  ended_ = whole_ = false;
  HttpRequest request = parser_->release();
  parser_.reset();
  server_.handle(std::move(request), shared_from_this());
  if (state_ != State::closed && !ended_) watch();
}

void Connection::refuse_and_close(int status, const std::string& message) {
  state_ = State::answering;
  keep_alive_ = false;
  HttpReply refusal =
      server_.error_reply(ApiError(status, message, {}, {}, status == 503 ? HttpServer::kRetrySoon : 0));
  refusal.close = true;
  reply(std::move(refusal));
}

// While a request is answered: an end of the stream is a client that has gone. What it sends already of its next
// request is kept.
void Connection::watch() {
  if (watching_ || state_ == State::closed) return;
  if (buffer_.size() >= kMostPipelined) return drop("gone");
  watching_ = true;
  socket_.async_read_some(buffer_.prepare(4096), [self = shared_from_this()](error_code error, size_t count) {
    self->watching_ = false;
    if (self->state_ == State::closed) return;
    self->buffer_.commit(count);
    const bool answering = self->state_ == State::answering || self->state_ == State::streaming;
    if (error && error != asio::error::operation_aborted) return self->drop("gone");
    if (answering)
      self->watch();
    else if (self->state_ == State::reading)
      self->read_header();
    else
      self->linger();
  });
}

void Connection::reply(HttpReply reply) {
  if (state_ != State::answering) return;
  hold_body(0);
  keep_alive_ = keep_alive_ && !reply.close && !closing_;
  std::string head =
      fmt::format("HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: {}\r\n",
                  reply.status, std::string(http::obsolete_reason(static_cast<http::status>(reply.status))),
                  reply.type, reply.body.size(), keep_alive_ ? "keep-alive" : "close");
  for (const auto& [name, value] : reply.headers) head += fmt::format("{}: {}\r\n", name, value);
  ended_ = whole_ = true;
  exchange_.reset();
  send(head + "\r\n" + (head_only_ ? "" : reply.body));
}

void Connection::begin_stream() {
  if (state_ != State::answering) return;
  hold_body(0);
  state_ = State::streaming;
  if (!chunked_) keep_alive_ = false;
  keep_alive_ = keep_alive_ && !closing_;
  send(fmt::format(
      "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
      "X-Accel-Buffering: no\r\n{}Connection: {}\r\n\r\n",
      chunked_ ? "Transfer-Encoding: chunked\r\n" : "", keep_alive_ ? "keep-alive" : "close"));
}

void Connection::stream(std::string_view events) {
  if (state_ != State::streaming || events.empty()) return;
  if (pending_.size() + in_flight_.size() - written_ + events.size() > server_.options().max_buffered_bytes)
    return drop("slow");
  if (chunked_)
    send(fmt::format("{:x}\r\n{}\r\n", events.size(), events));
  else
    send(events);
}

void Connection::end_stream(bool whole) {
  if (state_ != State::streaming) return;
  exchange_.reset();
  ended_ = true, whole_ = whole;
  if (!whole) keep_alive_ = false;
  if (chunked_ && whole)
    send("0\r\n\r\n");
  else if (!writing_)
    on_written();
}

void Connection::send(std::string_view bytes) {
  pending_ += bytes;
  if (!writing_) write_some();
}

void Connection::write_some() {
  if (written_ == in_flight_.size()) {
    in_flight_.clear(), written_ = 0;
    in_flight_.swap(pending_);
  }
  writing_ = true;
  write_deadline_ = Clock::now() + kWriteStall;
  socket_.async_write_some(asio::buffer(in_flight_.data() + written_, in_flight_.size() - written_),
                           [self = shared_from_this()](error_code error, size_t count) {
                             self->writing_ = false;
                             if (self->state_ == State::closed) return;
                             if (error) return self->drop("gone");
                             self->written_ += count;
                             self->last_write_ = Clock::now();
                             if (self->written_ < self->in_flight_.size() || !self->pending_.empty())
                               return self->write_some();
                             self->write_deadline_ = kNever;
                             self->on_written();
                           });
}

void Connection::on_written() {
  if (!ended_) return;
  ended_ = false;
  if (!keep_alive_ || closing_) {
    state_ = State::lingering;
    error_code ignored;
    socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
    read_deadline_ = Clock::now() + kLinger;
  } else {
    state_ = State::reading;
  }
  if (watching_)
    socket_.cancel();  // the read that watches; it goes on from there
  else if (state_ == State::reading)
    read_header();
  else
    linger();
}

// Closing while the client still sends would take back the reply.
void Connection::linger() {
  scratch_.resize(64 << 10);
  socket_.async_read_some(asio::buffer(scratch_), [self = shared_from_this()](error_code error, size_t) {
    if (self->state_ == State::closed) return;
    if (error && error != asio::error::operation_aborted) return self->close();
    self->linger();
  });
}

void Connection::tick(Clock::time_point now) {
  if (state_ == State::closed) return;
  if (now > read_deadline_ || now > body_deadline_) return close();
  if (now > write_deadline_) return drop("slow");
  if (state_ == State::streaming && !ended_ && !writing_ && now - last_write_ > kPing) stream(": ping\n\n");
}

void Connection::close_when_idle() {
  close_after_reply();
  // Whoever has just connected is about to ask, and learns more from a reply than from a closed connection.
  if (keep_alive_ && state_ == State::reading && buffer_.size() == 0 && !(parser_ && parser_->got_some()))
    close();
}

void Connection::drop(const char* reason) {
  if (state_ == State::closed) return;
  const std::shared_ptr<Exchange> exchange = std::exchange(exchange_, nullptr);
  if (state_ == State::answering || state_ == State::streaming) server_.metrics().dropped(reason).add();
  // With what is still unsent, or the kernel would go on for a while.
  error_code ignored;
  socket_.set_option(asio::socket_base::linger(true, 0), ignored);
  close();
  if (exchange) exchange->client_gone();
}

void Connection::close() {
  if (state_ == State::closed) return;
  state_ = State::closed;
  hold_body(0);
  error_code ignored;
  socket_.close(ignored);
  server_.forget(this);
  if (const auto exchange = std::exchange(exchange_, nullptr)) exchange->client_gone();
}

}  // namespace spot::server
