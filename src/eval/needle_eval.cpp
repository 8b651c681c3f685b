#include "eval/needle_eval.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "core/error.h"
#include "core/progress.h"
#include "engine/generator.h"
#include "eval/decode_mass.h"
#include "eval/shared_prefill.h"
#include "model/model_cache.h"

namespace spot {
namespace {

constexpr int64_t kAnswerTokens = 10;  // room for the value and what ends it

// One method's view of the shared cache.
struct Contestant {
  Policy policy;  // empty for dense
  std::unique_ptr<AttentionBackend> backend;
  SparseAttention* sparse = nullptr;
};

Contestant make_contestant(const EvalMethod& method, const Backbone& backbone, const Selector* selector,
                           PagedCache& cache) {
  Contestant made;
  if (method.spec.kind == AttentionKind::dense) {
    made.backend = std::make_unique<DenseAttention>(cache);
    return made;
  }
  made.policy = make_policy(method.spec, backbone, selector, cache.pools());
  auto sparse = std::make_unique<SparseAttention>(cache, *made.policy.policy, method.spec.sparse);
  made.sparse = sparse.get();
  made.backend = std::move(sparse);
  return made;
}

// Reads `question` and writes the answer, one token a step. Returns the answer's tokens and the seconds of
// the steps.
std::pair<std::vector<int32_t>, double> answer_question(const Backbone& backbone, AttentionBackend& attention,
                                                        PagedCache& cache, int64_t sequence,
                                                        const std::vector<int32_t>& question) {
  std::vector<int32_t> output;
  RowSampler greedy{SamplingOptions{}};
  const auto start = std::chrono::steady_clock::now();
  at::Tensor hidden;
  for (int32_t token : question)
    hidden = backbone.forward(make_batch(cache, {sequence}, {{token}}), attention, cache.states());
  for (int64_t i = 0; i < kAnswerTokens; ++i) {
    output.push_back(greedy.sample(backbone.logits(hidden)[0]));
    if (i + 1 < kAnswerTokens)
      hidden = backbone.forward(make_batch(cache, {sequence}, {{output.back()}}), attention, cache.states());
  }
  return {output, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
}

}  // namespace

int64_t NeedleMethodResult::num_correct() const {
  return std::count(correct.begin(), correct.end(), true);
}

NeedleEvalResult evaluate_needles(const Backbone& backbone, const Selector* selector,
                                  const Tokenizer& tokenizer, const std::vector<NeedlePrompt>& prompts,
                                  const NeedleOptions& options, const std::vector<EvalMethod>& methods) {
  const c10::InferenceMode inference;
  if (options.length + kAnswerTokens > backbone.config().max_position_embeddings) {
    fail("needle evaluation: length {} plus {} answer tokens pass the model's limit of {} positions",
         options.length, kAnswerTokens, backbone.config().max_position_embeddings);
  }
  ModelCache cache(backbone.config(), (options.length + kAnswerTokens) / kBlockSize + 2, backbone.dtype(),
                   backbone.device());
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
  std::vector<DecodeMass> masses(methods.size());
  std::vector<int64_t> steps(methods.size(), 0);
  Progress progress("needles", static_cast<int64_t>(prompts.size()));

  for (size_t p = 0; p < prompts.size(); ++p) {
    const NeedlePrompt& prompt = prompts[p];
    const int64_t sequence = cache.open_sequence();
    const auto start = std::chrono::steady_clock::now();
    prefill(backbone, shared, cache, sequence, prompt.context, 1024);
    result.prefill_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const PagedCache::Mark after_context = cache.mark(sequence);
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
      for (int32_t token : prompt.question)
        backbone.forward(make_batch(cache, {sequence}, {{token}}), *c.backend, cache.states());
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
    double attended = 0, visible = 0, rows = 0;
    for (const auto& [layer, counter] : contestants[m].sparse->counters())
      attended += counter.tokens_attended, visible += static_cast<double>(counter.tokens_visible),
          rows += counter.rows;
    if (visible > 0) method.attended_share = attended / visible, method.attended_tokens = attended / rows;
    if (masses[m].terms > 0) method.captured_mass = masses[m].captured / static_cast<double>(masses[m].terms);
  }
  return result;
}

}  // namespace spot
