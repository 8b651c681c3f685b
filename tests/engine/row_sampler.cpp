#include "tests/engine/row_sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "core/error.h"

namespace spot {

RowSampler::RowSampler(const SamplingOptions& options) : options_(options), random_(options.seed) {
  options_.check(INT64_MAX);
}

int32_t RowSampler::sample(const at::Tensor& logits) {
  const at::Tensor row = logits.to(at::kCPU, at::kFloat).contiguous();
  const float* values = row.data_ptr<float>();
  const int64_t n = row.numel();
  int64_t best = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isnan(values[i])) fail("logits hold NaN at token id {}; the model or its weights are broken", i);
    if (values[i] > values[best]) best = i;
  }
  if (!std::isfinite(values[best])) fail("logits hold no finite value; the model or its weights are broken");
  if (options_.temperature == 0) return static_cast<int32_t>(best);

  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  const int64_t keep = options_.top_k > 0 ? std::min(options_.top_k, n) : n;
  auto before = [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; };
  std::partial_sort(order.begin(), order.begin() + keep, order.end(), before);
  std::vector<double> weights(keep);
  double total = 0;
  for (int64_t i = 0; i < keep; ++i) {
    weights[i] = std::exp((static_cast<double>(values[order[i]]) - values[best]) / options_.temperature);
    total += weights[i];
  }
  double nucleus = 0;
  int64_t kept = 0;
  while (kept < keep && nucleus < options_.top_p * total) nucleus += weights[kept++];
  // 53 random bits: the same draw from every standard library, which uniform_real_distribution does not
  // promise.
  double left = static_cast<double>(random_() >> 11) * 0x1p-53 * nucleus;
  for (int64_t i = 0; i < kept; ++i) {
    left -= weights[i];
    if (left < 0) return order[i];
  }
  return order[kept - 1];
}

}  // namespace spot
