// The gated delta rule of linear-attention layers (Gated DeltaNet, arXiv 2412.06464).
//
// Per value head a state S [key_head_dim, value_head_dim] follows
//   S <- e^g S;  d = beta (v - S^T k);  S <- S + k d^T;  o = S^T q.
// Everything is float32. Queries and keys come normalised, the query scaled, one head per value head.
#pragma once

#include <ATen/ATen.h>

namespace spot {

// What the rule reads for N tokens.
struct GatedDeltaInputs {
  at::Tensor query, key;  // [N, heads, key_head_dim]
  at::Tensor value;       // [N, heads, value_head_dim]
  at::Tensor log_decay;   // [N, heads], g <= 0
  at::Tensor beta;        // [N, heads]
};

// One token of each of N sequences. states [N, heads, key_head_dim, value_head_dim] are updated in place.
// Returns [N, heads, value_head_dim].
at::Tensor gated_delta_step(const GatedDeltaInputs& inputs, at::Tensor& states);

// N consecutive tokens of one sequence, in chunks of 64: inside a chunk the updates are one triangular
// system, so that the work is matrix products and only the states between chunks are sequential. state
// [heads, key_head_dim, value_head_dim] is updated in place. Returns [N, heads, value_head_dim].
at::Tensor gated_delta_prefill(const GatedDeltaInputs& inputs, at::Tensor& state);

}  // namespace spot
