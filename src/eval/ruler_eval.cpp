#include "eval/ruler_eval.h"

#include <c10/core/InferenceMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <tuple>

#include "core/error.h"
#include "core/progress.h"
#include "engine/generator.h"
#include "eval/decode_mass.h"
#include "eval/ruler_log.h"
#include "eval/ruler_random.h"
#include "eval/shared_prefill.h"
#include "model/model_cache.h"
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

// One method's attention, over the shared cache or, where it reads the context by itself, over one of its
// own.
class MethodRun {
 public:
  MethodRun(const EvalMethod& method, const Backbone& backbone, const Selector* selector, PagedCache& shared)
      : backbone_(backbone),
        own_cache_(method.spec.sparse.prefill == PrefillMode::sparse
                       ? std::make_unique<ModelCache>(backbone.config(), shared.num_pages(), backbone.dtype(),
                                                      backbone.device())
                       : nullptr),
        cache_(own_cache_ ? *own_cache_ : shared) {
    if (method.spec.kind == AttentionKind::dense) {
      backend_ = std::make_unique<DenseAttention>(cache_);
      return;
    }
    policy_ = make_policy(method.spec, backbone, selector, cache_.pools());
    SparseOptions options = method.spec.sparse;
    if (own_cache_) {
      options.count = false;
      reader_ = std::make_unique<SparseAttention>(cache_, *policy_.policy, options);
    }
    options = method.spec.sparse;
    options.prefill = PrefillMode::sparse, options.query_tile = 1;  // of the question
    auto sparse = std::make_unique<SparseAttention>(cache_, *policy_.policy, std::move(options));
    sparse_ = sparse.get();
    backend_ = std::move(sparse);
  }

  // Feeds on the dense prefill that methods share; null for dense attention and where the method has its own
  // prefill.
  SelectionPolicy* shared_policy() const { return own_cache_ ? nullptr : policy_.policy.get(); }

  // The answer after the context that `shared_sequence` holds, which stays as it was.
  RulerOutcome answer_after(const std::vector<int32_t>& context, int64_t shared_sequence,
                            const std::vector<int32_t>& question, const RulerSample& sample,
                            const TextCodec& codec, const RulerEvalOptions& options) {
    if (!own_cache_) {
      const PagedCache::Mark after_context = cache_.mark(shared_sequence);
      RulerOutcome outcome = answer(shared_sequence, question, sample, codec, options);
      cache_.rollback(shared_sequence, after_context);
      return outcome;
    }
    const int64_t sequence = cache_.open_sequence();
    prefill(backbone_, *reader_, cache_, sequence, context, options.prefill_chunk);
    RulerOutcome outcome = answer(sequence, question, sample, codec, options);
    cache_.close_sequence(sequence);
    return outcome;
  }

 private:
  // Reads `question` (every token selects for itself, as in decode) and writes the answer, one token a step,
  // behind what
  // `sequence` holds.
  RulerOutcome answer(int64_t sequence, const std::vector<int32_t>& question, const RulerSample& sample,
                      const TextCodec& codec, const RulerEvalOptions& options) {
    if (sparse_) sparse_->reset_counters();
    mass_ = {}, step_ = 0;
    at::Tensor hidden = prefill(backbone_, *backend_, cache_, sequence, question, options.prefill_chunk);
    RowSampler greedy{SamplingOptions{}};
    std::vector<int32_t> written;
    RulerOutcome outcome;
    for (;;) {
      const int32_t token = greedy.sample(backbone_.logits(hidden)[0]);
      if (std::find(codec.stop_ids.begin(), codec.stop_ids.end(), token) != codec.stop_ids.end()) break;
      written.push_back(token);
      outcome.output = codec.decode(written);
      if (static_cast<int64_t>(written.size()) == sample.max_new_tokens) break;
      if (options.stop_when_answered && ruler_score(sample.task, outcome.output, sample.references) == 1)
        break;
      const size_t text = outcome.output.find_first_not_of(" \n\t\r");
      if (options.stop_at_newline && text != std::string::npos &&
          outcome.output.find('\n', text) != std::string::npos)
        break;
      hidden = step(sequence, token, options.mass_every);
    }
    outcome.answer_tokens = static_cast<int64_t>(written.size());
    outcome.score = ruler_score(sample.task, outcome.output, sample.references);
    if (!sparse_) return outcome;
    for (const auto& [layer, counter] : sparse_->counters()) {
      outcome.attended += counter.tokens_attended;
      outcome.visible += static_cast<double>(counter.tokens_visible);
      outcome.rows += counter.rows;
    }
    outcome.captured = mass_.captured, outcome.measured = mass_.terms;
    return outcome;
  }

  at::Tensor step(int64_t sequence, int32_t token, int64_t mass_every) {
    const bool measure = sparse_ && mass_every > 0 && step_++ % mass_every == 0;
    if (measure) sparse_->set_observer([this](const SelectionEvent& event) { mass_(event); });
    at::Tensor hidden =
        backbone_.forward(make_batch(cache_, {sequence}, {{token}}), *backend_, cache_.states());
    if (measure) sparse_->set_observer({});
    return hidden;
  }

  const Backbone& backbone_;
  std::unique_ptr<ModelCache> own_cache_;
  PagedCache& cache_;
  Policy policy_;
  std::unique_ptr<SparseAttention> reader_;  // of the context, into its own cache
  std::unique_ptr<AttentionBackend> backend_;
  SparseAttention* sparse_ = nullptr;
  DecodeMass mass_;
  int64_t step_ = 0;
};

nlohmann::json method_settings(const EvalMethod& method) {
  nlohmann::json json = {{"name", method.name}, {"kind", to_string(method.spec.kind)}};
  if (method.spec.kind == AttentionKind::dense) return json;
  const SelectionRule& rule = method.spec.rule;
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
  json["dense_layers"] = method.spec.sparse.dense_layers;
  if (method.spec.sparse.prefill == PrefillMode::sparse)
    json["sparse_prefill"] = {{"query_tile", method.spec.sparse.query_tile}};
  if (method.spec.cache_format) json["cache_format"] = to_string(*method.spec.cache_format);
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
                           const std::string& essay, const std::vector<EvalMethod>& methods,
                           const RulerEvalOptions& options) {
  const RopeConfig& rope = backbone.config().rope;
  const std::vector<int32_t> probe =
      codec.encode("The 1234567 quick-brown foxes\nVAR ABCDE = \"2\" ...", true);
  nlohmann::json json = {
      {"prompts", kRulerVersion},
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
  for (const EvalMethod& method : methods) json["methods"].push_back(method_settings(method));
  return json;
}

// Refuses what could only fail later, after hours.
void check(const RulerGenerator& generator, const Backbone& backbone, const std::vector<EvalMethod>& methods,
           const RulerEvalOptions& options) {
  if (methods.empty()) fail("RULER evaluation: no attention method was given; name at least one");
  if (options.tasks.empty() || options.lengths.empty() || options.samples < 1)
    fail("RULER evaluation: {} tasks, {} lengths and {} samples; give at least one of each",
         options.tasks.size(), options.lengths.size(), options.samples);
  if (options.first_sample < 0) fail("RULER evaluation: first sample {} is negative", options.first_sample);
  if (options.prefill_chunk < 1 || options.mass_every < 0)
    fail(
        "RULER evaluation: prefill chunk {} and mass_every {}; the first must be positive, the second not "
        "negative",
        options.prefill_chunk, options.mass_every);
  const int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
  if (longest > backbone.config().max_position_embeddings)
    fail(
        "RULER evaluation: length {} passes the model's limit of {} positions; ask for less, or extend the "
        "model with YaRN",
        longest, backbone.config().max_position_embeddings);
  const int64_t shortest = *std::min_element(options.lengths.begin(), options.lengths.end());
  const double depth =
      options.depths.empty() ? std::numeric_limits<double>::quiet_NaN() : options.depths.front();
  for (RulerTask task : options.tasks) generator.make(task, shortest, 0, depth);
  for (double d : options.depths)
    if (!(d >= 0 && d <= 1)) fail("RULER evaluation: depth {} is not in [0, 1]", d);
}

}  // namespace

TextCodec codec_of(const Tokenizer& tokenizer, bool add_special_tokens) {
  return {
      [=](std::string_view text, bool first) { return tokenizer.encode(text, first && add_special_tokens); },
      [tokenizer](std::span<const int32_t> ids) { return tokenizer.decode(ids, true); }, tokenizer.eos_ids()};
}

RulerResult evaluate_ruler(const Backbone& backbone, const Selector* selector, const TextCodec& codec,
                           const std::string& essay, const std::vector<EvalMethod>& methods,
                           const RulerEvalOptions& options) {
  const c10::InferenceMode inference;
  const RulerGenerator generator(options.prompts, essay, [&](const std::string& text, bool first) {
    return static_cast<int64_t>(codec.encode(text, first).size());
  });
  check(generator, backbone, methods, options);
  RulerResult result;
  result.options = options;
  result.settings = settings_of(backbone, selector, codec, essay, methods, options);
  for (const EvalMethod& method : methods) result.methods.push_back(method.name);

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

  const int64_t longest = *std::max_element(options.lengths.begin(), options.lengths.end());
  ModelCache cache(backbone.config(), longest / kBlockSize + 2, backbone.dtype(), backbone.device());
  std::vector<std::unique_ptr<MethodRun>> runs;
  std::vector<SelectionPolicy*> policies;
  for (const EvalMethod& method : methods) {
    runs.push_back(std::make_unique<MethodRun>(method, backbone, selector, cache));
    if (runs.back()->shared_policy()) policies.push_back(runs.back()->shared_policy());
  }
  SharedPrefill shared(cache, policies);

  // Progress counts tokens: half of a prompt's for its prefill, the other half for the methods' answers.
  const std::vector<Job> jobs = list_jobs(options);
  int64_t all = 0, done = 0;
  for (const Job& job : jobs) {
    all += 2 * job.length;
    if (finished.count(job.name())) done += 2 * job.length;
  }
  Progress progress("ruler", all);
  progress.start_from(done);

  for (const Job& job : jobs) {
    if (const auto found = finished.find(job.name()); found != finished.end()) {
      result.records.push_back(found->second);
      result.reused += 1;
      continue;
    }
    const std::string note = fmt::format("{} at {}, prompt {} of {}", to_string(job.task), job.length,
                                         job.sample - options.first_sample + 1, options.samples);
    const RulerSample sample = generator.make(job.task, job.length, job.sample, job.depth);
    const std::vector<int32_t> context = codec.encode(sample.context, true);
    const std::vector<int32_t> question = codec.encode(sample.question + sample.answer_prefix, false);
    const int64_t sequence = cache.open_sequence();
    const auto tokens = static_cast<int64_t>(context.size());
    for (int64_t start = 0; start < tokens; start += options.prefill_chunk) {
      const int64_t end = std::min(tokens, start + options.prefill_chunk);
      prefill(backbone, shared, cache, sequence, {context.begin() + start, context.begin() + end},
              options.prefill_chunk);
      progress.update(done + job.length * end / tokens, note);
    }
    RulerRecord record{job.task,     job.length,           job.sample,        job.depth,
                       sample.depth, sample.prompt_tokens, sample.references, {}};
    for (size_t m = 0; m < runs.size(); ++m) {
      record.outcomes.push_back(runs[m]->answer_after(context, sequence, question, sample, codec, options));
      progress.update(
          done + job.length + job.length * static_cast<int64_t>(m + 1) / static_cast<int64_t>(runs.size()),
          note + ", " + methods[m].name);
    }
    cache.close_sequence(sequence);
    done += 2 * job.length;
    if (log) log->append(record.to_json());
    result.records.push_back(std::move(record));
  }
  return result;
}

}  // namespace spot
