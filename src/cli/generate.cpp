// spot generate: continue a prompt, densely or sparsely, streaming to the terminal.
#include <fmt/format.h>

#include <cstdio>
#include <memory>

#include "cli/chat_options.h"
#include "cli/commands.h"
#include "cli/options.h"
#include "core/error.h"
#include "core/files.h"
#include "engine/generator.h"
#include "report/page.h"
#include "text/stream_decoder.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

struct Options {
  ModelOptions model;
  SelectorOptions selector;
  RuleOptions rule;
  GenerateOptions generate;
  std::string prompt, prompt_file, attention = "auto", system;
  ChatOptions chat;
  bool thinking = false, ignore_eos = false, sparse_prefill = false, by_layer = false;
};

void run(const Options& options) {
  const Backbone backbone = options.model.load();
  const std::optional<Selector> selector = options.selector.load(options.model, backbone);
  const Tokenizer tokenizer = Tokenizer::load(options.model.folder);
  std::string text = options.prompt_file.empty() ? options.prompt : read_file(options.prompt_file);
  if (options.chat.chat) {
    std::vector<ChatMessage> messages;
    if (!options.system.empty()) messages.push_back({"system", options.system});
    messages.push_back({"user", text});
    ChatPrompt prompt = ChatPrompt::of(messages);
    prompt.variables["enable_thinking"] = options.thinking;
    text = options.chat.load(options.model.folder).render(prompt);
  }
  const std::vector<int32_t> prompt = tokenizer.encode(text, /*add_special_tokens=*/!options.chat.chat);

  const AttentionKind kind = options.attention == "auto"
                                 ? (selector ? AttentionKind::spot : AttentionKind::dense)
                                 : attention_kind_from_string(options.attention);
  AttentionSpec spec = options.rule.spec(kind, selector ? &*selector : nullptr);
  if (options.sparse_prefill) spec.sparse.prefill = PrefillMode::sparse, spec.sparse.query_tile = 16;
  GenerateOptions generation = options.generate;
  if (!options.ignore_eos) generation.stop_ids = backbone.config().eos_token_ids;
  const auto total = static_cast<int64_t>(prompt.size()) + generation.max_new_tokens;
  AttentionRun attention(spec, backbone, selector ? &*selector : nullptr, total);

  StreamDecoder decoder(tokenizer, /*skip_special_tokens=*/true);
  auto print = [](const std::string& piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
  };
  const GenerateResult result =
      generate(backbone, attention.backend(), attention.cache(), {prompt}, generation,
               [&](int64_t, int32_t token) { print(decoder.push(token)); });
  print(decoder.finish() + "\n");

  auto rate = [](int64_t tokens, double seconds) {
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  fmt::print(
      stderr,
      "prompt {} tokens at {:.1f} tokens/s; generated {} tokens ({}), {:.1f} tokens/s in decode; attention {}",
      result.prompt_tokens, rate(result.prompt_tokens, result.prefill_seconds),
      result.sequences[0].tokens.size(),
      result.sequences[0].finish == FinishReason::stop ? "ended itself" : "length limit",
      rate(result.decode_tokens, result.decode_seconds), to_string(kind));
  if (!attention.sparse()) {
    fmt::print(stderr, "\n");
    return;
  }
  if (kind != AttentionKind::streaming) fmt::print(stderr, ", {}", describe(spec.rule));
  if (kind == AttentionKind::twilight) fmt::print(stderr, " pruned to {:g}", spec.rule.p);
  double attended = 0, visible = 0;
  Table table{{"layer", "tokens attended", "of visible"}, {}};
  for (const auto& [layer, c] : attention.sparse()->counters()) {
    attended += c.tokens_attended, visible += static_cast<double>(c.tokens_visible);
    table.rows.push_back(
        {fmt::format("{}", layer), fmt::format("{:.0f}", c.tokens_attended / static_cast<double>(c.rows)),
         fmt::format("{:.1f}%", 100 * c.tokens_attended / static_cast<double>(c.tokens_visible))});
  }
  if (visible > 0)
    fmt::print(stderr, "; attended {:.1f}% of the visible tokens (mean over sparse layers)",
               100 * attended / visible);
  fmt::print(stderr, "\n");
  if (options.by_layer) fmt::print(stderr, "{}", table.to_text());
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *app.add_subcommand("generate", "Continue a prompt, densely or sparsely");
  options->model.add(command);
  options->selector.add(command);
  options->rule.add(command);
  auto* text = command.add_option("--prompt", options->prompt, "The prompt");
  auto* file = command.add_option("--prompt-file", options->prompt_file, "A file that holds the prompt");
  text->excludes(file);
  command
      .add_option(
          "--attention", options->attention,
          "auto (spot with a selector, else dense), dense, spot, streaming, oracle, quest or twilight")
      ->capture_default_str();
  command.add_option("--max-new-tokens", options->generate.max_new_tokens, "Most tokens to generate")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--temperature", options->generate.sampling.temperature, "0: greedy")
      ->capture_default_str();
  command.add_option("--sampling-top-p", options->generate.sampling.top_p, "Nucleus of the sampler")
      ->capture_default_str();
  command
      .add_option("--sampling-top-k", options->generate.sampling.top_k, "Candidates of the sampler (0: all)")
      ->capture_default_str();
  command.add_option("--seed", options->generate.sampling.seed, "Seed of the sampler")->capture_default_str();
  command.add_option("--prefill-chunk", options->generate.prefill_chunk, "Prompt tokens a forward call")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  options->chat.add(command, "Wrap the prompt in the model's chat template");
  command.add_option("--system", options->system, "System message with --chat");
  command.add_flag("--thinking", options->thinking, "Let the chat template ask for thinking");
  command.add_flag("--ignore-eos", options->ignore_eos, "Go on past the end-of-sequence token");
  command.add_flag("--sparse-prefill", options->sparse_prefill,
                   "Select in prefill too, one block set per 16 queries");
  command.add_flag("--by-layer", options->by_layer, "Print the tokens attended in each layer");
  command.callback([options, &command] {
    if (!command.count("--prompt") && !command.count("--prompt-file"))
      fail("no prompt: give --prompt TEXT or --prompt-file FILE");
    run(*options);
  });
}

}  // namespace spot::cli
