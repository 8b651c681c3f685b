// spot generate: continue prompts, densely or sparsely, streaming to the terminal.
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <memory>

#include "cli/chat_options.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/notice.h"
#include "core/progress.h"
#include "core/text_file.h"
#include "engine/engine.h"
#include "engine/self_check.h"
#include "report/page.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

struct GenerateOptions {
  ModelOptions model;
  SelectorOptions selector;
  MethodOptions method;
  KvCacheOptions kv_cache;
  SamplingFlags sampling;
  Request request;
  int64_t prefill_chunk = 2048;
  std::string prompt, prompt_file, attention = "auto", system;
  std::vector<std::string> stop;
  int64_t logprobs = -1;
  ChatOptions chat;
  bool thinking = false, ignore_eos = false, by_layer = false, eager = false;
};

std::vector<int32_t> read_prompt(const GenerateOptions& options, const Tokenizer& tokenizer) {
  std::string text = options.prompt_file.empty() ? options.prompt : read_text_file(options.prompt_file);
  if (text.empty() && !options.chat.chat) throw UsageError("the prompt is empty; give some text");
  if (options.chat.chat) {
    std::vector<ChatMessage> messages;
    if (!options.system.empty()) messages.push_back({"system", options.system});
    messages.push_back({"user", text});
    ChatPrompt prompt = ChatPrompt::of(messages);
    prompt.variables["enable_thinking"] = options.thinking;
    text = options.chat.load(options.model.folder).render(prompt);
  }
  return tokenizer.encode(text, /*add_special_tokens=*/!options.chat.chat);
}

void print_logprobs(const Tokenizer& tokenizer, const GeneratedAnswer& answer) {
  const auto shown = [&](int32_t token) {
    return nlohmann::json(tokenizer.decode(std::vector<int32_t>{token}))
        .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  };
  for (const SampledToken& token : answer.sampled) {
    notice("{} {:.4f}", shown(token.token), token.logprob);
    for (const TokenLogprob& other : token.top) notice("  {} {:.4f}", shown(other.token), other.logprob);
    notice("\n");
  }
}

void print_attended(const std::vector<AttendedTokens>& layers, bool by_layer) {
  double attended = 0, visible = 0;
  Table table{{"layer", "tokens attended", "of visible"}, {}};
  for (const AttendedTokens& layer : layers) {
    attended += layer.attended, visible += layer.visible;
    table.rows.push_back({fmt::format("{}", layer.layer),
                          fmt::format("{:.0f}", layer.attended / layer.queries),
                          fmt::format("{:.1f}%", 100 * layer.attended / layer.visible)});
  }
  if (visible > 0)
    notice("; attended {:.1f}% of the visible tokens (mean over sparse layers)", 100 * attended / visible);
  notice("\n");
  if (by_layer) notice("{}", table.to_text());
}

void run_generate(const GenerateOptions& options, const CLI::App& command) {
  // Everything that is cheap to know comes before the weights.
  const ModelConfig config = options.model.prepare();
  const std::optional<SelectorConfig> selector_config = options.selector.read_config(options.model, config);
  const std::string attention =
      options.attention == "auto" ? (selector_config ? "spot" : "dense") : options.attention;
  const MethodSpec method = options.method.parse(attention, selector_config ? &*selector_config : nullptr);
  Request request = options.request;
  request.sampling = options.sampling.resolve(options.model.folder);
  request.sampling.logprobs = options.logprobs;
  request.sampling.check(config.vocab_size);
  std::set<Need> met;
  if (options.chat.chat) met.insert(Need::chat);
  if (!method.is_dense()) met.insert(Need::sparse);
  if (request.sampling.temperature > 0) met.insert(Need::sampling);
  check_needs(command, met);
  MethodOptions::check_read(command, {method});
  options.kv_cache.check({method});
  const Tokenizer tokenizer = Tokenizer::load(options.model.folder);
  request.prompt = read_prompt(options, tokenizer);
  request.stop_strings = options.stop;
  if (!options.ignore_eos) request.stop_ids = config.eos_token_ids;
  check_request(request, config);

  const Backbone backbone = options.model.load();
  const std::optional<Selector> loaded = options.selector.load(options.model, backbone);
  const Selector* selector = loaded ? &*loaded : nullptr;
  const int64_t answers = request.completions,
                total = static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens;
  AttentionStack stack(backbone, selector, {method},
                       {.num_pages = answers * (total / kBlockSize + 1),
                        .num_sequences = answers,
                        .num_snapshots = 1,
                        .kv_scales = kv_scales(options.kv_cache.dtype, backbone)});
  EngineOptions engine_options{.max_step_tokens = options.prefill_chunk + answers,
                               .max_sequences = answers,
                               .max_tokens = std::min(total, backbone.config().max_position_embeddings),
                               .graphs = !options.eager,
                               .tokenizer = &tokenizer};
  SelfCheck check;
  const bool foreign = selector && !selector->made_for(backbone.fingerprint());
  if (foreign) engine_options.observe_every = kForeignCheckEvery;
  engine_options.observer = [&](const SelectionEvent& event, int64_t row, int64_t, int64_t) {
    check.add(event, row);
  };
  Engine engine(backbone, stack, engine_options);
  engine.capture(0, answers);

  std::vector<AttendedTokens> attended;
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  std::optional<Progress> progress(std::in_place, "prefill", prompt);
  const auto on_event = [&](const Event& event) {
    progress.reset();
    if (event.completion == 0 && event.finish) attended = event.attended;
    if (answers > 1) return;
    std::fwrite(event.text.data(), 1, event.text.size(), stdout);
    if (std::fflush(stdout) != 0) fail("standard output could not be written; is its disk full?");
  };
  const auto whole = generate(engine, {request}, on_event, [&] {
    if (progress) progress->update(std::min(engine.statistics().read_tokens, prompt));
  })[0];
  for (size_t i = 0; answers > 1 && i < whole.size(); ++i) fmt::print("[{}]\n{}\n", i + 1, whole[i].text);
  if (answers == 1) fmt::print("\n");
  if (options.logprobs >= 0)
    for (const GeneratedAnswer& answer : whole) print_logprobs(tokenizer, answer);

  const auto rate = [](int64_t tokens, double seconds) {
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  const EngineStatistics done = engine.statistics();
  notice(
      "prompt {} tokens at {:.1f} tokens/s; generated {} tokens ({}), {:.1f} tokens/s in decode; attention {}",
      request.prompt.size(), rate(done.prompt_tokens - done.cached_tokens, done.prefill_seconds),
      whole[0].tokens.size(), whole[0].finish == FinishReason::stop ? "ended itself" : "length limit",
      rate(done.decode_tokens, done.decode_seconds), method.name);
  if (method.is_dense()) {
    notice("\n");
    return;
  }
  if (!method.describe().empty()) notice(", {}", method.describe());
  print_attended(attended, options.by_layer);
  if (!foreign) return;
  notice("self-check: {}\n", check.describe());
  if (const std::string text = low_mass(method.name, check.mean()); !text.empty())
    notice("warning: {}\n", text);
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App& command = *app.add_subcommand("generate", "Continue a prompt, densely or sparsely");
  options->model.add(command);
  options->selector.add(command);
  options->method.add(command);
  options->method.add_prefill(command);
  options->kv_cache.add(command);
  auto* text = command.add_option("--prompt", options->prompt, "The prompt");
  auto* file = command.add_option("--prompt-file", options->prompt_file, "A file that holds the prompt");
  text->excludes(file);
  command
      .add_option("--attention", options->attention,
                  "auto (spot with a selector, else dense), " + attention_words() +
                      ", with settings of its own if wanted: spot:p=0.9,dense=2 (" + method_grammar() + ")")
      ->capture_default_str();
  command.add_option("--max-new-tokens", options->request.max_new_tokens, "Most tokens to generate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--completions", options->request.completions, "Answers, each with the next seed")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  options->sampling.add(command);
  command.add_option("--stop", options->stop, "A text that ends the answer and is no part of it");
  command.add_option("--logprobs", options->logprobs,
                     "Print each token's log-probability and those of the N likeliest tokens");
  command.add_option("--prefill-chunk", options->prefill_chunk, "Prompt tokens a forward call")
      ->check(CLI::Range(16, 1 << 24))
      ->capture_default_str();
  options->chat.add(command, "Wrap the prompt in the model's chat template");
  command.add_option("--system", options->system, "System message with --chat");
  command.add_flag("--thinking", options->thinking, "Let the chat template ask for thinking");
  command.add_flag("--ignore-eos", options->ignore_eos, "Go on past the end-of-sequence token");
  command.add_flag("--by-layer", options->by_layer, "Print the tokens attended in each layer");
  command.add_flag("--eager", options->eager, "No CUDA graphs");
  command.callback([options, &command] {
    if (!command.count("--prompt") && !command.count("--prompt-file"))
      throw UsageError("no prompt: give --prompt TEXT or --prompt-file FILE");
    run_generate(*options, command);
  });
}

}  // namespace spot::cli
