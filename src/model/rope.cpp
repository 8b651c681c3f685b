#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/error.h"
#include "ops/layer/layer.h"

namespace spot {
namespace {

// Frequencies of YaRN: dims that turn more than beta_fast times over the original length keep theirs, those
// that turn less than beta_slow times are slowed by `factor`, and a linear ramp joins the two.
at::Tensor yarn_frequencies(const RopeConfig& config, const at::Tensor& positions_per_radian, int64_t dim) {
  const double original = static_cast<double>(config.original_max_position_embeddings);
  const auto dim_that_turns = [&](double turns) {
    return static_cast<double>(dim) * std::log(original / (turns * 2 * std::numbers::pi)) /
           (2 * std::log(config.theta));
  };
  double low = dim_that_turns(config.beta_fast), high = dim_that_turns(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  const at::Tensor ramp = at::arange(dim / 2, at::kFloat).sub(low).div(high - low).clamp(0, 1);
  const at::Tensor keep = 1 - ramp;
  return at::reciprocal(positions_per_radian * config.factor) * (1 - keep) +
         at::reciprocal(positions_per_radian) * keep;
}

// Frequencies of Llama 3.1: long wavelengths are slowed by `factor`, short ones kept, those between
// interpolated.
at::Tensor llama3_frequencies(const RopeConfig& config, const at::Tensor& frequencies) {
  const double original = static_cast<double>(config.original_max_position_embeddings);
  // Products with reciprocals, as Python's scalar / tensor is computed: a last bit here is 1e-5 at far
  // positions.
  const at::Tensor wavelength = at::reciprocal(frequencies) * (2 * std::numbers::pi);
  const at::Tensor smooth = (at::reciprocal(wavelength) * original - config.low_freq_factor) /
                            (config.high_freq_factor - config.low_freq_factor);
  const at::Tensor between = (1 - smooth) * frequencies / config.factor + smooth * frequencies;
  const at::Tensor outer =
      at::where(wavelength > original / config.low_freq_factor, frequencies / config.factor, frequencies);
  const at::Tensor is_between = (wavelength >= original / config.high_freq_factor)
                                    .logical_and(wavelength <= original / config.low_freq_factor);
  return at::where(is_between, between, outer);
}

}  // namespace

RopeTable rope_table(const RopeConfig& config, int64_t num_positions, at::Device device, int64_t rotary_dim) {
  const int64_t dim = rotary_dim == 0 ? config.rotary_dim : rotary_dim;
  if (dim < 2 || dim % 2 != 0)
    fail("a rotary embedding over {} dims is not possible; the number must be even", dim);
  // Computed on the CPU, so that the table is the same on every device.
  const at::Tensor positions_per_radian =
      at::pow(config.theta, at::arange(0, dim, 2, at::kFloat).div(static_cast<double>(dim)));
  at::Tensor frequencies = at::reciprocal(positions_per_radian);
  double attention_factor = 1.0;
  if (config.scaling == RopeScaling::yarn) {
    frequencies = yarn_frequencies(config, positions_per_radian, dim);
    attention_factor = config.attention_factor != 0 ? config.attention_factor
                       : config.factor <= 1         ? 1.0
                                                    : 0.1 * std::log(config.factor) + 1.0;
  } else if (config.scaling == RopeScaling::llama3) {
    frequencies = llama3_frequencies(config, frequencies);
  } else if (config.scaling == RopeScaling::linear) {
    frequencies.div_(config.factor);
  }
  const at::Tensor angles = at::arange(num_positions, at::kFloat).unsqueeze(1) * frequencies;
  return {at::cos(angles).mul_(attention_factor).to(device),
          at::sin(angles).mul_(attention_factor).to(device)};
}

at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const RopeTable& table) {
  const int64_t dims = 2 * table.cos.size(1);
  if (x.dim() != 3 || dims > x.size(2)) {
    fail("a rotary embedding of {} dims does not fit heads of {}", dims, x.dim() == 3 ? x.size(2) : 0);
  }
  return ops::rotate_heads(x, positions, table.cos, table.sin);
}

}  // namespace spot
