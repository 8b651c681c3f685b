// The kernel of rotate_heads (ops/layer/layer.h).
#pragma once

#include <ATen/ATen.h>

namespace spot::ops::cuda {

// Whether the kernel takes these.
bool rotation_fits(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                   const at::Tensor& sin);
// `backwards` turns by the negative angles.
at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin, bool backwards);

}  // namespace spot::ops::cuda
