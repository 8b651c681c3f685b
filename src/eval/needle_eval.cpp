#include "eval/needle_eval.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "attention/decode_mass.h"
#include "core/error.h"
#include "core/progress.h"
#include "engine/engine.h"

namespace spot {
namespace {

constexpr int64_t kAnswerTokens = 10;  // room for the value and what ends it

Request question_for(const NeedlePrompt& prompt, int64_t method) {
  Request request;
  request.prompt = prompt.context;
  request.prompt.insert(request.prompt.end(), prompt.question.begin(), prompt.question.end());
  request.context = static_cast<int64_t>(prompt.context.size());
  request.max_new_tokens = kAnswerTokens;
  request.method = method;
  return request;
}

}  // namespace

int64_t NeedleMethodResult::num_correct() const {
  return std::count(correct.begin(), correct.end(), true);
}

void check_needle_eval(const NeedleOptions& options, const ModelConfig& model) {
  if (options.length > model.max_position_embeddings - kAnswerTokens)
    fail(
        "needle evaluation: length {} plus {} answer tokens pass the model's limit of {} positions; ask for less",
        options.length, kAnswerTokens, model.max_position_embeddings);
}

NeedleEvalResult evaluate_needles(const Backbone& backbone, const Selector* selector,
                                  const Tokenizer& tokenizer, const std::vector<NeedlePrompt>& prompts,
                                  const NeedleOptions& options, const std::vector<MethodSpec>& methods) {
  const c10::InferenceMode inference;
  check_needle_eval(options, backbone.config());
  NeedleEvalResult result;
  result.options = options;
  for (const MethodSpec& method : methods) result.methods.push_back({.name = method.name});
  const auto count = static_cast<int64_t>(methods.size());
  // A hybrid's states are kept at the context's end, for all methods, and at the last two ends of dense attention's chunks.
  AttentionStack stack(backbone, selector, methods,
                       {.num_pages = (options.length + kAnswerTokens) / kBlockSize + 2,
                        .num_snapshots = 4,
                        .kv_scales = kv_scales(options.kv_cache, backbone)});
  // One prompt and method at a time, so that steps can be timed. The true mass needs dense attention: it is measured
  // while the answer is written once more, by an engine whose time nobody takes.
  EngineOptions engine_options{.max_step_tokens = 1024, .max_sequences = 1};
  Engine engine(backbone, stack, engine_options);
  std::vector<double> captured(methods.size(), 0);
  std::vector<int64_t> terms(methods.size(), 0);
  size_t measured = 0;
  engine_options.observe_every = 1;
  engine_options.observer = [&](const SelectionEvent& event, int64_t row, int64_t, int64_t) {
    captured[measured] += captured_by_row(event, row);
    terms[measured] += 1;
  };
  Engine observed(backbone, stack, engine_options);
  std::vector<AttendedTokens> sums(methods.size());
  std::vector<double> seconds(methods.size(), 0);
  std::vector<int64_t> steps(methods.size(), 0);
  Progress progress("needles", static_cast<int64_t>(prompts.size()));

  for (size_t p = 0; p < prompts.size(); ++p) {
    for (int64_t m = 0; m < count; ++m) {
      const auto method = static_cast<size_t>(m);
      const EngineStatistics before = engine.statistics();
      const auto answer = generate(engine, {question_for(prompts[p], m)}, [&](const Event& event) {
        for (const AttendedTokens& layer : event.attended) {
          sums[method].queries += layer.queries;
          sums[method].attended += layer.attended;
          sums[method].visible += layer.visible;
        }
      })[0][0];
      const EngineStatistics after = engine.statistics();
      seconds[method] += after.decode_seconds - before.decode_seconds;
      steps[method] += after.decode_tokens - before.decode_tokens;
      result.prefill_seconds += after.prefill_seconds - before.prefill_seconds;
      result.methods[method].outputs.push_back(tokenizer.decode(answer.tokens));
      result.methods[method].correct.push_back(
          answers(result.methods[method].outputs.back(), prompts[p].answer));
      if (methods[method].is_dense()) continue;
      measured = method;
      generate(observed, {question_for(prompts[p], m)});
    }
    result.depths.push_back(prompts[p].depth);
    progress.update(static_cast<int64_t>(p) + 1);
  }
  for (size_t m = 0; m < methods.size(); ++m) {
    NeedleMethodResult& method = result.methods[m];
    method.milliseconds_per_token = 1000 * seconds[m] / static_cast<double>(std::max<int64_t>(steps[m], 1));
    if (sums[m].visible > 0) {
      method.attended_share = sums[m].attended / sums[m].visible;
      method.attended_tokens = sums[m].attended / sums[m].queries;
    }
    if (terms[m] > 0) method.captured_mass = captured[m] / static_cast<double>(terms[m]);
  }
  return result;
}

}  // namespace spot
