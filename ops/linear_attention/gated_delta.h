// Gated DeltaNet, the linear attention of Qwen3.5 (Yang et al., "Gated Delta Networks", arXiv 2412.06464):
// what lies between a layer's input projections and its output projection, as functions on tensors.
//
// H_k key heads of D_k dims, H_v value heads of D_v; value head h reads key head h / (H_v / H_k). Channels
// are 2 H_k D_k + H_v D_v, in the order q | k | v. Per token and value head, with state S [D_k, D_v]:
//   u = SiLU(causal depthwise convolution of the channels)       q, k, v = split(u)
//   q = D_k^-1/2 q / sqrt(|q|^2 + 1e-6),  k = k / sqrt(|k|^2 + 1e-6)
//   g = -exp(A_log) softplus(a + dt_bias),  beta = sigmoid(b)
//   S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q
//   y = RMSNorm(o) * weight * SiLU(z)
//
// Inputs may be float32, bfloat16 or float16, with any strides between tokens; all arithmetic and both states
// are float32. CPU and CUDA tensors alike; where the build has SPOT_CUDA and the shape fits
// kernels/gated_delta.h, CUDA tensors go to the fused kernels. Functions throw c10::Error on shapes and dtypes
// that do not fit.
//
// States live in pools whose first dimension is a slot; state_slots [num_sequences] int64, on the pools'
// device, says which slot a sequence has. Slots of one call must be distinct and in range. A zeroed slot is
// an empty past. The functions below update the slots in place, reading no device value on the host: decode
// may be captured in a CUDA graph (the slots' contents may change between replays).
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "ops/op.h"

namespace spot::ops {

// A layer's weights in the form used here, float32, on the layer's device. Make them with
// gated_delta_weights().
struct GatedDeltaWeights {
  at::Tensor conv;        // [conv_kernel, channels], oldest tap first
  at::Tensor decay_rate;  // [H_v], exp(A_log)
  at::Tensor dt_bias;     // [H_v]
  at::Tensor norm;        // [D_v], the output norm's weight (plain, not zero-centred)
  double norm_epsilon = 1e-6;
};

// From the tensors of a checkpoint: conv1d.weight [channels, 1, conv_kernel] (or [channels, conv_kernel]),
// A_log [H_v], dt_bias [H_v], norm.weight [D_v]; any floating dtype.
GatedDeltaWeights gated_delta_weights(const at::Tensor& conv1d_weight, const at::Tensor& a_log,
                                      const at::Tensor& dt_bias, const at::Tensor& norm_weight,
                                      double norm_epsilon);

// The whole layer between its projections, of T tokens.
struct GatedDeltaLayer {
  at::Tensor mixed_qkv;  // [T, channels], as z, b and a the projections' outputs
  at::Tensor z;          // [T, H_v * D_v] or [T, H_v, D_v]
  at::Tensor b, a;       // [T, H_v]
  GatedDeltaWeights weights;
  at::Tensor conv_states;       // [slots, conv_kernel - 1, channels] float32, oldest input first
  at::Tensor recurrent_states;  // [slots, H_v, D_k, D_v] float32
  at::Tensor state_slots;       // [num_sequences] int64

  template <auto... kAt>
  static constexpr auto fields() {
    using L = GatedDeltaLayer;
    using W = GatedDeltaWeights;
    return std::tuple(required<kAt..., &L::mixed_qkv>("mixed_qkv"), required<kAt..., &L::z>("z"),
                      required<kAt..., &L::b>("b"), required<kAt..., &L::a>("a"),
                      required<kAt..., &L::weights, &W::conv>("conv"),
                      required<kAt..., &L::weights, &W::decay_rate>("decay_rate"),
                      required<kAt..., &L::weights, &W::dt_bias>("dt_bias"),
                      required<kAt..., &L::weights, &W::norm>("norm"),
                      required<kAt..., &L::weights, &W::norm_epsilon>("norm_epsilon"),
                      updated<kAt..., &L::conv_states>("conv_states"),
                      updated<kAt..., &L::recurrent_states>("recurrent_states"),
                      required<kAt..., &L::state_slots>("state_slots"));
  }
};

// One token a sequence, by the recurrent step. [T, H_v * D_v] in mixed_qkv's dtype, to be multiplied by out_proj.
struct GatedDeltaDecode {
  static constexpr const char* kName = "gated_delta_decode";
  using Result = at::Tensor;
  GatedDeltaLayer layer;

  static constexpr auto fields() { return GatedDeltaLayer::fields<&GatedDeltaDecode::layer>(); }
  void check() const;
};
at::Tensor gated_delta_decode(const GatedDeltaDecode& arguments);

// Sequences laid end to end, sequence i having query_lengths[i] tokens (0 is allowed), by the chunked form.
struct GatedDeltaPrefill {
  static constexpr const char* kName = "gated_delta_prefill";
  using Result = at::Tensor;
  GatedDeltaLayer layer;
  std::vector<int64_t> query_lengths;

  static constexpr auto fields() {
    using S = GatedDeltaPrefill;
    return std::tuple_cat(GatedDeltaLayer::fields<&S::layer>(),
                          std::tuple(required<&S::query_lengths>("query_lengths")));
  }
  void check() const;
};
at::Tensor gated_delta_prefill(const GatedDeltaPrefill& arguments);

// gated_delta_decode when every length is 1, else gated_delta_prefill.
at::Tensor gated_delta_layer(const GatedDeltaLayer& layer, const std::vector<int64_t>& query_lengths);

// The parts, in plain ATen operations.

// SiLU of the depthwise causal convolution of x [T, channels] with weight [conv_kernel, channels] float32,
// each sequence continuing from its slot of conv_states, which then holds its last conv_kernel - 1 inputs.
// float32 [T, channels].
at::Tensor causal_conv_silu(const at::Tensor& x, const at::Tensor& weight, at::Tensor conv_states,
                            const at::Tensor& state_slots, const std::vector<int64_t>& query_lengths);

// x / sqrt(sum x^2 + 1e-6) over the last dimension, float32.
at::Tensor l2_normalized(const at::Tensor& x);

struct DeltaGates {
  at::Tensor log_decay;  // g <= 0, [T, H_v] float32
  at::Tensor beta;       // in (0, 1), [T, H_v] float32
};
DeltaGates delta_gates(const at::Tensor& b, const at::Tensor& a, const GatedDeltaWeights& weights);

// The recurrence alone. query [T, H_k, D_k], already normalised and scaled; key [T, H_k, D_k], already
// normalised; value [T, H_v, D_v]; all float32. Returns o [T, H_v, D_v] float32 and updates recurrent_states.
//
// Chunked form, for prefill: chunks of 64 tokens, the triangular system of the delta rule solved within a
// chunk, the state carried from chunk to chunk (WY representation; Yang et al., arXiv 2406.06484). Equal to
// the recurrence up to rounding.
at::Tensor gated_delta_chunked(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                               const DeltaGates& gates, at::Tensor recurrent_states,
                               const at::Tensor& state_slots, const std::vector<int64_t>& query_lengths);
// One token a sequence, for decode: T = num_sequences.
at::Tensor gated_delta_step(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const DeltaGates& gates, at::Tensor recurrent_states,
                            const at::Tensor& state_slots);

// RMSNorm(o) * weight * SiLU(z) over the last dimension: o [T, H_v, D_v] float32, z of as many elements,
// weight [D_v] float32. Returns [T, H_v * D_v] in z's dtype.
at::Tensor gated_rms_norm(const at::Tensor& o, const at::Tensor& z, const at::Tensor& weight, double epsilon);

}  // namespace spot::ops
