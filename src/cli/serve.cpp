// spot serve: an HTTP server with the OpenAI API.
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <memory>
#include <thread>

#include "attention/decode_mass.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/files.h"
#include "core/notice.h"
#include "engine/engine.h"
#include "engine/self_check.h"
#include "server/engine_loop.h"
#include "server/http_server.h"
#include "server/metrics.h"

#ifdef SPOT_TORCH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#endif

namespace spot::cli {
namespace {

using server::ServedModel;

struct ServeOptions {
  ModelOptions model;
  SelectorOptions selector;
  MethodOptions method;
  KvCacheOptions kv_cache;
  server::HttpOptions http;
  EngineOptions engine{.max_sequences = 64};
  std::string host = "127.0.0.1";
  int port = 8000;
  std::string attention = "auto", name, chat_template, api_key_file, reasoning = "auto", tools = "auto";
  double cache_gib = 0;
  int64_t queue = 256, snapshots = 64, body_mib = 16, buffered_kib = 1024;
  bool no_prefix_cache = false, eager = false, random = false;
};

std::string api_key(const ServeOptions& options) {
  if (options.api_key_file.empty()) return options.http.api_key;
  std::string key = read_file(options.api_key_file);
  while (!key.empty() && (key.back() == '\n' || key.back() == '\r')) key.pop_back();
  if (key.empty()) fail("{}: holds no API key", options.api_key_file);
  // No header could hold it, so that every client would be refused.
  if (std::any_of(key.begin(), key.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }))
    fail("{}: must hold the API key alone, on one line and without control characters", options.api_key_file);
  return key;
}

// Whether answers have a tag of the family's: what the tokenizer has a token for.
bool has_tag(const std::string& choice, const Tokenizer& tokenizer, const char* tag) {
  return choice == "on" || (choice == "auto" && tokenizer.token_id(tag).has_value());
}

ServedModel served(const ServeOptions& options, const Backbone& backbone, const Selector* selector,
                   const std::vector<MethodSpec>& methods) {
  const std::string& folder = options.model.folder;
  std::filesystem::path path = std::filesystem::path(folder).lexically_normal();
  if (!path.has_filename()) path = path.parent_path();
  ServedModel model{.name = options.name.empty() ? path.filename().string() : options.name,
                    .tokenizer = Tokenizer::load(folder),
                    .chat_template = {},
                    .no_template = "",
                    .sampling = SamplingOptions::from_generation_config(folder),
                    .stop_ids = backbone.config().eos_token_ids,
                    .vocab_size = backbone.config().vocab_size,
                    .max_tokens = 0,
                    .created = std::time(nullptr),
                    .attention = methods.front().name,
                    .method_settings = options.method,
                    .selector = selector,
                    .attention_words = {"dense"}};
  for (const MethodSpec& method : methods) model.attention_words.insert(method.word);
  try {
    model.chat_template = options.chat_template.empty() ? ChatTemplate::load(folder)
                                                        : ChatTemplate::load(folder, options.chat_template);
  } catch (const Error& error) {
    if (!options.chat_template.empty()) throw;
    model.no_template = error.what();
  }
  model.reasoning = has_tag(options.reasoning, model.tokenizer, "<think>");
  model.tool_calls = has_tag(options.tools, model.tokenizer, "<tool_call>");
#ifdef SPOT_GRAMMAR
  const auto schemas = std::make_shared<SchemaCompiler>(model.tokenizer, model.vocab_size, model.stop_ids);
  model.compile_schema = [schemas](const server::Json& schema, const AnswerOpening& opening) {
    return schemas->compile(schema, opening);
  };
#endif
  return model;
}

// Bytes for the cache where none were given: on a GPU what is left of its memory but for an eighth of it, for passes
// and graphs; else 2 GiB.
double cache_bytes(const ServeOptions& options, const Backbone& backbone) {
  if (options.cache_gib > 0) return options.cache_gib * (1 << 30);
#ifdef SPOT_TORCH_CUDA
  if (backbone.device().is_cuda()) {
    const c10::cuda::CUDAGuard device(backbone.device());
    size_t free = 0, total = 0;
    c10::cuda::CUDACachingAllocator::emptyCache();
    C10_CUDA_CHECK(cudaMemGetInfo(&free, &total));
    return std::max(static_cast<double>(free) - static_cast<double>(total) / 8, 0.0);
  }
#endif
  return 2.0 * (1 << 30);
}

std::unique_ptr<AttentionStack> make_stack(const ServeOptions& options, const Backbone& backbone,
                                           const Selector* selector, const std::vector<MethodSpec>& methods,
                                           int64_t max_tokens) {
  const int64_t sequences = options.engine.max_sequences;
  const auto scales = kv_scales(options.kv_cache.dtype, backbone);
  const auto make = [&](int64_t pages, int64_t count, int64_t snapshots) {
    return std::make_unique<AttentionStack>(
        backbone, selector, methods,
        StackOptions{
            .num_pages = pages, .num_sequences = count, .num_snapshots = snapshots, .kv_scales = scales});
  };
  const auto probe = make(1, 1, 0);
  const double page_bytes = static_cast<double>(probe->cache().pools().page_bytes()),
               state_bytes = static_cast<double>(probe->cache().states().slot_bytes());
  const double room =
      cache_bytes(options, backbone) - state_bytes * static_cast<double>(sequences + options.snapshots + 1);
  // More than every sequence at its longest, and as much again for the prefix cache, is never used.
  const double most = 2.0 * static_cast<double>(sequences) * static_cast<double>(max_tokens / kBlockSize + 1);
  const auto pages = static_cast<int64_t>(std::min({room / page_bytes, most, 1e8}));
  if (pages < 2)
    fail("the cache has room for {} pages of {} bytes; give more with --cache-gib",
         std::max<int64_t>(pages, 0), page_bytes);
  return make(pages, sequences, options.snapshots);
}

// Each connection is a descriptor; a shell's usual limit is 1024 in all.
void raise_descriptor_limit(int64_t connections) {
  rlimit limit{};
  const auto wanted = static_cast<rlim_t>(connections + 128);
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = std::min(wanted, limit.rlim_max);
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

void run_serve(ServeOptions options, const CLI::App& command) {
  // Everything that is cheap to know comes before the weights.
  options.http.api_key = api_key(options);
  options.http.max_body_bytes = static_cast<uint64_t>(options.body_mib) << 20;
  options.http.max_buffered_bytes = static_cast<size_t>(options.buffered_kib) << 10;
  options.http.max_answers = options.engine.max_sequences + options.queue;

  const ModelConfig config = options.model.prepare();
  const std::optional<SelectorConfig> selector_config = options.selector.read_config(options.model, config);
  const SelectorConfig* rule = selector_config ? &*selector_config : nullptr;
  const std::string attention = options.attention == "auto" ? (rule ? "spot" : "dense") : options.attention;
  // Dense attention needs nothing of its own, and spot's keys must be there from the first token on.
  std::vector<MethodSpec> methods = {options.method.parse(attention, rule)};
  if (rule && methods[0].word != "spot") methods.push_back(options.method.parse("spot", rule));
  MethodOptions::check_read(command, methods);
  options.kv_cache.check(methods);
  server::BoundAddress address(options.host, options.port);

  const Backbone backbone = options.random ? Backbone::random(config, options.model.resolve_device(),
                                                              options.model.resolve_dtype(config), 1)
                                           : options.model.load();
  const std::optional<Selector> loaded = options.selector.load(options.model, backbone);
  const Selector* selector = loaded ? &*loaded : nullptr;
  ServedModel model = served(options, backbone, selector, methods);

  EngineOptions engine_options = options.engine;
  const int64_t positions = backbone.config().max_position_embeddings;
  if (engine_options.max_tokens == 0) engine_options.max_tokens = positions;
  const auto stack = make_stack(options, backbone, selector, methods, engine_options.max_tokens);
  model.max_tokens = std::min(engine_options.max_tokens, stack->cache().num_pages() * kBlockSize);
  server::Metrics metrics(model.name, kBlockSize, stack->cache().num_pages(),
                          to_string(options.kv_cache.dtype), !options.no_prefix_cache);
  engine_options.prefix_cache = !options.no_prefix_cache;
  engine_options.graphs = !options.eager;
  engine_options.tokenizer = &model.tokenizer;
  const bool foreign = selector && !selector->made_for(backbone.fingerprint());
  if (foreign && engine_options.observe_every == 0) engine_options.observe_every = kForeignCheckEvery;
  SelfCheck check;
  engine_options.observer = [&](const SelectionEvent& event, int64_t row, int64_t, int64_t) {
    const bool selected = attention_method(event.policy.name()).needs_selector;
    metrics.captured_mass.add(selected ? check.add(event, row) : captured_by_row(event, row));
    metrics.captured_mass_queries.add();
    if (!foreign || !selected) return;
    if (const std::string text = check.warning("spot"); !text.empty()) notice("warning: {}\n", text);
  };
  Engine engine(backbone, *stack, engine_options);
  engine.capture(0, engine_options.max_sequences);

  raise_descriptor_limit(options.http.max_connections);
  server::EngineLoop loop(engine, *stack, metrics);
  server::HttpServer http(options.http, address, model, loop, metrics);
  const std::string host =
      options.host.find(':') == std::string::npos ? options.host : "[" + options.host + "]";
  fmt::print("serving {} ({}) on http://{}:{}\n", model.name, attention, host, address.port());
  std::fflush(stdout);
  notice("cache of {} tokens ({:.2f} GiB), {} tokens a request at most, {} answers at once\n",
         stack->cache().num_pages() * kBlockSize, static_cast<double>(stack->cache().bytes()) / (1 << 30),
         model.max_tokens, engine_options.max_sequences);
  // The engine has this thread, in which the model was loaded: devices are a thread's own.
  std::thread sockets([&] { http.run(); });
  const bool healthy =
      loop.run([&](std::vector<server::EngineUpdate> updates) { http.deliver(std::move(updates)); });
  if (!healthy) http.end("the engine has failed");
  sockets.join();
  if (!healthy) fail("the engine failed three times on end; what was wrong stands above");
}

}  // namespace

void add_serve(CLI::App& app) {
  auto options = std::make_shared<ServeOptions>();
  CLI::App& command = *app.add_subcommand("serve", "Serve a model over HTTP, with the OpenAI API");
  options->model.add(command, "--model,MODEL");
  options->selector.add(command);
  options->method.add(command);
  options->method.add_prefill(command);
  options->kv_cache.add(command);
  command
      .add_option("--attention", options->attention,
                  "Of requests that name none: auto (spot with a selector, else dense), " +
                      attention_words() + ", with settings of its own if wanted (" + method_grammar() + ")")
      ->capture_default_str();
  command.add_option("--host", options->host, "Address to listen on")->capture_default_str();
  command.add_option("--port", options->port, "0: any free one")
      ->check(CLI::Range(0, 65535))
      ->capture_default_str();
  command.add_option("--served-model-name", options->name,
                     "What requests call the model (its folder's name)");
  command.add_option("--api-key", options->http.api_key, "Asked of every request under /v1")
      ->envname("SPOT_API_KEY");
  command.add_option("--api-key-file", options->api_key_file, "A file that holds it");
  command.add_option("--chat-template", options->chat_template,
                     "A Jinja file to use in place of the model's chat template");
  command.add_option("--reasoning", options->reasoning, "Split <think> blocks off: auto, on or off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command.add_option("--tool-calls", options->tools, "Split <tool_call> blocks off: auto, on or off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command
      .add_option("--max-tokens", options->engine.max_tokens,
                  "Of a prompt and its answer (0: the model's positions)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--max-sequences", options->engine.max_sequences, "Answers in progress at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command
      .add_option("--max-step-tokens", options->engine.max_step_tokens,
                  "Tokens of one step, prompts and answers")
      ->check(CLI::Range(17, 1 << 24))
      ->capture_default_str();
  command
      .add_option("--cache-gib", options->cache_gib,
                  "For keys, values and selector keys (0: 2 on a CPU, on a GPU most of what is free)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--snapshots", options->snapshots, "Recurrent states kept for the prefix cache (hybrids)")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_flag("--no-prefix-cache", options->no_prefix_cache, "Read every prompt from its first token");
  command.add_option("--max-queue", options->queue, "Answers that may wait; more are refused with 429")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command.add_option("--max-connections", options->http.max_connections, "More are refused with 503")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      .add_option("--max-body-mib", options->body_mib,
                  "Of a request's body; larger ones are refused with 413")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      .add_option("--max-buffered-kib", options->buffered_kib,
                  "Of a stream that its client does not read; then it is dropped")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      .add_option("--drain-seconds", options->http.drain_seconds,
                  "For answers in progress after SIGTERM or SIGINT")
      ->check(CLI::Range(0, 86400))
      ->capture_default_str();
  command
      .add_option("--observe-every", options->engine.observe_every,
                  "Measure the captured mass every N tokens of an answer (0: never); slows those steps")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_flag("--eager", options->eager, "No CUDA graphs");
  command.add_flag(
      "--random", options->random,
      "Random weights of the shapes in MODEL/config.json, beside a tokenizer.json: for measurements");
  command.callback([options, &command] { run_serve(*options, command); });
}

}  // namespace spot::cli
