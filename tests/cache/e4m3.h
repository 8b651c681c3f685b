// What is left of numbers that an FP8 cache kept, by E4M3's definition: 3 bits of fraction, exponents from -6, numbers
// below 2^-6 in steps of 2^-9, no more than 448.
#pragma once

#include <ATen/ATen.h>

namespace spot::test {

// x [tokens, heads, dim], scale [heads]; in x's dtype.
inline at::Tensor kept_by_e4m3(const at::Tensor& x, const at::Tensor& scale) {
  const at::Tensor wide_scale = scale.to(at::kDouble).unsqueeze(1), ratio = x.to(at::kDouble) / wide_scale;
  const at::Tensor exponent = std::get<1>(at::frexp(ratio)).to(at::kDouble) - 1,
                   step = at::exp2(exponent.clamp_min(-6) - 3);
  const at::Tensor nearest = (ratio / step).round() * step;  // ties to even
  return (nearest.clamp(-448, 448) * wide_scale).to(x.scalar_type());
}

}  // namespace spot::test
