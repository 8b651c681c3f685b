#include "eval/text_eval.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

#include "attention/mass.h"
#include "attention/stack.h"
#include "cache/batch_builder.h"
#include "core/error.h"
#include "core/progress.h"

namespace spot {
namespace {

constexpr int64_t kPositionBuckets = 10;

// Adds up a method's token-level measures.
struct TokenSums {
  double seconds = 0;
  // By tenth of the length.
  std::vector<int64_t> tokens = std::vector<int64_t>(kPositionBuckets, 0);
  std::vector<double> nll = std::vector<double>(kPositionBuckets, 0.0), kl = nll, agreement = nll;

  // log_probs and dense_log_probs [rows, vocab] of positions `first`..; targets [rows] int64.
  void add(const at::Tensor& log_probs, const at::Tensor& dense_log_probs, const at::Tensor& targets,
           int64_t first, int64_t length) {
    const at::Tensor rows =
        at::stack({-log_probs.gather(1, targets.unsqueeze(1)).squeeze(1),
                   (dense_log_probs.exp() * (dense_log_probs - log_probs)).sum(1),
                   (log_probs.argmax(1) == dense_log_probs.argmax(1)).to(log_probs.dtype())})
            .to(at::kCPU, at::kDouble);
    const auto values = rows.accessor<double, 2>();
    for (int64_t i = 0; i < values.size(1); ++i) {
      const int64_t bucket = (first + i) * kPositionBuckets / length;
      tokens[bucket] += 1, nll[bucket] += values[0][i], kl[bucket] += values[1][i],
          agreement[bucket] += values[2][i];
    }
  }

  void finish(MethodResult& result) const {
    result.scored_tokens = std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
    result.seconds = seconds;
    auto mean = [&](const std::vector<double>& sums, std::vector<double>& by_position) {
      for (int64_t b = 0; b < kPositionBuckets; ++b)
        by_position.push_back(tokens[b] ? sums[b] / static_cast<double>(tokens[b]) : NAN);
      return std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(result.scored_tokens);
    };
    result.nll = mean(nll, result.nll_by_position);
    result.kl = mean(kl, result.kl_by_position);
    result.argmax_agreement = mean(agreement, result.agreement_by_position);
  }
};

// Of the heaviest blocks (or tokens, as the selection goes), as many as it holds: the share that it holds. By
// row and group.
at::Tensor oracle_recall(const at::Tensor& mass, const Selection& selection) {
  const at::Tensor chosen = chosen_columns(mass, selection), count = chosen.sum(2, true);
  const at::Tensor ranked = std::get<1>(mass.sort(/*stable=*/true, /*dim=*/2, /*descending=*/true));
  const at::Tensor wanted = at::arange(mass.size(2), count.options()) < count;
  return chosen.gather(2, ranked).logical_and(wanted).sum(2).to(at::kFloat) / count.squeeze(2).clamp_min(1);
}

// Computes the true attention of some queries of each chunk and compares the selection with it.
class Measurer {
 public:
  Measurer(SelectionPolicy& policy, const TextEvalOptions& options, std::map<int64_t, LayerMeasures>& layers)
      : policy_(policy), options_(options), layers_(layers) {}

  void operator()(const SelectionEvent& event) const {
    if (event.chunk.start + event.chunk.count <= options_.skip) return;
    const int64_t count = std::min(options_.measured_queries, event.chunk.count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (2 * i + 1) * event.chunk.count / (2 * count);
      const QueryChunk one{event.chunk.sequence, event.chunk.first + row, 1, event.chunk.start + row};
      if (one.start < options_.skip) continue;
      const at::Tensor key = sequence_tokens(event.keys, event.inputs.batch, one.sequence, one.start + 1);
      const Selection selection = event.selection.row(row);
      const at::Tensor lengths = selection.lengths;
      const at::Tensor mass =
          attention_mass(event.inputs.query.narrow(0, one.first, 1), key, event.inputs.scale, one.start,
                         selection.groups(), mass_reduction(selection));
      const CapturedMass captured = captured_mass(mass, selection, event.rule);
      LayerMeasures& layer = layers_[event.layer];
      layer.queries += 1;
      const auto [kept, visible] = count_tokens(selection, lengths);
      layer.attended_share += kept.item<double>() / static_cast<double>(visible.item<int64_t>());
      layer.captured_mass += captured.total.mean().item<double>();
      layer.captured_residual += captured.residual.mean().item<double>();
      layer.oracle_recall += oracle_recall(mass, selection).mean().item<double>();
      if (policy_.name() != "spot") continue;
      const at::Tensor scores = policy_.score_chunk(event.inputs, one);
      for (double p : options_.calibration_p) {
        SelectionRule rule = event.rule;
        rule.mode = SelectionMode::top_p, rule.p = p, rule.cap = 0;
        // Without the floor: it would add mass that p did not ask for.
        rule.floor = rule.sinks + rule.recency + kBlockSize;
        layer.calibration[p] +=
            captured_mass(mass, select_blocks(scores, lengths, rule), rule).residual.mean().item<double>();
      }
    }
  }

 private:
  SelectionPolicy& policy_;
  const TextEvalOptions& options_;
  std::map<int64_t, LayerMeasures>& layers_;
};

double since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double MethodResult::perplexity() const {
  return std::exp(nll);
}

double MethodResult::attended_share() const {
  double sum = 0;
  for (const auto& [layer, m] : layers) sum += m.attended_share;
  return layers.empty() ? 1.0 : sum / static_cast<double>(layers.size());
}

double MethodResult::captured_mass() const {
  double sum = 0;
  for (const auto& [layer, m] : layers) sum += m.captured_mass;
  return layers.empty() ? 1.0 : sum / static_cast<double>(layers.size());
}

void check_text_eval(const TextEvalOptions& options, int64_t available, const ModelConfig& model) {
  if (options.sequences < 1 || options.length < 2 || options.chunk < 1)
    fail("evaluation: sequences, length and chunk must be positive");
  if (options.length > model.max_position_embeddings)
    fail("evaluation: length {} passes the model's limit of {} positions; ask for less", options.length,
         model.max_position_embeddings);
  if (options.sequences > available / options.length)
    fail("evaluation: the text has {} tokens, too few for {} sequences of {}; give more text or ask for less",
         available, options.sequences, options.length);
  if (options.skip >= options.length - 1)
    fail("evaluation: skip {} leaves nothing of length {} to score", options.skip, options.length);
}

TextEvalResult evaluate_text(const Backbone& backbone, const Selector* selector,
                             const std::vector<int32_t>& tokens, const std::vector<MethodSpec>& methods,
                             const TextEvalOptions& options) {
  const c10::InferenceMode inference;
  check_text_eval(options, static_cast<int64_t>(tokens.size()), backbone.config());
  TextEvalResult result;
  result.options = options;
  result.dense.name = "dense";
  result.methods.resize(methods.size());
  std::vector<TokenSums> sums(methods.size() + 1);  // dense first
  Progress progress("evaluate",
                    options.sequences * options.length * static_cast<int64_t>(methods.size() + 1));
  int64_t done = 0;
  const auto scales = kv_scales(options.kv_cache, backbone);

  for (int64_t s = 0; s < options.sequences; ++s) {
    std::vector<std::unique_ptr<AttentionStack>> runs;
    std::vector<int64_t> ids;
    for (size_t m = 0; m <= methods.size(); ++m) {
      MethodSpec spec = m ? methods[m - 1] : MethodSpec{};
      // A text is one long prompt: each query selects for itself unless the method reads prompts sparsely.
      if (!spec.reads_sparsely(options.length)) spec.query_tile = 1;
      spec.prefill = PrefillMode::sparse;
      const StackOptions room{.num_pages = options.length / kBlockSize + 1, .kv_scales = scales};
      runs.push_back(std::make_unique<AttentionStack>(backbone, selector, std::vector{spec}, room));
      ids.push_back(runs.back()->cache().open_sequence());
      if (m) {
        MethodResult& method = result.methods[m - 1];
        method.name = methods[m - 1].name;
        if (SelectionPolicy* policy = runs.back()->policy(0))
          runs.back()->set_observer(Measurer(*policy, options, method.layers));
      }
    }
    // All methods advance chunk by chunk together, so that logits are compared without being kept.
    for (int64_t start = 0; start < options.length; start += options.chunk) {
      const int64_t end = std::min(options.length, start + options.chunk);
      const auto at_offset = tokens.begin() + s * options.length;
      const std::vector<int32_t> part(at_offset + start, at_offset + end);
      // Position i predicts token i + 1; the sequence's last position has no target.
      const int64_t first = std::max(start, options.skip), last = std::min(end, options.length - 1);
      at::Tensor dense_log_probs, targets;
      if (first < last) {
        targets = at::tensor(std::vector<int64_t>(at_offset + first + 1, at_offset + last + 1), at::kLong)
                      .to(backbone.device());
      }
      for (size_t m = 0; m < runs.size(); ++m) {
        const auto clock = std::chrono::steady_clock::now();
        PagedCache& cache = runs[m]->cache();
        const Batch batch = build_batch(cache, {{.sequence = ids[m], .tokens = part, .decode = false}});
        runs[m]->begin_pass(batch);
        const at::Tensor hidden = backbone.forward(batch, *runs[m], cache.states());
        sums[m].seconds += since(clock);
        progress.update(done += end - start, m ? methods[m - 1].name : "dense");
        if (first >= last) continue;
        const at::Tensor log_probs =
            at::log_softmax(backbone.logits(hidden.slice(0, first - start, last - start)), 1);
        if (!m) dense_log_probs = log_probs;
        sums[m].add(log_probs, dense_log_probs, targets, first, options.length);
      }
    }
  }
  sums[0].finish(result.dense);
  int64_t queries = 0;
  for (const MethodResult& method : result.methods)
    for (const auto& [layer, measures] : method.layers) queries = std::max(queries, measures.queries);
  for (size_t m = 0; m < methods.size(); ++m) {
    sums[m + 1].finish(result.methods[m]);
    for (auto& [layer, measures] : result.methods[m].layers) {
      for (auto& [p, captured] : measures.calibration) captured /= static_cast<double>(measures.queries);
      // Where a method's floor made it dense, nothing was selected and all was attended; all methods are
      // compared on the same queries.
      const auto dense = static_cast<double>(queries - measures.queries);
      measures.queries = queries;
      for (double* mean : {&measures.attended_share, &measures.captured_mass, &measures.captured_residual,
                           &measures.oracle_recall})
        *mean = (*mean + dense) / static_cast<double>(queries);
    }
  }
  return result;
}

}  // namespace spot
