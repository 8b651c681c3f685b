// Plain double-precision oracles of selection and sparse attention.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "selection/selection.h"

namespace spot::test {

struct PlainBlocks {
  int64_t blocks = 0, residual_begin = 0, residual_end = 0;
  bool all = false;
  std::vector<int32_t> order;  // residual blocks, best first

  int64_t reserved() const { return blocks - (residual_end - residual_begin); }
  bool is_reserved(int64_t block) const { return block < residual_begin || block >= residual_end; }
};

// What the rule's text says about one row, before any budget.
inline PlainBlocks plain_blocks(const std::vector<float>& scores, int64_t length, const SelectionRule& rule) {
  PlainBlocks plain;
  plain.blocks = (length + 15) / 16;
  plain.residual_begin = std::min<int64_t>((rule.sinks + 15) / 16, plain.blocks);
  plain.residual_end = std::max(std::max<int64_t>(length - rule.recency, 0) / 16, plain.residual_begin);
  plain.all = length <= rule.floor || plain.residual_begin == plain.residual_end;
  for (int64_t b = plain.residual_begin; b < plain.residual_end; ++b)
    plain.order.push_back(static_cast<int32_t>(b));
  auto value = [&](int32_t b) { return std::isnan(scores[b]) ? -INFINITY : scores[b]; };
  std::stable_sort(plain.order.begin(), plain.order.end(),
                   [&](int32_t a, int32_t b) { return value(a) > value(b); });
  return plain;
}

// Softmax masses of the residual blocks, in plain.order, sum 1 (all 0 when nothing is finite).
inline std::vector<double> plain_masses(const PlainBlocks& plain, const std::vector<float>& scores,
                                        double temperature) {
  std::vector<double> masses;
  auto value = [&](int32_t b) { return std::isnan(scores[b]) ? -INFINITY : static_cast<double>(scores[b]); };
  if (plain.order.empty()) return masses;
  const double top = value(plain.order[0]);
  for (int32_t b : plain.order)
    masses.push_back(std::isinf(top) ? 0.0 : std::exp((value(b) - top) / temperature));
  const double sum = std::accumulate(masses.begin(), masses.end(), 0.0);
  for (double& m : masses) m = sum > 0 ? m / sum : 0;
  return masses;
}

// softmax(scale q K^T) V over chosen token positions, in double. query [Hq, d], key and value [Hkv, L, d],
// chosen[g] the positions of each group's KV heads (one entry: all).
inline at::Tensor plain_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  const std::vector<std::vector<int64_t>>& chosen, double scale) {
  const int64_t heads = query.size(0), kv_heads = key.size(0);
  at::Tensor out = at::zeros(query.sizes(), at::kDouble);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t kv = h / (heads / kv_heads);
    const auto& positions = chosen[chosen.size() == 1 ? 0 : kv];
    if (positions.empty()) continue;
    const at::Tensor index = at::tensor(positions, at::kLong);
    const at::Tensor k = key[kv].index_select(0, index).to(at::kDouble),
                     v = value[kv].index_select(0, index).to(at::kDouble);
    const at::Tensor scores = at::mv(k, query[h].to(at::kDouble)) * scale;
    out[h] = at::mv(v.t(), at::softmax(scores, 0));
  }
  return out;
}

inline std::vector<int64_t> tokens_of_blocks(const at::Tensor& indices, int64_t count, int64_t length) {
  std::vector<int64_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = indices[i].item<int32_t>();
    for (int64_t t = block * 16; t < std::min(block * 16 + 16, length); ++t) tokens.push_back(t);
  }
  return tokens;
}

}  // namespace spot::test
