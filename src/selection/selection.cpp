#include "selection/selection.h"

#include <cmath>
#include <limits>

#include "core/error.h"

namespace spot {

void validate(const SelectionRule& rule) {
  auto require = [](bool holds, const char* field, auto value, const char* wanted) {
    if (!holds) fail("selection rule: {} is {}; it must be {}", field, value, wanted);
  };
  require(rule.budget >= 0, "budget", rule.budget, "0 or more tokens");
  require(rule.budget_fraction >= 0 && rule.budget_fraction <= 1, "budget_fraction", rule.budget_fraction,
          "0 (unused) to 1");
  require(rule.p > 0 && rule.p <= 1, "p", rule.p, "above 0 and at most 1");
  require(rule.threshold > 0 && rule.threshold <= 1, "threshold", rule.threshold, "above 0 and at most 1");
  require(rule.sinks >= 0, "sinks", rule.sinks, "0 or more tokens");
  require(rule.recency >= 0, "recency", rule.recency, "0 or more tokens");
  require(rule.floor >= 0, "floor", rule.floor, "0 or more tokens");
  require(rule.cap >= 0 && (rule.cap == 0 || rule.cap >= rule.floor), "cap", rule.cap,
          "0 (none) or at least the floor");
  require(rule.temperature > 0 && std::isfinite(rule.temperature), "temperature", rule.temperature,
          "positive");
}

std::string describe(const SelectionRule& rule) {
  const std::string most = rule.cap > 0 ? fmt::format(", at most {}", rule.cap) : "";
  if (rule.mode == SelectionMode::top_p) return fmt::format("top-p {:g}{}", rule.p, most);
  if (rule.mode == SelectionMode::threshold) return fmt::format("threshold {:g}{}", rule.threshold, most);
  return rule.budget_fraction > 0 ? fmt::format("top-k {:g}%", 100 * rule.budget_fraction)
                                  : fmt::format("top-k {}", rule.budget);
}

Selection select_blocks(const at::Tensor& scores, const at::Tensor& lengths, const SelectionRule& rule) {
  validate(rule);
  auto [indices, counts, mass] = ops::select_blocks({scores, lengths, rule});
  return {indices, counts, mass, lengths};
}

at::Tensor block_max(const at::Tensor& token_scores) {
  const int64_t tokens = token_scores.size(-1), blocks = (tokens + kBlockSize - 1) / kBlockSize;
  at::Tensor padded = token_scores;
  if (tokens % kBlockSize != 0)
    padded = at::constant_pad_nd(token_scores, {0, blocks * kBlockSize - tokens},
                                 -std::numeric_limits<float>::infinity());
  std::vector<int64_t> shape(token_scores.sizes().begin(), token_scores.sizes().end() - 1);
  shape.push_back(blocks);
  shape.push_back(kBlockSize);
  return padded.reshape(shape).amax(-1);
}

Selection Selection::row(int64_t index) const {
  return {indices.narrow(0, index, 1),
          counts.narrow(0, index, 1),
          predicted_mass.narrow(0, index, 1),
          lengths.narrow(0, index, 1),
          tokens.defined() ? tokens.narrow(0, index, 1) : at::Tensor(),
          token_counts.defined() ? token_positions.narrow(0, index, 1) : at::Tensor(),
          token_counts.defined() ? token_counts.narrow(0, index, 1) : at::Tensor()};
}

at::Tensor token_flags(const Selection& selection) {
  const int64_t width = selection.indices.size(2) * kBlockSize, listed = selection.token_positions.size(2);
  // Indices ascend, but for their padding.
  const at::Tensor sorted =
      selection.indices.masked_fill(selection.indices < 0, std::numeric_limits<int32_t>::max());
  const at::Tensor missing =
      at::arange(listed, selection.token_counts.options()) >= selection.token_counts.unsqueeze(2);
  const at::Tensor token = selection.token_positions.masked_fill(missing, 0).to(at::kLong);
  const at::Tensor block = at::div(token, kBlockSize, "floor").to(at::kInt);
  const at::Tensor place = at::searchsorted(sorted, block) * kBlockSize + token.remainder(kBlockSize);
  // One column more takes what is not there.
  at::Tensor flags =
      at::zeros({selection.rows(), selection.groups(), width + 1}, token.options().dtype(at::kBool));
  return flags.scatter_(2, place.masked_fill(missing, width), true).narrow(2, 0, width).contiguous();
}

at::Tensor block_mask(const Selection& selection, int64_t blocks) {
  // One column more than there are blocks takes the padding.
  const at::Tensor index = at::where(selection.indices < 0, blocks, selection.indices).to(at::kLong);
  at::Tensor mask =
      at::zeros({selection.rows(), selection.groups(), blocks + 1}, index.options().dtype(at::kBool));
  return mask.scatter_(2, index, true).narrow(2, 0, blocks);
}

at::Tensor token_mask(const Selection& selection, int64_t length) {
  const int64_t blocks = (length + kBlockSize - 1) / kBlockSize;
  if (!selection.tokens.defined())
    return block_mask(selection, blocks).repeat_interleave(kBlockSize, 2).narrow(2, 0, length);
  const int64_t rows = selection.rows(), groups = selection.groups();
  // As in block_mask, with whole blocks of tokens for columns.
  const at::Tensor index = at::where(selection.indices < 0, blocks, selection.indices)
                               .to(at::kLong)
                               .unsqueeze(3)
                               .expand({-1, -1, -1, kBlockSize});
  at::Tensor mask = at::zeros({rows, groups, blocks + 1, kBlockSize}, selection.tokens.options());
  mask.scatter_(2, index, selection.tokens.view({rows, groups, -1, kBlockSize}));
  return mask.view({rows, groups, -1}).narrow(2, 0, length);
}

std::pair<at::Tensor, at::Tensor> count_tokens(const Selection& selection, const at::Tensor& visible) {
  const at::Tensor lengths = visible.to(at::kLong).unsqueeze(1);
  if (selection.tokens.defined())
    return {selection.tokens.sum(2).to(at::kDouble).mean(1).sum(), lengths.sum()};
  const at::Tensor blocks = at::div(lengths + (kBlockSize - 1), kBlockSize, "floor");
  const at::Tensor missing =
      blocks * kBlockSize - lengths;  // of the last block, which is always kept when partial
  const at::Tensor kept = (selection.counts.to(at::kLong) * kBlockSize - missing).clamp_min(0);
  return {kept.to(at::kDouble).mean(1).sum(), lengths.sum()};
}

}  // namespace spot
