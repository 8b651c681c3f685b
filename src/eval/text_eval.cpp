#include "eval/text_eval.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>

#include "attention/mass.h"
#include "core/error.h"
#include "core/progress.h"

namespace spot {
namespace {

constexpr int64_t kPositionBuckets = 10;

// Adds up a method's token-level measures.
struct TokenSums {
  int64_t tokens = 0;
  double nll = 0, kl = 0, agree = 0, seconds = 0;
  std::vector<double> bucket_nll = std::vector<double>(kPositionBuckets, 0.0);
  std::vector<int64_t> bucket_tokens = std::vector<int64_t>(kPositionBuckets, 0);

  // log_probs and dense_log_probs [rows, vocab] of positions `first`..; targets [rows] int64.
  void add(const at::Tensor& log_probs, const at::Tensor& dense_log_probs, const at::Tensor& targets, int64_t first,
           int64_t length) {
    const at::Tensor nll_rows = -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1).to(at::kCPU, at::kDouble).contiguous();
    kl += (dense_log_probs.exp() * (dense_log_probs - log_probs)).sum(1).to(at::kDouble).sum().item<double>();
    agree += (log_probs.argmax(1) == dense_log_probs.argmax(1)).sum().item<int64_t>();
    const double* values = nll_rows.data_ptr<double>();
    for (int64_t i = 0; i < nll_rows.numel(); ++i) {
      const int64_t bucket = (first + i) * kPositionBuckets / length;
      bucket_nll[bucket] += values[i], bucket_tokens[bucket] += 1, nll += values[i];
    }
    tokens += nll_rows.numel();
  }

  void finish(MethodResult& result) const {
    const auto n = static_cast<double>(tokens);
    result.scored_tokens = tokens;
    result.nll = nll / n, result.kl = kl / n, result.argmax_agreement = agree / n, result.seconds = seconds;
    for (int64_t b = 0; b < kPositionBuckets; ++b)
      result.nll_by_position.push_back(bucket_tokens[b] ? bucket_nll[b] / static_cast<double>(bucket_tokens[b]) : NAN);
  }
};

// Share of the `count` heaviest blocks (per row and group) that the selection holds. mass [rows, groups, blocks].
at::Tensor oracle_recall(const at::Tensor& mass, const Selection& selection) {
  const at::Tensor chosen = at::zeros({mass.size(0), mass.size(1), mass.size(2) + 1}, mass.options().dtype(at::kFloat));
  const at::Tensor indices = selection.indices.to(at::kLong);
  chosen.scatter_(2, indices.masked_fill(indices < 0, mass.size(2)), 1.0);
  const at::Tensor ranked = std::get<1>(mass.sort(/*stable=*/true, /*dim=*/2, /*descending=*/true));
  const at::Tensor in_selection = chosen.gather(2, ranked);
  const at::Tensor rank = at::arange(mass.size(2), selection.counts.options());
  const at::Tensor wanted = (rank.view({1, 1, -1}) < selection.counts.unsqueeze(2)).to(at::kFloat);
  return (in_selection * wanted).sum(2) / selection.counts.to(at::kFloat).clamp_min(1);
}

// Computes the true attention of some queries of each chunk and compares the selection with it.
class Measurer {
 public:
  Measurer(SelectionPolicy& policy, const TextEvalOptions& options, std::map<int64_t, LayerMeasures>& layers)
      : policy_(policy), options_(options), layers_(layers) {}

  void operator()(const SelectionEvent& event) const {
    if (event.chunk.start + event.chunk.count <= options_.skip) return;
    const int64_t sequence = event.inputs.batch.sequences[event.chunk.sequence];
    const int64_t count = std::min(options_.measured_queries, event.chunk.count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = (2 * i + 1) * event.chunk.count / (2 * count);
      const QueryChunk one{event.chunk.sequence, event.chunk.first + row, 1, event.chunk.start + row};
      if (one.start < options_.skip) continue;
      const at::Tensor key = event.cache.gather(event.cache.keys(event.layer), sequence, one.start + 1);
      const at::Tensor mass = attention_mass(event.inputs.query.narrow(0, one.first, 1), key, event.inputs.scale, one.start,
                                             policy_.groups());
      const at::Tensor scores = policy_.score_chunk(event.inputs, event.cache, one);
      const at::Tensor lengths = at::full({1}, one.start + 1, at::TensorOptions(at::kInt).device(scores.device()));
      const Selection selection = select_blocks(scores, lengths, event.rule);
      const CapturedMass captured = captured_mass(mass, selection, event.rule);
      LayerMeasures& layer = layers_[event.layer];
      layer.queries += 1;
      const auto [kept, visible] = count_tokens(selection, lengths);
      layer.attended_share += kept.item<double>() / static_cast<double>(visible.item<int64_t>());
      layer.captured_mass += captured.total.mean().item<double>();
      layer.captured_residual += captured.residual.mean().item<double>();
      layer.oracle_recall += oracle_recall(mass, selection).mean().item<double>();
      if (policy_.name() != "spot") continue;
      for (double p : options_.calibration_p) {
        SelectionRule rule = event.rule;
        rule.mode = SelectionMode::top_p, rule.p = p, rule.cap = 0;
        // Without the floor: it would add mass that p did not ask for.
        rule.floor = rule.sinks + rule.recency + kPageSize;
        layer.calibration[p] += captured_mass(mass, select_blocks(scores, lengths, rule), rule).residual.mean().item<double>();
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

double MethodResult::perplexity() const { return std::exp(nll); }

double MethodResult::attended_share() const {
  double sum = 0;
  for (const auto& [layer, m] : layers) sum += m.attended_share;
  return layers.empty() ? 1.0 : sum / static_cast<double>(layers.size());
}

TextEvalResult evaluate_text(const Backbone& backbone, const Selector* selector, const std::vector<int32_t>& tokens,
                             const std::vector<EvalMethod>& methods, const TextEvalOptions& options) {
  const c10::InferenceMode inference;
  const auto available = static_cast<int64_t>(tokens.size());
  if (options.sequences < 1 || options.length < 2 || options.chunk < 1) fail("evaluation: sequences, length and chunk must be positive");
  if (available < options.sequences * options.length) {
    fail("evaluation: the text has {} tokens, {} sequences of {} need {}; give more text or ask for less", available,
         options.sequences, options.length, options.sequences * options.length);
  }
  if (options.skip >= options.length - 1) fail("evaluation: skip {} leaves nothing of length {} to score", options.skip, options.length);
  if (options.length > backbone.config().max_position_embeddings) {
    fail("evaluation: length {} passes the model's limit of {} positions", options.length,
         backbone.config().max_position_embeddings);
  }
  TextEvalResult result;
  result.options = options;
  result.dense.name = "dense";
  result.methods.resize(methods.size());
  std::vector<TokenSums> sums(methods.size() + 1);  // dense first
  Progress progress("evaluate", options.sequences * options.length * static_cast<int64_t>(methods.size() + 1));
  int64_t done = 0;

  for (int64_t s = 0; s < options.sequences; ++s) {
    std::vector<std::unique_ptr<AttentionRun>> runs;
    std::vector<int64_t> ids;
    for (size_t m = 0; m <= methods.size(); ++m) {
      AttentionSpec spec = m ? methods[m - 1].spec : AttentionSpec{};
      spec.sparse.prefill = PrefillMode::sparse;
      runs.push_back(std::make_unique<AttentionRun>(spec, backbone, selector, options.length));
      ids.push_back(runs.back()->cache().open_sequence());
      if (m) {
        MethodResult& method = result.methods[m - 1];
        method.name = methods[m - 1].name;
        runs.back()->sparse()->set_observer(Measurer(runs.back()->sparse()->policy(), options, method.layers));
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
        targets = at::tensor(std::vector<int64_t>(at_offset + first + 1, at_offset + last + 1), at::kLong).to(backbone.device());
      }
      for (size_t m = 0; m < runs.size(); ++m) {
        const auto clock = std::chrono::steady_clock::now();
        const Batch batch = make_batch(runs[m]->cache(), {ids[m]}, {part});
        const at::Tensor hidden = backbone.forward(batch, runs[m]->backend(), runs[m]->cache());
        sums[m].seconds += since(clock);
        progress.update(done += end - start, m ? methods[m - 1].name : "dense");
        if (first >= last) continue;
        const at::Tensor log_probs = at::log_softmax(backbone.logits(hidden.slice(0, first - start, last - start)), 1);
        if (!m) dense_log_probs = log_probs;
        sums[m].add(log_probs, dense_log_probs, targets, first, options.length);
      }
    }
  }
  sums[0].finish(result.dense);
  for (size_t m = 0; m < methods.size(); ++m) {
    sums[m + 1].finish(result.methods[m]);
    for (auto& [layer, measures] : result.methods[m].layers) {
      const auto n = static_cast<double>(measures.queries);
      measures.attended_share /= n, measures.captured_mass /= n, measures.captured_residual /= n, measures.oracle_recall /= n;
      for (auto& [p, captured] : measures.calibration) captured /= n;
    }
  }
  return result;
}

}  // namespace spot
