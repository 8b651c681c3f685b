// spot eval ruler: the thirteen RULER tasks, and a needle depth sweep, under dense and sparse attention.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cli/chat_options.h"
#include "cli/commands.h"
#include "cli/eval_options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "eval/ruler_eval.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

struct EvalRulerOptions : EvalOptions {
  RulerEvalOptions eval;
  std::vector<std::string> tasks = {"all"};
  std::string prompts_file;
  ChatOptions chat;
  bool whole_answers = false;
};

// "all", "niah" (the eight needle tasks) and names of tasks, each task once.
std::vector<RulerTask> parse_tasks(const std::vector<std::string>& words) {
  std::vector<RulerTask> tasks;
  auto add = [&](RulerTask task) {
    if (std::find(tasks.begin(), tasks.end(), task) == tasks.end()) tasks.push_back(task);
  };
  for (const std::string& word : words) {
    if (word != "all" && word != "niah") {
      add(ruler_task_from_string(word));
      continue;
    }
    for (RulerTask task : all_ruler_tasks())
      if (word == "all" || to_string(task).rfind("niah_", 0) == 0) add(task);
  }
  return tasks;
}

// What the model's chat template puts around a user's message.
void wrap_in_chat(const std::string& model_folder, const ChatOptions& chat, RulerOptions& prompts) {
  const std::string mark = "THE TASK";
  ChatPrompt prompt = ChatPrompt::of({{"user", mark}});
  prompt.variables["enable_thinking"] = false;
  const std::string text = chat.load(model_folder).render(prompt);
  const size_t at = text.find(mark);
  if (at == std::string::npos)
    fail("{}: its chat template does not show the user's message; leave out --chat", model_folder);
  prompts.before = text.substr(0, at), prompts.after = text.substr(at + mark.size());
}

nlohmann::json prompt_json(const RulerSample& sample, int64_t length, int64_t index) {
  nlohmann::json json = {{"task", to_string(sample.task)},
                         {"length", length},
                         {"index", index},
                         {"context", sample.context},
                         {"question", sample.question},
                         {"answer_prefix", sample.answer_prefix},
                         {"references", sample.references},
                         {"prompt_tokens", sample.prompt_tokens},
                         {"max_new_tokens", sample.max_new_tokens}};
  if (!std::isnan(sample.depth)) json["depth"] = sample.depth;
  return json;
}

// One JSON object a line, for other programs.
void write_prompts(const EvalRulerOptions& options, const TextCodec& codec, const std::string& essay) {
  const RulerGenerator generator(options.eval.prompts, essay, [&](const std::string& text, bool first) {
    return static_cast<int64_t>(codec.encode(text, first).size());
  });
  std::vector<double> depths = options.eval.depths;
  if (depths.empty()) depths.push_back(std::numeric_limits<double>::quiet_NaN());
  write_file_atomically(options.prompts_file, [&](std::ostream& out) {
    for (RulerTask task : options.eval.tasks)
      for (int64_t length : options.eval.lengths)
        for (double depth : depths)
          for (int64_t i = options.eval.first_sample; i < options.eval.first_sample + options.eval.samples;
               ++i)
            out << prompt_json(generator.make(task, length, i, depth), length, i).dump() << "\n";
  });
  fmt::print("prompts: {}\n", options.prompts_file);
}

void run_eval_ruler(EvalRulerOptions options, const CLI::App& command) {
  options.eval.tasks = parse_tasks(options.tasks);
  options.eval.stop_when_answered = !options.whole_answers;
  options.eval.out = options.out;
  options.eval.kv_cache = options.kv_cache.dtype;
  const ModelConfig config = options.model.prepare();
  std::vector<MethodSpec> methods;
  std::set<Need> met;
  if (options.prompts_file.empty()) {
    methods = options.checked_methods(command, config, true);
    met.insert(Need::answers);
  } else {
    MethodOptions::check_read(command, {});
  }
  if (methods.size() > 1) met.insert(Need::sparse);
  for (RulerTask task : options.eval.tasks)
    if (to_string(task).starts_with("niah_")) met.insert(Need::needles);
  check_needs(command, met);
  if (options.chat.chat) wrap_in_chat(options.model.folder, options.chat, options.eval.prompts);
  const TextCodec codec = codec_of(Tokenizer::load(options.model.folder), !options.chat.chat);
  const std::string essay = options.read_text();
  if (!options.prompts_file.empty()) return write_prompts(options, codec, essay);
  check_ruler(config, codec, essay, methods, options.eval);
  const FolderLock lock = prepare_output(options.out, "spot eval ruler");
  const Backbone backbone = options.model.load();
  const std::optional<Selector> selector = options.selector.load(options.model, backbone);
  const RulerResult result =
      evaluate_ruler(backbone, selector ? &*selector : nullptr, codec, essay, methods, options.eval);
  if (result.reused > 0)
    fmt::print("{} of {} prompts stand in {}/ruler.jsonl already and were not run again\n", result.reused,
               result.records.size(), options.out);
  fmt::print("{}\n", result.measures().to_text());
  deliver(result, "spot eval ruler", options.out);
  judge_captured(backbone, selector, methods, [&](size_t i) { return result.captured_mass(i); });
}

}  // namespace

void add_eval_ruler(CLI::App& parent) {
  auto options = std::make_shared<EvalRulerOptions>();
  CLI::App& command = *parent.add_subcommand(
      "ruler",
      "The RULER tasks at any length, every method after the same dense prefill (or its own sparse "
      "one: --prefill, or METHOD:RULE,prefill=sparse); with --out, a run that was interrupted goes on where it stopped");
  options->add(command)->description(
      "Text files that the essay tasks hide their needles in (niah_single_2 and _3, "
      "niah_multikey_1, niah_multivalue, niah_multiquery)");
  RulerEvalOptions& eval = options->eval;
  command
      .add_option("--tasks", options->tasks,
                  "Comma-separated tasks: all, niah, or names such as niah_single_1, vt, cwe, fwe, qa_1")
      ->delimiter(',')
      ->capture_default_str();
  command
      .add_option("--lengths", eval.lengths, "Comma-separated lengths in tokens, prompt and answer together")
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option("--samples", eval.samples, "Prompts for each task, length and depth")
      ->check(CLI::Range(int64_t{1}, kMostSamples))
      ->capture_default_str();
  command
      .add_option("--first-sample", eval.first_sample,
                  "Number of the first prompt, to share out a longer list among several runs")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 53))
      ->capture_default_str();
  command
      .add_option("--depths", eval.depths,
                  "Depth sweep: comma-separated shares of the haystack before the one needle, such as "
                  "0,0.25,0.5,0.75,1")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0));
  command.add_option("--seed", eval.prompts.seed, "Seed of the prompts")->capture_default_str();
  command
      .add_option("--prompt-version", eval.prompts.version,
                  "2: RULER's words; 1: the fewer words of earlier tables, and a hint in vt")
      ->check(CLI::Range(1, kRulerVersion))
      ->capture_default_str();
  command.add_option("--wording", eval.prompts.wording, "Wording of needles and their question")
      ->check(CLI::Range(0, kRulerWordings - 1))
      ->capture_default_str();
  options->chat.add(command, "Wrap each task in the model's chat template");
  command.add_flag("--stop-at-newline", eval.stop_at_newline, "End an answer with its first line");
  command.add_flag("--whole-answers", options->whole_answers,
                   "Do not end an answer once every reference is in it");
  command
      .add_option("--mass-every", eval.mass_every,
                  "Decode steps from one measurement of captured mass to the next (0: none)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option("--prefill-chunk", eval.prefill_chunk,
                  "Prompt tokens a forward call (0: 32,768 on a GPU, 1,024 on a CPU)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--batch", eval.batch, "Prompts at once; more need more memory for keys and values")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command
      .add_option("--write-prompts", options->prompts_file,
                  "Write the prompts to this file, one JSON object a line, and run nothing")
      ->check(output_file());
  command.callback([options, &command] { run_eval_ruler(*options, command); });
}

}  // namespace spot::cli
