// Events of the engine to replies: a stream's chunks, joined as a client joins them, are the whole reply.
#include <gtest/gtest.h>

#include <random>

#include "server/reply.h"

namespace spot::server {
namespace {

ServedModel small_model() {
  return {
      .name = "m", .tokenizer = Tokenizer::load("models/tiny-qwen3"), .vocab_size = 4096, .max_tokens = 512};
}

struct Piece {
  std::string text;
  std::optional<FinishReason> finish;
};

std::vector<Event> events_of(const std::vector<Piece>& pieces, int64_t completion) {
  std::vector<Event> events;
  for (const Piece& piece : pieces) {
    Event event{.completion = completion, .text = piece.text, .finish = piece.finish};
    event.token = SampledToken{.token = 100 + static_cast<int32_t>(events.size()), .logprob = -0.5f};
    event.token->top = {{100, -0.25f}, {101, -INFINITY}};
    event.cached_tokens = 3;
    events.push_back(std::move(event));
  }
  return events;
}

PreparedRequest prepared(const Json& more, bool chat) {
  Json body = {{"model", "m"}};
  if (chat)
    body["messages"] = {{{"role", "user"}, {"content", "a"}}};
  else
    body["prompt"] = "a";
  body.update(more);
  PreparedRequest request;
  request.api = chat ? parse_chat(to_text(body), {}) : parse_completion(to_text(body), {});
  request.format = {.reasoning = true, .tools = request.api.with_tools};
  request.requests.resize(1);
  request.requests[0].prompt = {5, 6, 7, 8};
  return request;
}

const Json kTools = {{{"type", "function"}, {"function", {{"name", "f"}}}}};

// A chat's chunks as a client puts them together: the choices of the whole reply.
Json joined(const std::vector<std::string>& chunks, size_t choices) {
  Json all = Json::array();
  for (size_t i = 0; i < choices; ++i)
    all.push_back({{"index", i}, {"message", {{"content", ""}}}, {"logprobs", nullptr}});
  for (const std::string& text : chunks) {
    const Json chunk = Json::parse(text);
    EXPECT_EQ(chunk.at("object"), "chat.completion.chunk");
    for (const Json& choice : chunk.at("choices")) {
      Json& mine = all.at(choice.at("index").get<size_t>());
      EXPECT_FALSE(mine.contains("finish_reason")) << "a chunk after the end";
      Json& message = mine["message"];
      const Json& delta = choice.at("delta");
      EXPECT_EQ(delta.contains("role"), !message.contains("role"));
      if (delta.contains("role")) message["role"] = delta.at("role");
      for (const char* name : {"content", "reasoning_content"})
        if (delta.contains(name)) message[name] = message.value(name, "") + delta.at(name).get<std::string>();
      for (const Json& call : delta.value("tool_calls", Json::array())) {
        const auto index = call.at("index").get<size_t>();
        if (call.contains("id")) {
          EXPECT_EQ(message["tool_calls"].size(), index);
          message["tool_calls"].push_back(call);
          message["tool_calls"].back().erase("index");
        } else {
          Json& arguments = message["tool_calls"].at(index)["function"]["arguments"];
          arguments = arguments.get<std::string>() + call.at("function").at("arguments").get<std::string>();
        }
      }
      if (!choice.at("logprobs").is_null())
        for (const Json& one : choice.at("logprobs").at("content"))
          mine["logprobs"]["content"].push_back(one);
      if (!choice.at("finish_reason").is_null()) mine["finish_reason"] = choice.at("finish_reason");
    }
  }
  for (Json& choice : all)
    if (choice["message"]["content"] == "" && choice["message"].contains("tool_calls"))
      choice["message"]["content"] = nullptr;
  return all;
}

void without_ids(Json& choices) {
  for (Json& choice : choices)
    if (choice["message"].contains("tool_calls"))
      for (Json& call : choice["message"]["tool_calls"]) call.erase("id");
}

TEST(Reply, StreamsJoinToTheWhole) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const ServedModel model = small_model();
  const std::string text =
      "<think>\nfirst\n</think>\n\nWell.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"}\"]}}\n</tool_call>\n"
      "<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
  for (int round = 0; round < 40; ++round) {
    Json more = {{"n", 2}};
    if (random() % 2) more["tools"] = kTools;
    if (random() % 2) more["logprobs"] = true, more["top_logprobs"] = 2;
    if (random() % 2) more["include_reasoning"] = false;
    std::vector<Event> events;
    for (int64_t completion = 0; completion < 2; ++completion) {
      std::vector<Piece> pieces;
      for (size_t done = 0; done < text.size();) {
        const size_t count = random() % 8;
        pieces.push_back({text.substr(done, count), {}});
        done += count;
      }
      pieces.back().finish = random() % 2 ? FinishReason::stop : FinishReason::length;
      for (Event& event : events_of(pieces, completion)) events.push_back(std::move(event));
    }
    // Of both answers in turn, as an engine's steps bring them.
    std::stable_sort(events.begin(), events.end(),
                     [](const Event& a, const Event& b) { return a.token->token < b.token->token; });
    Reply whole(prepared(more, true), model);
    more["stream"] = true, more["stream_options"] = {{"include_usage", true}};
    Reply stream(prepared(more, true), model);
    std::vector<std::string> chunks;
    for (const Event& event : events) {
      EXPECT_TRUE(whole.on_event(0, event).empty());
      for (std::string& chunk : stream.on_event(0, event)) chunks.push_back(std::move(chunk));
    }
    ASSERT_TRUE(whole.done() && stream.done());
    const Json body = Json::parse(whole.body());
    Json expected = body.at("choices"), got = joined(chunks, 2);
    without_ids(expected), without_ids(got);
    for (size_t i = 0; i < 2; ++i)
      for (const char* name : {"message", "logprobs", "finish_reason"})
        EXPECT_EQ(nlohmann::json(expected[i][name]), nlohmann::json(got[i][name])) << more;
    const Json& message = expected[0]["message"];
    EXPECT_EQ(message.contains("tool_calls"), more.contains("tools"));
    EXPECT_EQ(message.contains("reasoning_content"), !more.contains("include_reasoning"));
    if (more.contains("tools")) {
      EXPECT_EQ(message["content"], "Well.");
      EXPECT_EQ(message["tool_calls"][0]["function"]["arguments"], "{\"a\": [1, \"}\"]}");
      EXPECT_EQ(message["tool_calls"][1]["function"]["name"], "g");
      EXPECT_NE(expected[0]["finish_reason"], "stop");
    }
    const auto last = stream.last_chunks();
    ASSERT_EQ(last.size(), 1u);
    EXPECT_EQ(Json::parse(last[0]).at("usage"), body.at("usage"));
    EXPECT_EQ(Json::parse(last[0]).at("choices"), Json::array());
    EXPECT_EQ(body.at("usage").at("prompt_tokens"), 4);
    EXPECT_EQ(body.at("usage").at("completion_tokens"), static_cast<int64_t>(events.size()));
    EXPECT_EQ(body.at("usage").at("prompt_tokens_details").at("cached_tokens"), 3);
  }
}

TEST(Reply, WritesLogprobsOfCompletions) {
  const ServedModel model = small_model();
  Reply reply(prepared({{"logprobs", 2}}, false), model);
  for (const Event& event : events_of({{"\xC3\xA9 a", {}}, {"", {}}, {"b", FinishReason::stop}}, 0))
    reply.on_event(0, event);
  const Json choice = Json::parse(reply.body()).at("choices").at(0);
  EXPECT_EQ(choice.at("text"), "\xC3\xA9 ab");
  EXPECT_EQ(choice.at("finish_reason"), "stop");
  const Json& logprobs = choice.at("logprobs");
  EXPECT_EQ(logprobs.at("text_offset"), Json::array({0, 3, 3}));
  EXPECT_EQ(logprobs.at("token_logprobs"), Json::array({-0.5, -0.5, -0.5}));
  // Single bytes of a byte-level vocabulary, none of them a character.
  std::vector<std::string> names;
  for (int32_t id = 100; id < 103; ++id) {
    ASSERT_EQ(model.tokenizer.token_text(id).size(), 1u);
    names.push_back(
        fmt::format("bytes:\\x{:02x}", static_cast<unsigned char>(model.tokenizer.token_text(id)[0])));
  }
  EXPECT_EQ(logprobs.at("tokens"), Json(names));
  EXPECT_EQ(logprobs.at("top_logprobs").at(2),
            Json({{names[0], -0.25}, {names[1], -9999.0}, {names[2], -0.5}}));
}

}  // namespace
}  // namespace spot::server
