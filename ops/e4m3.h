// Numbers as float8_e4m3fn codes under a scale a head: how an FP8 cache keeps keys and values.
#pragma once

#include <ATen/ATen.h>

namespace spot::ops {

inline constexpr double kLargestE4m3 = 448;

// Codes of x / scale, divided in float32 and rounded once, to nearest even. x [..., heads, dim] floating point; scale
// [heads] float32, undefined: 1. What lies past +-448 saturates (torch's cast makes it NaN); NaN stays NaN.
inline at::Tensor to_e4m3(const at::Tensor& x, const at::Tensor& scale) {
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor ratio = scale.defined() ? wide / scale.unsqueeze(-1) : wide;
  return ratio.clamp(-kLargestE4m3, kLargestE4m3).to(at::kFloat8_e4m3fn);
}

}  // namespace spot::ops
