#include "eval/needle_eval.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>

#include "attention/mass.h"
#include "core/error.h"
#include "core/progress.h"
#include "engine/generator.h"
#include "eval/shared_prefill.h"

namespace spot {
namespace {

constexpr int64_t kAnswerTokens = 10;  // room for the value and what ends it

// One method's view of the shared cache.
struct Contestant {
  Policy policy;  // empty for dense
  std::unique_ptr<AttentionBackend> backend;
  SparseAttention* sparse = nullptr;
};

Contestant make_contestant(const EvalMethod& method, const Backbone& backbone, const Selector* selector, KvCache& cache) {
  Contestant made;
  if (method.spec.kind == AttentionKind::dense) {
    made.backend = std::make_unique<DenseAttention>(cache);
    return made;
  }
  made.policy = make_policy(method.spec, backbone, selector, cache.num_pages());
  auto sparse = std::make_unique<SparseAttention>(cache, *made.policy.policy, method.spec.sparse);
  made.sparse = sparse.get();
  made.backend = std::move(sparse);
  return made;
}

// Reads `question` and writes the answer, one token a step. Returns the answer's tokens and the seconds of the steps.
std::pair<std::vector<int32_t>, double> answer_question(const Backbone& backbone, AttentionBackend& attention, KvCache& cache,
                                                        int64_t sequence, const std::vector<int32_t>& question) {
  std::vector<int32_t> output;
  Sampler greedy{SamplingOptions{}};
  const auto start = std::chrono::steady_clock::now();
  at::Tensor hidden;
  for (int32_t token : question) hidden = backbone.forward(make_batch(cache, {sequence}, {{token}}), attention, cache);
  for (int64_t i = 0; i < kAnswerTokens; ++i) {
    output.push_back(greedy.sample(backbone.logits(hidden)[0]));
    if (i + 1 < kAnswerTokens) hidden = backbone.forward(make_batch(cache, {sequence}, {{output.back()}}), attention, cache);
  }
  return {output, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
}

// Adds each decode row's captured mass.
struct MassSum {
  double captured = 0;
  int64_t rows = 0;

  void operator()(const SelectionEvent& event) {
    for (int64_t i = 0; i < event.inputs.batch.num_sequences(); ++i) {
      const int64_t length = event.inputs.batch.starts[i] + 1;
      const at::Tensor key = event.cache.gather(event.cache.keys(event.layer), event.inputs.batch.sequences[i], length);
      const at::Tensor mass = attention_mass(event.inputs.query.narrow(0, i, 1), key, event.inputs.scale, length - 1,
                                             event.selection.groups());
      const Selection row{event.selection.indices.narrow(0, i, 1), event.selection.counts.narrow(0, i, 1),
                          event.selection.predicted_mass.narrow(0, i, 1), event.selection.lengths.narrow(0, i, 1)};
      captured += captured_mass(mass, row, event.rule).total.mean().item<double>();
      rows += 1;
    }
  }
};

}  // namespace

int64_t NeedleMethodResult::num_correct() const { return std::count(correct.begin(), correct.end(), true); }

NeedleEvalResult evaluate_needles(const Backbone& backbone, const Selector* selector, const Tokenizer& tokenizer,
                                  const std::vector<NeedlePrompt>& prompts, const NeedleOptions& options,
                                  const std::vector<EvalMethod>& methods) {
  const c10::InferenceMode inference;
  if (options.length + kAnswerTokens > backbone.config().max_position_embeddings) {
    fail("needle evaluation: length {} plus {} answer tokens pass the model's limit of {} positions", options.length, kAnswerTokens,
         backbone.config().max_position_embeddings);
  }
  KvCache cache(backbone.config(), (options.length + kAnswerTokens) / kPageSize + 2, backbone.dtype(), backbone.device());
  std::vector<Contestant> contestants;
  std::vector<SelectionPolicy*> policies;
  NeedleEvalResult result;
  result.options = options;
  for (const EvalMethod& method : methods) {
    contestants.push_back(make_contestant(method, backbone, selector, cache));
    if (contestants.back().policy.policy) policies.push_back(contestants.back().policy.policy.get());
    result.methods.push_back({.name = method.name});
  }
  SharedPrefill shared(cache, policies);
  std::vector<double> seconds(methods.size(), 0);
  std::vector<MassSum> masses(methods.size());
  std::vector<int64_t> steps(methods.size(), 0);
  Progress progress("needles", static_cast<int64_t>(prompts.size()));

  for (size_t p = 0; p < prompts.size(); ++p) {
    const NeedlePrompt& prompt = prompts[p];
    const int64_t sequence = cache.open_sequence();
    const auto start = std::chrono::steady_clock::now();
    prefill(backbone, shared, cache, sequence, prompt.context, 1024);
    result.prefill_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const KvCache::Mark after_context = cache.mark(sequence);
    for (size_t m = 0; m < contestants.size(); ++m) {
      Contestant& c = contestants[m];
      const auto [output, elapsed] = answer_question(backbone, *c.backend, cache, sequence, prompt.question);
      seconds[m] += elapsed;
      steps[m] += static_cast<int64_t>(prompt.question.size()) + kAnswerTokens - 1;
      result.methods[m].outputs.push_back(tokenizer.decode(output));
      result.methods[m].correct.push_back(answers(result.methods[m].outputs.back(), prompt.answer));
      cache.rollback(sequence, after_context);
      if (!c.sparse) continue;
      // The true mass needs dense attention, so it is measured on a second, untimed reading of the question.
      c.sparse->set_observer([&sum = masses[m]](const SelectionEvent& event) { sum(event); });
      for (int32_t token : prompt.question) backbone.forward(make_batch(cache, {sequence}, {{token}}), *c.backend, cache);
      c.sparse->set_observer({});
      cache.rollback(sequence, after_context);
    }
    cache.close_sequence(sequence);
    result.depths.push_back(prompt.depth);
    progress.update(static_cast<int64_t>(p) + 1);
  }
  for (size_t m = 0; m < contestants.size(); ++m) {
    NeedleMethodResult& method = result.methods[m];
    method.milliseconds_per_token = 1000 * seconds[m] / static_cast<double>(std::max<int64_t>(steps[m], 1));
    if (!contestants[m].sparse) continue;
    double attended = 0, visible = 0;
    for (const auto& [layer, counter] : contestants[m].sparse->counters())
      attended += counter.tokens_attended, visible += static_cast<double>(counter.tokens_visible);
    if (visible > 0) method.attended_share = attended / visible;
    if (masses[m].rows > 0) method.captured_mass = masses[m].captured / static_cast<double>(masses[m].rows);
  }
  return result;
}

nlohmann::json NeedleEvalResult::to_json() const {
  nlohmann::json json = {{"length", options.length}, {"distractors", options.distractors}, {"samples", depths.size()},
                         {"seed", options.seed}, {"prefill_seconds", prefill_seconds}, {"depths", depths}};
  for (const NeedleMethodResult& m : methods) {
    json["methods"].push_back({{"name", m.name}, {"exact_match", m.num_correct()}, {"correct", m.correct}, {"outputs", m.outputs},
                               {"attended_share", m.attended_share}, {"captured_mass", m.captured_mass},
                               {"milliseconds_per_token", m.milliseconds_per_token}});
  }
  return json;
}

Table NeedleEvalResult::summary() const {
  Table table{{"attention", "exact match", "attended", "captured mass", "ms/token", "speed vs first"}, {}};
  for (const NeedleMethodResult& m : methods) {
    table.rows.push_back({m.name, fmt::format("{}/{}", m.num_correct(), m.correct.size()), fmt::format("{:.1f}%", 100 * m.attended_share),
                          fmt::format("{:.3f}", m.captured_mass), fmt::format("{:.2f}", m.milliseconds_per_token),
                          fmt::format("{:.2f}x", methods.front().milliseconds_per_token / m.milliseconds_per_token)});
  }
  return table;
}

void NeedleEvalResult::add_to(Page& page) const {
  page.heading(fmt::format("Multi-key needles at {} tokens", options.length));
  page.paragraph(fmt::format("{} prompts, {} distractor needles each, seed {}. The context is prefilled densely once; each method then "
                             "reads the question and writes the answer token by token.",
                             depths.size(), options.distractors, options.seed));
  page.add(summary());
  BarChart match{.title = "Exact match", .y_label = "share", .groups = {"exact match", "tokens attended", "captured mass"}};
  BarChart speed{.title = "Decode step", .y_label = "ms a token", .groups = {"ms a token"}};
  for (const NeedleMethodResult& m : methods) {
    const auto n = static_cast<double>(std::max<size_t>(m.correct.size(), 1));
    match.names.push_back(m.name), speed.names.push_back(m.name);
    match.values.push_back({static_cast<double>(m.num_correct()) / n, m.attended_share, m.captured_mass});
    speed.values.push_back({m.milliseconds_per_token});
  }
  page.chart(match);
  page.chart(speed);
  const std::set<double> levels(depths.begin(), depths.end());
  HeatMap map{.title = "Exact match by depth of the needle", .x_label = "depth", .y_label = ""};
  for (double d : levels) map.columns.push_back(fmt::format("{:.0f}%", 100 * d));
  for (const NeedleMethodResult& m : methods) {
    map.rows.push_back(m.name);
    std::vector<double> row;
    for (double d : levels) {
      double right = 0, all = 0;
      for (size_t i = 0; i < depths.size(); ++i)
        if (depths[i] == d) all += 1, right += m.correct[i];
      row.push_back(right / all);
    }
    map.values.push_back(row);
  }
  page.chart(map);
}

}  // namespace spot
