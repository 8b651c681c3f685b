#include "eval/ruler_eval.h"

#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <tuple>

#include "attention/decode_mass.h"
#include "core/error.h"
#include "core/progress.h"
#include "engine/engine.h"
#include "eval/ruler_log.h"
#include "eval/ruler_random.h"
#include "ops/words.h"

namespace spot {
namespace {

// One prompt to be run. Its name in the log leaves out what all prompts of a run share.
struct Job {
  RulerTask task;
  int64_t length, sample;
  double depth;  // NaN without a sweep

  std::tuple<std::string, int64_t, int64_t, double> name() const {
    return {to_string(task), length, sample, std::isnan(depth) ? -1.0 : depth};
  }
};

std::vector<Job> list_jobs(const RulerEvalOptions& options) {
  std::vector<double> depths = options.depths;
  if (depths.empty()) depths.push_back(std::numeric_limits<double>::quiet_NaN());
  std::vector<Job> jobs;
  for (RulerTask task : options.tasks)
    for (int64_t length : options.lengths)
      for (double depth : depths)
        for (int64_t sample = options.first_sample; sample < options.first_sample + options.samples; ++sample)
          jobs.push_back({task, length, sample, depth});
  return jobs;
}

// A prompt and its tokens, of which the first `context` are its context's.
struct MadePrompt {
  RulerSample sample;
  std::vector<int32_t> tokens;
  int64_t context = 0;
};

MadePrompt make_prompt(const RulerGenerator& generator, const TextCodec& codec, const Job& job) {
  MadePrompt made{.sample = generator.make(job.task, job.length, job.sample, job.depth)};
  made.tokens = codec.encode(made.sample.context, true);
  made.context = static_cast<int64_t>(made.tokens.size());
  for (int32_t token : codec.encode(made.sample.question + made.sample.answer_prefix, false))
    made.tokens.push_back(token);
  return made;
}

// A prompt that is being answered.
struct Running {
  Job job;
  RulerSample sample;
  std::vector<RulerOutcome> outcomes;         // by method
  std::vector<std::vector<int32_t>> written;  // likewise
  size_t answers_left = 0;
};

// The prompts of a run through one engine, several at a time: each is one request a method. The requests of a prompt
// share the pages of its context where they read it alike.
class PromptRunner {
 public:
  PromptRunner(const Backbone& backbone, const Selector* selector, const TextCodec& codec,
               const std::vector<MethodSpec>& methods, const RulerEvalOptions& options)
      : codec_(codec),
        options_(options),
        num_methods_(static_cast<int64_t>(methods.size())),
        stack_(backbone, selector, methods, stack_options(backbone, methods, options)),
        engine_(backbone, stack_, engine_options(options, backbone.device())) {}

  void start(const Job& job, MadePrompt prompt) {
    const int64_t id = next_prompt_++;
    Running& running = running_[id];
    running = {job, std::move(prompt.sample), {}, {}, static_cast<size_t>(num_methods_)};
    running.outcomes.resize(running.answers_left), running.written.resize(running.answers_left);
    Request request;
    request.prompt = std::move(prompt.tokens);
    request.context = prompt.context;
    request.max_new_tokens = running.sample.max_new_tokens;
    request.stop_ids.assign(codec_.stop_ids.begin(), codec_.stop_ids.end());
    for (request.method = 0; request.method < num_methods_; ++request.method)
      asked_[engine_.add(request)] = {id, request.method};
  }
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t read_tokens() const { return engine_.statistics().read_tokens; }

  // One step; the prompts that all methods have answered now.
  std::vector<Running> step() {
    std::vector<Running> finished;
    for (const Event& event : engine_.step()) {
      const auto asked = asked_.find(event.request);
      if (asked == asked_.end()) continue;
      const auto [id, method] = asked->second;
      Running& running = running_.at(id);
      if (event.finish == FinishReason::error)
        fail("{} at {} tokens, prompt {}: {}", to_string(running.job.task), running.job.length,
             running.job.sample, event.error);
      if (event.token) running.written[static_cast<size_t>(method)].push_back(event.token->token);
      RulerOutcome& outcome = running.outcomes[static_cast<size_t>(method)];
      const bool ended = event.token && ends(running, method);
      if (!event.finish && !ended) continue;
      // Read before the request is gone.
      for (const AttendedTokens& layer : event.finish ? event.attended : engine_.attended(event.request)) {
        outcome.attended += layer.attended;
        outcome.visible += layer.visible;
        outcome.rows += static_cast<int64_t>(layer.queries);
      }
      outcome.answer_tokens = static_cast<int64_t>(running.written[static_cast<size_t>(method)].size());
      outcome.score = ruler_score(running.sample.task, outcome.output, running.sample.references);
      engine_.cancel(event.request);
      asked_.erase(asked);
      if (--running.answers_left == 0) {
        finished.push_back(std::move(running));
        running_.erase(id);
      }
    }
    return finished;
  }

 private:
  // Whether the answer, with its newest token, is over before its time.
  bool ends(Running& running, int64_t method) const {
    RulerOutcome& outcome = running.outcomes[static_cast<size_t>(method)];
    outcome.output = codec_.decode(running.written[static_cast<size_t>(method)]);
    if (options_.stop_when_answered &&
        ruler_score(running.sample.task, outcome.output, running.sample.references) == 1)
      return true;
    const size_t text = outcome.output.find_first_not_of(" \n\t\r");
    return options_.stop_at_newline && text != std::string::npos &&
           outcome.output.find('\n', text) != std::string::npos;
  }

  // Room for `batch` prompts: a context for all methods that read it densely and one for each that does not, and
  // question and answer of each. Requests wait where that is too little.
  static StackOptions stack_options(const Backbone& backbone, const std::vector<MethodSpec>& methods,
                                    const RulerEvalOptions& options) {
    constexpr int64_t kTail = 512;
    const int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
    int64_t contexts = 0, shared = 0;
    for (const MethodSpec& method : methods) (method.has_sparse_prefill() ? contexts : shared) += 1;
    const auto pages = [](int64_t tokens) { return tokens / kBlockSize + 2; };
    const int64_t prompt =
        (contexts + (shared > 0)) * pages(longest) + std::max<int64_t>(shared - 1, 0) * pages(kTail);
    return {.num_pages = options.batch * prompt,
            .num_sequences = options.batch * static_cast<int64_t>(methods.size()),
            .num_snapshots = 4 * options.batch,
            .kv_scales = kv_scales(options.kv_cache, backbone)};
  }

  EngineOptions engine_options(const RulerEvalOptions& options, const at::Device& device) {
    const int64_t sequences = options.batch * num_methods_;
    const int64_t chunk = options.prefill_chunk > 0 ? options.prefill_chunk : device.is_cuda() ? 32768 : 1024;
    EngineOptions made{.max_step_tokens = std::max(chunk, kBlockSize) + sequences,
                       .max_sequences = sequences,
                       .max_tokens = *std::max_element(options.lengths.begin(), options.lengths.end()),
                       .observe_every = options.mass_every};
    made.observer = [this](const SelectionEvent& event, int64_t row, int64_t request, int64_t) {
      const auto [id, method] = asked_.at(request);
      RulerOutcome& outcome = running_.at(id).outcomes[static_cast<size_t>(method)];
      outcome.captured += captured_by_row(event, row);
      outcome.measured += 1;
    };
    return made;
  }

  const TextCodec& codec_;
  const RulerEvalOptions& options_;
  int64_t num_methods_;
  AttentionStack stack_;
  std::map<int64_t, Running> running_;                    // by our number
  std::map<int64_t, std::pair<int64_t, int64_t>> asked_;  // the engine's requests: our number, method
  int64_t next_prompt_ = 0;
  Engine engine_;
};

nlohmann::json method_settings(const MethodSpec& method, at::Device device) {
  nlohmann::json json = {{"name", method.name}, {"kind", method.word}};
  if (method.is_dense()) return json;
  const SelectionRule& rule = method.rule;
  json["rule"] = {{"mode", ops::word_of(rule.mode)},
                  {"budget", rule.budget},
                  {"budget_fraction", rule.budget_fraction},
                  {"p", rule.p},
                  {"threshold", rule.threshold},
                  {"sinks", rule.sinks},
                  {"recency", rule.recency},
                  {"floor", rule.floor},
                  {"cap", rule.cap},
                  {"temperature", rule.temperature}};
  json["dense_layers"] = method.dense_layers;
  if (method.has_sparse_prefill()) {
    json["sparse_prefill"] = {
        {"query_tile", method.query_tile > 0 ? method.query_tile : default_query_tile(device)}};
    if (method.prefill == PrefillMode::automatic) json["sparse_prefill"]["from"] = kSparsePrefillFrom;
  }
  if (method.cache_format) json["cache_format"] = to_string(*method.cache_format);
  if (method.word == "oracle" && method.scope == SelectorScope::kv_group) json["per"] = "kv_group";
  return json;
}

// Tells selectors apart: their config and the beginning of each weight.
std::string selector_hash(const Selector& selector) {
  std::string text = selector.config().to_json().dump();
  for (const auto& [name, weight] : selector.named_parameters()) {
    const at::Tensor flat = weight.detach().flatten();
    const at::Tensor part = flat.slice(0, 0, 1024).to(at::kCPU, at::kFloat).contiguous();
    text += name + std::string(static_cast<const char*>(part.const_data_ptr()), part.nbytes());
  }
  return fmt::format("{:016x}", stable_hash(text));
}

// Everything that a prompt's outcomes depend on, besides its name. Tasks, lengths and numbers of samples are
// left out, so that a finished run can be extended.
nlohmann::json settings_of(const Backbone& backbone, const Selector* selector, const TextCodec& codec,
                           const std::string& essay, const std::vector<MethodSpec>& methods,
                           const RulerEvalOptions& options) {
  const RopeConfig& rope = backbone.config().rope;
  const std::vector<int32_t> probe =
      codec.encode("The 1234567 quick-brown foxes\nVAR ABCDE = \"2\" ...", true);
  nlohmann::json json = {
      {"prompts", options.prompts.version},
      {"seed", options.prompts.seed},
      {"wording", options.prompts.wording},
      {"before", options.prompts.before},
      {"after", options.prompts.after},
      {"stop_at_newline", options.stop_at_newline},
      {"stop_when_answered", options.stop_when_answered},
      {"mass_every", options.mass_every},
      {"model", backbone.fingerprint()},
      {"rope", {{"theta", rope.theta}, {"scaling", static_cast<int>(rope.scaling)}, {"factor", rope.factor}}},
      {"dtype", at::toString(backbone.dtype())},
      {"selector", selector ? selector_hash(*selector) : "none"},
      {"essay", fmt::format("{:016x}", stable_hash(essay))},
      {"tokenizer", probe},
      {"stop_ids", codec.stop_ids},
      {"methods", nlohmann::json::array()}};
  for (const MethodSpec& method : methods)
    json["methods"].push_back(method_settings(method, backbone.device()));
  // Left out where it is the model's dtype, so that runs from before there was a choice go on.
  if (options.kv_cache != KvCacheDtype::automatic) json["kv_cache_dtype"] = to_string(options.kv_cache);
  return json;
}

RulerGenerator generator_of(const TextCodec& codec, const std::string& essay,
                            const RulerEvalOptions& options) {
  return {options.prompts, essay, [&codec](const std::string& text, bool first) {
            return static_cast<int64_t>(codec.encode(text, first).size());
          }};
}

}  // namespace

void check_ruler(const ModelConfig& model, const TextCodec& codec, const std::string& essay,
                 const std::vector<MethodSpec>& methods, const RulerEvalOptions& options) {
  if (methods.empty()) fail("RULER evaluation: no attention method was given; name at least one");
  if (options.tasks.empty() || options.lengths.empty() || options.samples < 1)
    fail("RULER evaluation: {} tasks, {} lengths and {} samples; give at least one of each",
         options.tasks.size(), options.lengths.size(), options.samples);
  if (options.first_sample < 0) fail("RULER evaluation: first sample {} is negative", options.first_sample);
  if (options.prefill_chunk < 0 || options.batch < 1 || options.mass_every < 0)
    fail(
        "RULER evaluation: prefill chunk {}, batch {} and mass_every {}; the batch must be positive, the others not "
        "negative",
        options.prefill_chunk, options.batch, options.mass_every);
  const int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
  if (longest > model.max_position_embeddings)
    fail(
        "RULER evaluation: length {} passes the model's limit of {} positions; ask for less, or extend the "
        "model with YaRN",
        longest, model.max_position_embeddings);
  const int64_t shortest = *std::min_element(options.lengths.begin(), options.lengths.end());
  const double depth =
      options.depths.empty() ? std::numeric_limits<double>::quiet_NaN() : options.depths.front();
  const RulerGenerator generator = generator_of(codec, essay, options);
  for (RulerTask task : options.tasks) generator.make(task, shortest, 0, depth);
  for (double d : options.depths)
    if (!(d >= 0 && d <= 1)) fail("RULER evaluation: depth {} is not in [0, 1]", d);
}

TextCodec codec_of(const Tokenizer& tokenizer, bool add_special_tokens) {
  return {
      [=](std::string_view text, bool first) { return tokenizer.encode(text, first && add_special_tokens); },
      [tokenizer](std::span<const int32_t> ids) { return tokenizer.decode(ids, true); }, tokenizer.eos_ids()};
}

RulerResult evaluate_ruler(const Backbone& backbone, const Selector* selector, const TextCodec& codec,
                           const std::string& essay, const std::vector<MethodSpec>& methods,
                           const RulerEvalOptions& options) {
  const c10::InferenceMode inference;
  check_ruler(backbone.config(), codec, essay, methods, options);
  const RulerGenerator generator = generator_of(codec, essay, options);
  RulerResult result;
  result.options = options;
  result.settings = settings_of(backbone, selector, codec, essay, methods, options);
  for (const MethodSpec& method : methods) result.methods.push_back(method.name);

  std::map<decltype(Job{}.name()), RulerRecord> finished;
  std::optional<RulerLog> log;
  if (!options.out.empty()) {
    log.emplace(options.out / "ruler.jsonl", result.settings);
    for (const nlohmann::json& entry : log->entries()) {
      RulerRecord record = RulerRecord::from_json(entry);
      const Job job{record.task, record.length, record.sample, record.asked_depth};
      if (record.outcomes.size() == methods.size()) finished[job.name()] = std::move(record);
    }
  }

  PromptRunner prompts(backbone, selector, codec, methods, options);

  // Every prompt once: what the log holds, what is asked for twice, and what is to be run.
  std::vector<Job> jobs;
  std::set<decltype(Job{}.name())> known;
  int64_t all = 0;
  for (const Job& job : list_jobs(options)) {
    if (!known.insert(job.name()).second) continue;
    jobs.push_back(job);
    all += job.length;
  }
  Progress progress("ruler", all);
  int64_t done = 0, running = 0;
  for (const Job& job : jobs) {
    if (!finished.count(job.name())) continue;
    result.reused += 1;
    done += job.length;
  }
  progress.start_from(done);

  size_t next = 0;
  int64_t read = 0;
  std::deque<std::pair<Job, std::future<MadePrompt>>> made;  // while others are answered
  for (;;) {
    for (; next < jobs.size() && static_cast<int64_t>(made.size()) < 2 * options.batch; ++next) {
      if (finished.count(jobs[next].name())) continue;
      made.emplace_back(jobs[next], std::async(std::launch::async, [&, job = jobs[next]] {
                          return make_prompt(generator, codec, job);
                        }));
    }
    for (; !made.empty() && prompts.num_running() < options.batch; made.pop_front()) {
      prompts.start(made.front().first, made.front().second.get());
      running += made.front().first.length;
    }
    if (prompts.num_running() == 0) break;
    for (Running& prompt : prompts.step()) {
      const Job& job = prompt.job;
      RulerRecord record{job.task,
                         job.length,
                         job.sample,
                         job.depth,
                         prompt.sample.depth,
                         prompt.sample.prompt_tokens,
                         prompt.sample.references,
                         std::move(prompt.outcomes)};
      done += job.length, running -= job.length;
      read = prompts.read_tokens();
      progress.update(
          done, fmt::format("{} at {}, prompt {} done", to_string(job.task), job.length, job.sample + 1));
      if (log) log->append(record.to_json());
      finished[job.name()] = std::move(record);
    }
    // Between two answers the prompts' own tokens move the bar.
    progress.update(done + std::min(running, prompts.read_tokens() - read));
  }
  for (const Job& job : jobs) result.records.push_back(finished.at(job.name()));
  return result;
}

}  // namespace spot
