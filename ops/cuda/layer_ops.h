// The CUDA kernels behind ops/layer_ops.h; same arguments, already checked there. Launches may begin while
// their predecessor drains (programmatic dependent launch); nothing waits for the device.
#pragma once

#include "ops/layer_ops.h"

namespace spot::ops::cuda {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& factor, double epsilon);
at::Tensor gated_product(const at::Tensor& gate, const at::Tensor& x, bool silu);

// Whether the kernel takes these. `backwards` turns by the negative angles.
bool rotation_fits(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                   const at::Tensor& sin);
at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin, bool backwards);

// Whether the kernel takes this head size and these strides.
bool prologue_fits(const AttentionPrologue& attention);
PrologueOutputs attention_prologue(const AttentionPrologue& attention,
                                   const std::optional<SelectorPrologue>& selector);

}  // namespace spot::ops::cuda
