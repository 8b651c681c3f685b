// A few float32 rows times bfloat16 states, to float32 accuracy, without a float32 copy of the states.
#pragma once

#include <ATen/ATen.h>

namespace spot {

// x [T, columns] bfloat16 times weight [rows, columns] float32: [T, rows] float32, as at::linear of x in
// float32 is. The float32 side of each product is split into three bfloat16 pieces that add up to it, so that
// tensor cores multiply them. Differentiable in both; meant for few rows.
at::Tensor wide_linear(const at::Tensor& x, const at::Tensor& weight);

}  // namespace spot
