#include "server/http_server.h"

#include <sys/resource.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>
#include <csignal>

#include "core/error.h"
#include "core/notice.h"
#include "server/header_rules.h"
#include "server/page.h"

namespace spot::server {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;
using tcp = asio::ip::tcp;
using namespace std::chrono_literals;

struct Route {
  const char* path;
  http::verb method;
  bool needs_key, begins_work;
};
constexpr Route kRoutes[] = {{"/", http::verb::get, false, false},
                             {"/health", http::verb::get, false, false},
                             {"/metrics", http::verb::get, false, false},
                             {"/version", http::verb::get, false, false},
                             {"/v1/models", http::verb::get, true, false},
                             {"/v1/completions", http::verb::post, true, true},
                             {"/v1/chat/completions", http::verb::post, true, true},
                             {"/tokenize", http::verb::post, true, true},
                             {"/detokenize", http::verb::post, true, true}};

const Route* find_route(const std::string& path) {
  const std::string known = path.rfind("/v1/models/", 0) == 0 ? "/v1/models" : path;
  for (const Route& route : kRoutes)
    if (known == route.path) return &route;
  return nullptr;
}

// In a time that does not tell how much of the key was right.
bool same_secret(std::string_view a, std::string_view b) {
  unsigned char differs = a.size() != b.size();
  for (size_t i = 0; i < a.size(); ++i)
    differs |= static_cast<unsigned char>(a[i] ^ (b.empty() ? 0 : b[i % b.size()]));
  return differs == 0;
}

}  // namespace

BoundAddress::BoundAddress(const std::string& host, int port) {
  try {
    tcp::resolver resolver(context_);
    const tcp::endpoint endpoint =
        *resolver.resolve(host, std::to_string(port), tcp::resolver::passive).begin();
    acceptor_.open(endpoint.protocol());
    acceptor_.set_option(asio::socket_base::reuse_address(true));
    acceptor_.bind(endpoint);
    endpoint_ = acceptor_.local_endpoint();
  } catch (const boost::system::system_error& error) {
    fail("{}:{} cannot be listened on: {}; choose another --host or --port", host, port,
         error.code().message());
  }
}

HttpServer::HttpServer(HttpOptions options, BoundAddress& address, const ServedModel& model,
                       EngineLoop& engine, Metrics& metrics)
    : options_(std::move(options)),
      model_(model),
      engine_(engine),
      metrics_(metrics),
      acceptor_(context_, address.endpoint_.protocol(), address.acceptor_.release()),
      signals_(context_, SIGINT, SIGTERM),
      last_deadline_(Connection::Clock::time_point::max()) {
  error_code error;
  acceptor_.listen(asio::socket_base::max_listen_connections, error);
  if (error)
    fail("port {} cannot be listened on: {}; choose another --host or --port", address.port(),
         error.message());
}

void HttpServer::run() {
  // Of this pool's thread alone, on Linux: the engine's steps come before what compiles.
  asio::post(compilation_, [] { ::setpriority(PRIO_PROCESS, 0, 10); });
  accept();
  tick();
  on_signal();
  // A handler that throws costs its own connection alone.
  for (bool ended = false; !ended;) {
    try {
      context_.run();
      ended = true;
    } catch (const std::exception& error) {
      notice("error: a connection failed: {}\n", first_line(error));
    }
  }
  for (asio::thread_pool* pool : {&preparation_, &compilation_}) pool->stop();
  for (asio::thread_pool* pool : {&preparation_, &compilation_}) pool->join();
  engine_.stop();
}

void HttpServer::accept() {
  acceptor_.async_accept([this](error_code error, tcp::socket socket) {
    if (!acceptor_.is_open()) return;
    if (error) {  // mostly no descriptors left: to ask again at once would fail again, and take all of this thread's time
      pause_.expires_after(100ms);
      pause_.async_wait([this](error_code stopped) {
        if (!stopped && acceptor_.is_open()) accept();
      });
      return;
    }
    accept();
    if (static_cast<int64_t>(connections_.size()) >= options_.max_connections) {
      const std::string body = to_text(ApiError(503, "too many connections are open; try again").body());
      error_code ignored;
      socket.non_blocking(true, ignored);
      socket.write_some(
          asio::buffer(fmt::format("HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                                   "Content-Length: {}\r\nRetry-After: {}\r\nConnection: close\r\n\r\n{}",
                                   body.size(), kRetrySoon, body)),
          ignored);
      metrics_.refused(503).add();
    } else {
      const auto connection = std::make_shared<Connection>(std::move(socket), *this);
      connections_[connection.get()] = connection;
      connection->start();
      if (draining_) connection->close_after_reply();
    }
  });
}

void HttpServer::tick() {
  timer_.expires_after(1s);
  timer_.async_wait([this](error_code error) {
    if (error) return;
    const auto now = Connection::Clock::now();
    std::vector<std::shared_ptr<Connection>> all;  // closing one changes the map
    for (const auto& [key, connection] : connections_)
      if (auto one = connection.lock()) all.push_back(std::move(one));
    for (const auto& connection : all) connection->tick(now);
    if (draining_) drain();
    tick();
  });
}

void HttpServer::on_signal() {
  signals_.async_wait([this](error_code error, int) {
    if (error) return;
    const auto now = Connection::Clock::now();
    if (!draining_) {
      notice("ending: {} requests in progress have {} s; a second signal ends at once\n", exchanges_.size(),
             options_.drain_seconds);
      begin_drain(now + std::chrono::seconds(options_.drain_seconds));
    } else {
      drain_deadline_ = now;
      drain();
    }
    on_signal();
  });
}

// Until everything has been answered who connects is told 503, by which a load balancer knows.
void HttpServer::begin_drain(Connection::Clock::time_point deadline) {
  draining_ = true;
  drain_deadline_ = deadline;
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [key, connection] : connections_)
    if (auto one = connection.lock()) all.push_back(std::move(one));
  for (const auto& connection : all) connection->close_when_idle();
  drain();
}

// One look: everything has been answered, or its time is over.
void HttpServer::drain() {
  const auto now = Connection::Clock::now();
  if (now >= drain_deadline_) abort_all("the server is ending");
  if (!exchanges_.empty()) return;
  error_code ignored;
  acceptor_.close(ignored);
  // What is written already still has to reach its reader.
  if (last_deadline_ == Connection::Clock::time_point::max()) last_deadline_ = now + 3s;
  if (connections_.empty() || now >= last_deadline_) context_.stop();
}

void HttpServer::abort_all(const std::string& message) {
  const auto exchanges = exchanges_;
  for (const auto& [id, exchange] : exchanges) exchange->abort(message);
}

void HttpServer::end(const std::string& reason) {
  asio::post(context_, [this, reason] {
    abort_all(reason);
    begin_drain(Connection::Clock::now());
  });
}

void HttpServer::deliver(std::vector<EngineUpdate> updates) {
  asio::post(context_, [this, updates = std::move(updates)] {
    for (const EngineUpdate& update : updates) {
      const auto found = exchanges_.find(update.id);
      if (found == exchanges_.end()) continue;
      const std::shared_ptr<Exchange> exchange = found->second;
      exchange->on_update(update);
    }
  });
}

void HttpServer::finished(const Exchange& exchange) {
  answers_ -= exchange.num_answers();
  exchanges_.erase(exchange.id());
}

void HttpServer::forget(const Connection* connection) {
  connections_.erase(connection);
}

std::optional<ApiError> HttpServer::refusal(int64_t more) const {
  if (draining_) return ApiError(503, "the server is ending", {}, {}, kRetryLater);
  if (!engine_.healthy()) return ApiError(503, "the engine has failed", {}, {}, kRetryLater);
  if (answers_ + more > options_.max_answers)
    return ApiError(
        429,
        fmt::format("{} answers are in progress or wait, and {} more pass the limit of {}; try again",
                    answers_, more, options_.max_answers),
        {}, "queue_full", kRetrySoon);
  return {};
}

HttpReply HttpServer::error_reply(const ApiError& error) const {
  HttpReply reply{.status = error.status, .body = to_text(error.body())};
  if (error.retry_after > 0) reply.headers.emplace_back("Retry-After", std::to_string(error.retry_after));
  if (error.status == 401) reply.headers.emplace_back("WWW-Authenticate", "Bearer");
  return reply;
}

std::optional<HttpReply> HttpServer::check_header(const HttpRequest& request) const {
  const auto refuse = [&](const ApiError& error) {
    metrics_.refused(error.status).add();
    return error_reply(error);
  };
  if (const auto error = faulty_header(request)) {
    HttpReply reply = refuse(*error);
    reply.close = true;  // what follows may be a body
    return reply;
  }
  const std::string path = path_of(request.target());
  const Route* route = find_route(path);
  if (!route) return refuse(ApiError(404, fmt::format("there is no {} here", path.substr(0, 100))));
  const bool head = request.method() == http::verb::head && route->method == http::verb::get;
  if (request.method() != route->method && !head) {
    HttpReply reply = refuse(ApiError(
        405, fmt::format("{} takes {} requests", route->path, std::string(http::to_string(route->method)))));
    reply.headers.emplace_back("Allow", std::string(http::to_string(route->method)));
    return reply;
  }
  if (route->needs_key && !options_.api_key.empty() &&
      !same_secret(std::string(request[http::field::authorization]), "Bearer " + options_.api_key))
    return refuse(ApiError(401, "the API key is missing or wrong", {}, "invalid_api_key"));
  // Pages of other origins can send any other type without asking.
  if (route->method == http::verb::post)
    if (const auto error = faulty_body_type(request)) return refuse(*error);
  if (route->begins_work)
    if (const auto error = refusal(1)) return refuse(*error);
  return {};
}

void HttpServer::handle(HttpRequest request, const std::shared_ptr<Connection>& connection) {
  const std::string path = path_of(request.target());
  std::string& body = request.body();
  if (path == "/v1/completions") return begin_exchange(false, std::move(body), connection);
  if (path == "/v1/chat/completions") return begin_exchange(true, std::move(body), connection);
  if (path == "/tokenize")
    return in_preparation(connection, [this, body = std::move(body)] {
      const TokenizeRequest request = parse_tokenize(body);
      const std::vector<int32_t> tokens = tokenize(request, model_);
      Json json = {{"count", tokens.size()}, {"max_model_len", model_.max_tokens}, {"tokens", tokens}};
      if (request.return_texts)
        for (const int32_t token : tokens)
          json["token_strs"].push_back(model_.tokenizer.decode(std::vector<int32_t>{token}));
      return json;
    });
  if (path == "/detokenize")
    return in_preparation(connection, [this, body = std::move(body)]() -> Json {
      return {{"prompt", detokenize(parse_detokenize(body), model_)}};
    });
  if (path == "/health") return connection->reply(health());
  if (path == "/metrics")
    return connection->reply({.type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_.text()});
  if (path == "/version") return connection->reply({.body = to_text({{"version", SPOT_VERSION}})});
  if (path == "/")
    return connection->reply({.type = "text/html; charset=utf-8",
                              .body = std::string(kPage),
                              .headers = {{"Content-Security-Policy",
                                           "default-src 'none'; style-src 'unsafe-inline'; script-src "
                                           "'unsafe-inline'; connect-src 'self'; img-src data:"}}});
  const std::string prefix = "/v1/models/";
  if (path.rfind(prefix, 0) != 0) return connection->reply({.body = to_text(models())});
  if (path.substr(prefix.size()) != model_.name)
    return connection->reply(
        error_reply(ApiError(404, "there is no such model here", "model", "model_not_found")));
  connection->reply({.body = to_text(models().at("data").at(0))});
}

void HttpServer::begin_exchange(bool chat, std::string body, const std::shared_ptr<Connection>& connection) {
  if (const auto error = refusal(1)) {
    metrics_.refused(error->status).add();
    return connection->reply(error_reply(*error));
  }
  const auto exchange = std::make_shared<Exchange>(next_id_++, chat, connection, *this);
  exchanges_[exchange->id()] = exchange;
  answers_ += exchange->num_answers();
  connection->set_exchange(exchange);
  exchange->start(std::move(body));
}

void HttpServer::in_preparation(const std::shared_ptr<Connection>& connection, std::function<Json()> work) {
  asio::post(preparation_, [this, connection, work = std::move(work)]() mutable {
    HttpReply reply;
    try {
      reply.body = to_text(work());
    } catch (const ApiError& error) {
      reply = error_reply(error);
      metrics_.refused(error.status).add();
    } catch (const std::exception& error) {
      reply = error_reply(ApiError(500, first_line(error)));
      metrics_.refused(500).add();
    }
    // Moved: this thread must not be the one that ends the connection.
    asio::post(context_, [connection = std::move(connection), reply = std::move(reply)]() mutable {
      connection->reply(std::move(reply));
    });
  });
}

HttpReply HttpServer::health() const {
  if (const auto error = refusal(0); error && error->status == 503) return error_reply(*error);
  return {.body = R"({"status": "ok"})"};
}

Json HttpServer::models() const {
  Json words = Json::array();
  for (const std::string& word : model_.attention_words) words.push_back(word);
  Json model = {{"id", model_.name},
                {"object", "model"},
                {"created", model_.created},
                {"owned_by", "spotattention"},
                {"root", model_.name},
                {"parent", nullptr},
                {"max_model_len", model_.max_tokens},
                {"attention", model_.attention},
                {"attention_words", std::move(words)},
                {"chat", model_.chat_template.has_value()}};
  return {{"object", "list"}, {"data", Json::array({std::move(model)})}};
}

}  // namespace spot::server
