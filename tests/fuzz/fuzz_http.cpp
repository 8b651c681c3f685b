// Bytes of a client, to the whole server with a small random model behind it. A byte 0xFF ends a piece: the rest is sent
// later. Nothing may be thrown in a handler, and the server must serve the next client.
#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <algorithm>
#include <cstdio>
#include <string_view>
#include <thread>

#include "engine/engine.h"
#include "fuzz.h"
#include "server/http_server.h"

namespace spot {

// In place of core/notice.cpp: what the server would report as an error is a crash here.
void write_stderr(std::string_view text) {
  if (text.find("error:") == std::string_view::npos) return;
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
  std::abort();
}

namespace {

ModelConfig small_model() {
  ModelConfig config;
  config.architecture = "Qwen3ForCausalLM", config.model_type = "qwen3";
  config.hidden_size = 16, config.num_layers = 1, config.num_heads = 2, config.num_kv_heads = 1;
  config.head_dim = 8, config.intermediate_size = 16, config.vocab_size = 8;
  config.max_position_embeddings = 128, config.rope.rotary_dim = 8;
  config.layer_kinds.assign(1, LayerKind::full_attention);
  return config;
}

constexpr std::string_view kTokenizer = R"({"version": "1.0", "added_tokens": [], "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "c": 2, "<think>": 3, "</think>": 4, "ab": 5}, "merges": [["a", "b"]]}})";
constexpr std::string_view kTemplate = "{% for m in messages %}{{ m.content }}{% endfor %}";

server::ServedModel served() {
  const auto write = [](const char* name, std::string_view text) {
    return fuzz::folder().write(name, reinterpret_cast<const uint8_t*>(text.data()), text.size());
  };
  server::ServedModel model{.name = "m", .tokenizer = Tokenizer::load(write("tokenizer.json", kTokenizer))};
  model.chat_template = ChatTemplate::load(fuzz::folder().path(), write("chat.jinja", kTemplate));
  model.vocab_size = 8, model.max_tokens = 128;
  model.attention_words = {"dense", "streaming"};
  model.reasoning = model.tool_calls = true;
  return model;
}

// Lives as long as the process.
struct Server {
  Backbone backbone = Backbone::random(small_model(), at::kCPU, at::kFloat, 1);
  AttentionStack stack{backbone, nullptr, {parse_method("dense", {}, nullptr)}, {.num_pages = 64}};
  server::ServedModel model = served();
  Engine engine{backbone, stack, {.max_sequences = 8, .max_tokens = 128, .tokenizer = &model.tokenizer}};
  server::Metrics metrics{"m", kBlockSize, 64, "auto", true};
  server::EngineLoop loop{engine, stack, metrics};
  server::BoundAddress address{"127.0.0.1", 0};
  server::HttpServer http{
      {.api_key = "k", .max_body_bytes = 1 << 16, .max_answers = 16}, address, model, loop, metrics};

  Server() {
    std::thread([this] { http.run(); }).detach();
    std::thread([this] {
      loop.run([this](std::vector<server::EngineUpdate> updates) { http.deliver(std::move(updates)); });
    }).detach();
  }
};

int connect_to(int port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET, address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd < 0 || ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) std::abort();
  const timeval patience{.tv_sec = 0, .tv_usec = 200000};
  ::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  return fd;
}

// What comes until nothing has for `quiet` milliseconds, or the server closes.
std::string read_all(int fd, int quiet) {
  std::string all;
  char bytes[4096];
  for (pollfd wait{.fd = fd, .events = POLLIN}; ::poll(&wait, 1, quiet) > 0;) {
    const ssize_t count = ::recv(fd, bytes, sizeof bytes, 0);
    if (count <= 0) break;
    all.append(bytes, static_cast<size_t>(count));
  }
  return all;
}

}  // namespace
}  // namespace spot

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static spot::Server* server = new spot::Server;
  const int fd = spot::connect_to(server->address.port());
  for (const uint8_t *at = data, *end = data + size; at < end;) {
    const uint8_t* cut = std::find(at, end, uint8_t{0xFF});
    if (cut > at && ::send(fd, at, static_cast<size_t>(cut - at), MSG_NOSIGNAL) < 0) break;
    at = cut == end ? end : cut + 1;
    if (at < end) spot::read_all(fd, 1);
  }
  spot::read_all(fd, 5);
  ::close(fd);
  static int64_t count = 0;
  if (++count % 64 == 0) {
    const int other = spot::connect_to(server->address.port());
    constexpr std::string_view kAsk = "GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    ::send(other, kAsk.data(), kAsk.size(), MSG_NOSIGNAL);
    if (spot::read_all(other, 10000).find("200 OK") == std::string::npos) std::abort();
    ::close(other);
  }
  return 0;
}
