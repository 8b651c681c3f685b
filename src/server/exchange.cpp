#include "server/exchange.h"

#include <boost/asio/post.hpp>

#include "core/error.h"
#include "server/http_server.h"

namespace spot::server {

struct Exchange::Outcome {
  std::optional<PreparedRequest> prepared;
  std::optional<ApiError> error;
};

Exchange::Exchange(uint64_t id, bool chat, std::shared_ptr<Connection> connection, HttpServer& server)
    : id_(id), chat_(chat), connection_(std::move(connection)), server_(server) {}

void Exchange::start(std::string body) {
  boost::asio::post(server_.preparation(), [self = shared_from_this(), body = std::move(body)] {
    if (self->gone_) return;
    Outcome outcome;
    const ServedModel& model = self->server_.model();
    std::optional<ApiRequest> api;
    self->guarded(outcome, [&] {
      api = self->chat_ ? parse_chat(body, model.sampling) : parse_completion(body, model.sampling);
      if (!api->schema) outcome.prepared = prepare(std::move(*api), model);
    });
    if (outcome.prepared || outcome.error) return self->hand_over(std::move(outcome));
    boost::asio::post(self->server_.compilation(), [self, api = std::move(*api)]() mutable {
      if (self->gone_) return;
      Outcome outcome;
      self->guarded(outcome, [&] { outcome.prepared = prepare(std::move(api), self->server_.model()); });
      self->hand_over(std::move(outcome));
    });
  });
}

template <typename Work>
void Exchange::guarded(Outcome& outcome, const Work& work) {
  try {
    work();
  } catch (const ApiError& error) {
    outcome.error = error;
  } catch (const std::exception& error) {
    outcome.error = ApiError(500, "the request could not be read: " + first_line(error));
  }
}

void Exchange::hand_over(Outcome outcome) {
  boost::asio::post(server_.context(), [self = shared_from_this(), outcome = std::move(outcome)]() mutable {
    self->on_prepared(std::move(outcome));
  });
}

void Exchange::on_prepared(Outcome outcome) {
  if (gone_) return;
  if (outcome.error) return fail(*outcome.error);
  PreparedRequest& prepared = *outcome.prepared;
  const int64_t answers = prepared.num_answers();
  if (const auto error = server_.refusal(answers - answers_)) return fail(*error);
  server_.add_answers(answers - answers_);
  answers_ = answers;
  reply_.emplace(prepared, server_.model());
  streams_ = prepared.api.stream;
  submitted_ = true;
  server_.engine().submit({.id = id_,
                           .requests = std::move(prepared.requests),
                           .method = std::move(prepared.method),
                           .arrived = arrived_});
}

void Exchange::on_update(const EngineUpdate& update) {
  if (gone_) return;
  switch (update.kind) {
    case EngineUpdate::Kind::accepted:
      begun_ = streams_;
      if (streams_) connection_->begin_stream();
      return;
    case EngineUpdate::Kind::refused:
      return fail(ApiError(400, update.error));
    case EngineUpdate::Kind::failed:
      return fail(ApiError(500, update.error));
    case EngineUpdate::Kind::event:
      break;
  }
  if (update.event.finish == FinishReason::error) return fail(ApiError(500, update.event.error));
  std::string events;
  for (const std::string& chunk : reply_->on_event(update.part, update.event))
    events += "data: " + chunk + "\n\n";
  const bool done = reply_->done();
  if (!streams_) {
    if (!done) return;
    const std::shared_ptr<Connection> connection = connection_;
    const std::string body = reply_->body();
    submitted_ = false;
    finish();
    return connection->reply({.body = body});
  }
  if (done) {
    for (const std::string& chunk : reply_->last_chunks()) events += "data: " + chunk + "\n\n";
    events += "data: [DONE]\n\n";
  }
  const std::shared_ptr<Connection> connection = connection_;
  connection->stream(events);
  if (!done || gone_) return;
  submitted_ = false;
  finish();
  connection->end_stream(/*whole=*/true);
}

// A stream that has begun cannot have another status: the error is its last event, and [DONE] never comes.
void Exchange::fail(const ApiError& error) {
  const std::shared_ptr<Connection> connection = connection_;
  const bool begun = begun_;
  server_.metrics().refused(error.status).add();
  finish();
  if (!begun) return connection->reply(server_.error_reply(error));
  connection->stream("data: " + to_text(error.body()) + "\n\n");
  connection->end_stream(/*whole=*/false);
}

void Exchange::client_gone() {
  if (!gone_) finish();
}

void Exchange::abort(const std::string& message) {
  if (!gone_) fail(ApiError(503, message, {}, {}, HttpServer::kRetryLater));
}

void Exchange::finish() {
  gone_ = true;
  if (submitted_) server_.engine().cancel(id_);
  connection_.reset();
  server_.finished(*this);
}

}  // namespace spot::server
