// What a decoder layer does around its matrix products, one operator (and on CUDA one launch) a stage:
// torch.ops.spot.rms_norm, gated_product and attention_prologue. Their ATen form serves every device and is
// the oracle of the CUDA kernels, which serve float32, bfloat16 and float16. kernels/NOTES.md counts the
// launches. All arithmetic is float32 unless said otherwise; a token's results depend on the token alone.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "ops/ops.h"

namespace spot::ops {

// x / sqrt(mean(x^2) + epsilon) * factor over the last dim, rounded once to x's dtype. x [..., width], factor
// [width] of x's dtype or float32 (where a zero-centred weight w is kept as 1 + w).
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& factor, double epsilon);

// activation(gate) * x, both factors of one shape and dtype, each rounded to it. activation: "silu" or
// "sigmoid". The last dims of gate and x are contiguous; the result is contiguous.
at::Tensor gated_product(const at::Tensor& gate, const at::Tensor& x, const std::string& activation);

// An attention layer's projections, and what makes queries, keys and values of them.
struct AttentionPrologue {
  at::Tensor
      projected;  // [T, rows]: queries (with output_gate each head's query, then its gate) | keys | values
  int64_t num_heads, num_kv_heads, head_dim;
  bool output_gate = false;
  at::Tensor qk_norm;  // [num_heads + num_kv_heads, head_dim] float32: RMSNorm's factors; undefined: no norm
  double norm_eps = 1e-6;
  at::Tensor cos, sin;   // [positions, rotary_dim / 2] float32; the first rotary_dim dims turn, half-split
  at::Tensor positions;  // [T] int64, rows of the tables
  // [num_kv_heads, pages, 16, head_dim] of projected's dtype, contiguous: keys and values are written here
  // too, at slots [T] int64 = page * 16 + offset. Undefined: they are only returned.
  at::Tensor key_pool, value_pool, slots;
};
// A selector's share of the same stage. Needs slots.
struct SelectorPrologue {
  at::Tensor projected;  // [T, (4 + key_heads) * 128] of the model's dtype: queries | keys
  at::Tensor hidden;     // [T, hidden_size] of the model's dtype
  at::Tensor mix;        // [groups * 4, hidden_size] float32
  double mix_scale = 1.0;
  KeyPreparation preparation;  // its tables also turn the queries
  at::Tensor pool;             // as append_projected_keys takes it, with format and global_scale
  std::string format;
  double global_scale = 1.0;
};
struct PrologueOutputs {
  at::Tensor query;            // [T, num_heads, head_dim] after QK norm and RoPE; all contiguous
  at::Tensor key;              // [T, num_kv_heads, head_dim] after QK norm and RoPE
  at::Tensor value;            // [T, num_kv_heads, head_dim]
  at::Tensor selector_query;   // [T, 4, 128] after RoPE; undefined without a selector
  at::Tensor selector_weight;  // [T, groups * 4] float32: mix_scale * mix . hidden
};
PrologueOutputs attention_prologue(const AttentionPrologue& attention,
                                   const std::optional<SelectorPrologue>& selector = {});

// Turns dims i and i + half of x [T, heads, dim] by row positions[t] of cos and sin [positions, half]; the
// rest passes. In float32; contiguous, in x's dtype. Differentiable. On CUDA a kernel with a gradient of its
// own,
// for the shapes and dtypes that it takes.
at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin);

}  // namespace spot::ops
