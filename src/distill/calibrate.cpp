#include "distill/calibrate.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>

#include "attention/dense.h"
#include "attention/mass.h"
#include "core/error.h"
#include "core/progress.h"
#include "distill/distill_attention.h"
#include "distill/divergence.h"
#include "selection/selection.h"

namespace spot {
namespace {

constexpr int64_t kRun = 16;             // consecutive queries measured together
constexpr int64_t kResidualBlocks = 16;  // fewer are too few to tell temperatures apart

// What was measured of one layer: block scores and true block mass [N, G, blocks] of N queries, lengths [N]
// int32.
struct Samples {
  std::vector<at::Tensor> scores, mass, lengths;
};

class MeasuringAttention : public AttentionBackend {
 public:
  MeasuringAttention(const Selector& selector, int64_t blocks) : selector_(selector), blocks_(blocks) {}
  // First queries of the runs that the next pass measures.
  void begin(std::vector<int64_t> runs) { runs_ = std::move(runs); }
  const std::map<int64_t, Samples>& samples() const { return samples_; }

  at::Tensor forward(const AttentionInputs& inputs) override {
    const at::NoGradGuard no_grad;
    const at::Tensor key = inputs.key.transpose(0, 1);
    at::Tensor output = causal_attention(inputs.query, key, inputs.value.transpose(0, 1), 0, inputs.scale);
    if (!selector_.has_layer(inputs.layer)) return output;
    const at::Tensor& positions = inputs.batch.positions;
    const at::Tensor selector_key = selector_.project_key(inputs.layer, inputs.hidden, positions);
    Samples& samples = samples_[inputs.layer];
    for (const int64_t first : runs_) {
      const int64_t end = first + kRun;
      const at::Tensor hidden = inputs.hidden.narrow(0, first, kRun);
      const at::Tensor query =
          selector_.project_query(inputs.layer, hidden, positions.narrow(0, first, kRun));
      at::Tensor scores =
          token_scores(query, selector_.project_weight(inputs.layer, hidden), selector_key.narrow(0, 0, end));
      const at::Tensor columns = at::arange(end, positions.options()).unsqueeze(0);
      const at::Tensor rows = at::arange(first, end, positions.options());
      scores.masked_fill_(columns > rows.unsqueeze(1), -kInfinity);
      const at::Tensor blocks = block_max(scores).transpose(0, 1).to(at::kFloat);
      const at::Tensor mass = attention_mass(inputs.query.narrow(0, first, kRun), key.narrow(1, 0, end),
                                             inputs.scale, first, selector_.groups());
      const int64_t missing = blocks_ - blocks.size(2);
      samples.scores.push_back(at::constant_pad_nd(blocks, {0, missing}, -kInfinity).contiguous());
      samples.mass.push_back(at::constant_pad_nd(mass, {0, missing}, 0.0));
      samples.lengths.push_back((rows + 1).to(at::kInt));
    }
    return output;
  }

 private:
  const Selector& selector_;
  int64_t blocks_;
  std::vector<int64_t> runs_;
  std::map<int64_t, Samples> samples_;
};

// The nucleus at any temperature: temperature does not change the order, so blocks are sorted once.
class Nucleus {
 public:
  Nucleus(const at::Tensor& scores, const at::Tensor& mass, const at::Tensor& lengths,
          const SelectionRule& rule) {
    const at::Tensor block = at::arange(scores.size(2), lengths.options()).view({1, 1, -1});
    const at::Tensor recent =
        at::div((lengths - rule.recency).clamp_min(0), kBlockSize, "floor").view({-1, 1, 1});
    const at::Tensor reserved =
        (block < (rule.sinks + kBlockSize - 1) / kBlockSize).logical_or(block >= recent);
    const at::Tensor residual_mass = mass.to(at::kDouble).masked_fill(reserved, 0.0);
    const at::Tensor total = residual_mass.sum(-1, true);
    counted_ = (total > 0.0).to(at::kDouble).squeeze(-1);
    const auto [sorted, order] = at::sort(scores.to(at::kDouble).masked_fill(reserved, -kInfinity),
                                          /*stable=*/true, /*dim=*/-1, /*descending=*/true);
    sorted_ = sorted - sorted.narrow(-1, 0, 1);
    residual_mass_ = total.squeeze(-1);
    captured_ = at::cumsum((residual_mass / total.clamp_min(1e-300)).gather(-1, order), -1);
  }

  // Queries with residual mass, over groups.
  double counted() const { return counted_.sum().item<double>(); }

  // [queries, groups].
  const at::Tensor& residual_mass() const { return residual_mass_; }

  // Mean captured share at each p.
  std::vector<double> captured(const std::vector<double>& ps, double temperature) const {
    const at::Tensor cumulative = at::cumsum(at::softmax(sorted_ / temperature, -1), -1);
    std::vector<double> means;
    for (const double p : ps) {
      // Entries before which less than p lies: the nucleus.
      const at::Tensor count = (cumulative < p).sum(-1, true).clamp_max(sorted_.size(-1) - 1);
      means.push_back(
          ((captured_.gather(-1, count).squeeze(-1) * counted_).sum() / counted_.sum().clamp_min(1.0))
              .item<double>());
    }
    return means;
  }

 private:
  at::Tensor sorted_, captured_, counted_, residual_mass_;
};

double mean_error(const std::vector<double>& captured, const std::vector<double>& p) {
  double sum = 0.0;
  for (size_t i = 0; i < p.size(); ++i) sum += std::abs(captured[i] - p[i]);
  return p.empty() ? 0.0 : sum / static_cast<double>(p.size());
}

// The temperature in 2^-5 .. 2^5 with the least error: a grid over its logarithm, then golden section around
// the best.
double fit_temperature(const Nucleus& nucleus, const std::vector<double>& p) {
  const auto error = [&](double log2) { return mean_error(nucleus.captured(p, std::exp2(log2)), p); };
  double best = 0.0, least = error(0.0);
  constexpr double step = 0.25;
  for (double x = -5.0; x <= 5.0; x += step)
    if (const double e = error(x); e < least) {
      least = e;
      best = x;
    }
  double low = best - step, high = best + step;
  const double ratio = (std::sqrt(5.0) - 1.0) / 2.0;
  for (int i = 0; i < 12; ++i) {
    const double a = high - ratio * (high - low), b = low + ratio * (high - low);
    const double error_a = error(a), error_b = error(b);
    for (const auto& [x, e] : {std::pair(a, error_a), std::pair(b, error_b)})
      if (e < least) {
        least = e;
        best = x;
      }
    (error_a < error_b ? high : low) = error_a < error_b ? b : a;
  }
  return std::exp2(best);
}

std::vector<double> errors(const std::vector<std::vector<double>>& captured, const std::vector<double>& p) {
  std::vector<double> list;
  for (const auto& row : captured) list.push_back(mean_error(row, p));
  return list;
}

}  // namespace

std::vector<double> half_octaves(int first, int last) {
  std::vector<double> grid;
  for (int half = 2 * first; half <= 2 * last; ++half) grid.push_back(std::exp2(-0.5 * half));
  return grid;
}

std::vector<double> Calibration::error_before() const {
  return errors(captured_before, p);
}
std::vector<double> Calibration::error_after() const {
  return errors(captured_after, p);
}

nlohmann::json Calibration::to_json() const {
  return {
      {"definition",
       "share of the residual attention mass (outside sinks and recency) on the nucleus, mean over queries"},
      {"layers", layers},
      {"temperature", temperature},
      {"residual_mass", residual_mass},
      {"queries", queries},
      {"p", p},
      {"captured_before", captured_before},
      {"captured_after", captured_after},
      {"selected_residual", selected_residual},
      {"selected_total", selected_total},
      {"selected_tokens", selected_tokens},
      {"error_before", error_before()},
      {"error_after", error_after()}};
}

nlohmann::json Calibration::mass_notes(const std::vector<std::filesystem::path>& data_paths) const {
  nlohmann::json paths = nlohmann::json::array();
  for (const std::filesystem::path& path : data_paths) paths.push_back(path.string());
  return {{"contexts", contexts}, {"length", length}, {"queries", late_queries}, {"data_paths", paths}};
}

namespace {

// Tokens before the first query with enough residual blocks.
int64_t least_context(const SelectionRule& rule) {
  return (rule.sinks + kBlockSize - 1) / kBlockSize * kBlockSize + rule.recency +
         kResidualBlocks * kBlockSize;
}

// First queries that a run in so many tokens can have; 0 or less: none.
int64_t possible_starts(size_t tokens, const SelectionRule& rule) {
  return static_cast<int64_t>(tokens) - kRun - least_context(rule) + 1;
}

// The layers' samples from dense forward passes; empty when all sequences are too short.
std::map<int64_t, Samples> measure(const Backbone& backbone, const Selector& selector,
                                   const std::vector<TokenSequence>& sequences,
                                   const CalibrationOptions& options, const SelectionRule& rule,
                                   bool show_progress) {
  if (options.queries_per_sequence < kRun)
    fail("calibration: queries_per_sequence is {}, at least {} are needed", options.queries_per_sequence,
         kRun);
  for (const double p : options.p)
    if (!(p > 0.0 && p < 1.0)) fail("calibration: p of {} is not between 0 and 1", p);
  const int64_t least = least_context(rule);
  int64_t longest = 0;
  for (const TokenSequence& s : sequences) longest = std::max(longest, static_cast<int64_t>(s.tokens.size()));

  MeasuringAttention attention(selector, (longest + kBlockSize - 1) / kBlockSize);
  std::unique_ptr<Progress> progress;
  if (show_progress)
    progress = std::make_unique<Progress>("Calibrating", static_cast<int64_t>(sequences.size()));
  for (size_t i = 0; i < sequences.size(); ++i) {
    const int64_t starts = possible_starts(sequences[i].tokens.size(), rule);
    if (starts <= 0) continue;
    const int64_t runs = std::min(options.queries_per_sequence / kRun, (starts + kRun - 1) / kRun);
    std::vector<int64_t> firsts;
    for (int64_t r = 0; r < runs; ++r)
      firsts.push_back(least + (runs > 1 ? r * (starts - 1) / (runs - 1) : starts - 1));
    attention.begin(std::move(firsts));
    forward_sequence(backbone, attention, sequences[i].tokens, {0});
    if (progress) progress->update(static_cast<int64_t>(i) + 1);
  }
  return attention.samples();
}

Nucleus nucleus_of(const Samples& samples, const SelectionRule& rule) {
  return Nucleus(at::cat(samples.scores), at::cat(samples.mass), at::cat(samples.lengths), rule);
}

}  // namespace

at::Tensor captured_sums(const Backbone& backbone, const Selector& selector,
                         const std::vector<TokenSequence>& sequences, const CalibrationOptions& options) {
  const SelectionRule rule = selector.config().selection.rule;
  const auto measured = measure(backbone, selector, sequences, options, rule, /*show_progress=*/false);
  const auto num_layers = static_cast<int64_t>(selector.layers().size());
  at::Tensor sums = at::zeros({num_layers, static_cast<int64_t>(options.p.size()) + 1}, at::kDouble);
  for (int64_t l = 0; l < num_layers && !measured.empty(); ++l) {
    const Nucleus nucleus = nucleus_of(measured.at(selector.layers()[static_cast<size_t>(l)]), rule);
    std::vector<double> row = nucleus.captured(options.p, 1.0);
    row.push_back(1.0);
    sums[l].copy_(at::tensor(row, at::kDouble) * nucleus.counted());
  }
  return sums;
}

namespace {

// What a rule captures of the measured queries, means over queries and sets.
struct Captured {
  double residual, total, tokens;  // shares of the residual mass, of all mass and of the visible tokens
};

Captured capture(const at::Tensor& scores, const at::Tensor& mass, const at::Tensor& lengths,
                 const SelectionRule& rule) {
  const Selection selection = select_blocks(scores, lengths, rule);
  const CapturedMass captured = captured_mass(mass, selection, rule);
  const at::Tensor visible = lengths.to(at::kDouble).unsqueeze(1);
  const at::Tensor tokens = (selection.counts.to(at::kDouble) * kBlockSize).minimum(visible).div(visible);
  return {captured.residual.mean().item<double>(), captured.total.mean().item<double>(),
          tokens.mean().item<double>()};
}

}  // namespace

Calibration calibrate(const Backbone& backbone, const Selector& selector,
                      const std::vector<TokenSequence>& sequences, const CalibrationOptions& options,
                      bool show_progress) {
  const SelectionRule own = selector.config().selection.rule;
  const auto measured = measure(backbone, selector, sequences, options, own, show_progress);

  Calibration result;
  result.layers = selector.layers();
  result.p = options.p;
  const std::vector<double>& known = selector.config().selection.temperature;
  if (options.fit_temperature || known.empty())
    result.temperature.assign(result.layers.size(), 1.0);
  else
    result.temperature = known;
  for (const TokenSequence& s : sequences) {
    if (possible_starts(s.tokens.size(), own) <= 0) continue;
    result.contexts += 1;
    result.length = std::max(result.length, static_cast<int64_t>(s.tokens.size()));
  }
  const bool few_sets = selector.groups() <= kernels::kMostSets;
  if (few_sets && !measured.empty())
    for (const double threshold : options.threshold) result.mass_table.push_back({threshold, 0, 0});
  const auto num_layers = static_cast<double>(result.layers.size());
  for (size_t l = 0; l < result.layers.size() && !measured.empty(); ++l) {
    const Samples& samples = measured.at(result.layers[l]);
    const at::Tensor scores = at::cat(samples.scores), mass = at::cat(samples.mass),
                     lengths = at::cat(samples.lengths);
    result.queries = scores.size(0);
    const Nucleus nucleus(scores, mass, lengths, own);
    if (options.fit_temperature) result.temperature[l] = fit_temperature(nucleus, options.p);
    result.captured_before.push_back(nucleus.captured(options.p, 1.0));
    result.captured_after.push_back(nucleus.captured(options.p, result.temperature[l]));

    SelectionRule rule = own;
    rule.temperature = result.temperature[l];
    std::vector<double> residual, total, tokens;
    for (const double p : options.p) {
      rule.p = p;
      const Captured captured = capture(scores, mass, lengths, rule);
      residual.push_back(captured.residual), total.push_back(captured.total);
      tokens.push_back(captured.tokens);
    }
    result.selected_residual.push_back(residual);
    result.selected_total.push_back(total);
    result.selected_tokens.push_back(tokens);

    if (!few_sets) continue;
    // Decode stands at the end of a context: queries near its start see little more than what is always read.
    const at::Tensor late = at::nonzero(lengths.to(at::kLong).mul(4).gt(3 * result.length)).flatten();
    const at::Tensor late_scores = scores.index_select(0, late), late_mass = mass.index_select(0, late),
                     late_lengths = lengths.index_select(0, late);
    result.late_queries = late.size(0);
    rule.mode = SelectionMode::threshold;
    // Never 0: it divides.
    const at::Tensor own_mass =
        nucleus.residual_mass().index_select(0, late).mean(0).clamp_min(1e-6).contiguous().cpu();
    result.residual_mass.insert(result.residual_mass.end(), own_mass.data_ptr<double>(),
                                own_mass.data_ptr<double>() + selector.groups());
    for (MassRow& row : result.mass_table) {
      rule.thresholds.count = 0;
      for (int64_t set = 0; set < selector.groups(); ++set)
        rule.thresholds.of[rule.thresholds.count++] = row.threshold / own_mass[set].item<double>();
      const Captured captured = capture(late_scores, late_mass, late_lengths, rule);
      row.mass += captured.total / num_layers, row.tokens += captured.tokens / num_layers;
    }
  }
  // A lower threshold takes the same blocks and others; sums of float32 may say otherwise in their last bits.
  double most_mass = 0, most_tokens = 0;
  for (MassRow& row : result.mass_table) {
    row.mass = most_mass = std::min(std::max(most_mass, row.mass), 1.0);
    row.tokens = most_tokens = std::min(std::max(most_tokens, row.tokens), 1.0);
  }
  return result;
}

}  // namespace spot
