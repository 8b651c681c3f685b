// The fused CUDA kernels of the Gated DeltaNet behind the operators spot::gated_delta_decode and
// spot::gated_delta_prefill, which src/model/gated_delta.cpp registers; same arguments, already checked
// there.
#pragma once

#include <ATen/ATen.h>

namespace spot::ops::cuda {

// Whether the kernels take these shapes, dtypes and layouts; else the operators use their ATen form.
bool gated_delta_fits(const at::Tensor& mixed_qkv, int64_t key_head_dim, int64_t value_head_dim,
                      const at::Tensor& conv, const at::Tensor& conv_states,
                      const at::Tensor& recurrent_states);

at::Tensor gated_delta_decode(const at::Tensor& mixed_qkv, const at::Tensor& z, const at::Tensor& b,
                              const at::Tensor& a, const at::Tensor& conv, const at::Tensor& decay_rate,
                              const at::Tensor& dt_bias, const at::Tensor& norm, double norm_epsilon,
                              at::Tensor conv_states, at::Tensor recurrent_states,
                              const at::Tensor& state_slots);

at::Tensor gated_delta_prefill(const at::Tensor& mixed_qkv, const at::Tensor& z, const at::Tensor& b,
                               const at::Tensor& a, const at::Tensor& conv, const at::Tensor& decay_rate,
                               const at::Tensor& dt_bias, const at::Tensor& norm, double norm_epsilon,
                               at::Tensor conv_states, at::Tensor recurrent_states,
                               const at::Tensor& state_slots, at::IntArrayRef query_lengths);

}  // namespace spot::ops::cuda
