// What a decoder layer does around its matrix products, one operator (and on CUDA one launch) a stage. Their ATen
// form serves every device and is the oracle of the CUDA kernels, which serve float32, bfloat16 and float16.
// kernels/NOTES.md counts the launches. All arithmetic is float32 unless said otherwise; a token's results depend
// on the token alone.
#pragma once

#include <ATen/ATen.h>

#include <string>

#include "ops/op.h"
#include "ops/selector/selector.h"

namespace spot::ops {

// x / sqrt(mean(x^2) + epsilon) * factor over the last dim, rounded once to x's dtype; x's sizes, contiguous.
struct RmsNorm {
  static constexpr const char* kName = "rms_norm";
  using Result = at::Tensor;
  at::Tensor x;       // [..., width]
  at::Tensor factor;  // [width] of x's dtype or float32 (where a zero-centred weight w is kept as 1 + w)
  double epsilon = 1e-6;

  static constexpr auto fields() {
    using S = RmsNorm;
    return std::tuple(required<&S::x>("x"), required<&S::factor>("factor"), required<&S::epsilon>("epsilon"));
  }
  void check() const;
};
at::Tensor rms_norm(const RmsNorm& arguments);

// activation(gate) * x, each rounded to their dtype; contiguous.
struct GatedProduct {
  static constexpr const char* kName = "gated_product";
  using Result = at::Tensor;
  at::Tensor gate, x;      // of one shape of 2 or 3 dims and one dtype, the last dims contiguous
  std::string activation;  // "silu" or "sigmoid"

  static constexpr auto fields() {
    using S = GatedProduct;
    return std::tuple(required<&S::gate>("gate"), required<&S::x>("x"),
                      required<&S::activation>("activation"));
  }
  void check() const;
};
at::Tensor gated_product(const GatedProduct& arguments);

// A selector's share of attention_prologue; `projected` undefined: none. Needs slots.
struct SelectorPrologue {
  at::Tensor projected;  // [T, (4 + key_heads) * 128] of the model's dtype: queries | keys
  at::Tensor hidden;     // [T, hidden_size] of the model's dtype
  at::Tensor mix;        // [groups * 4, hidden_size] float32
  double mix_scale = 1.0;
  KeyPreparation preparation;  // its tables also turn the queries; its positions are the attention's
  at::Tensor pool;             // as selector_key_append takes it, with format and global_scale
  KeyFormat format = KeyFormat::bf16;
  double global_scale = 1.0;
};

// From an attention layer's projections to its queries, keys and values, these also into the paged cache.
struct AttentionPrologue {
  static constexpr const char* kName = "attention_prologue";
  struct Result {
    static constexpr std::array<const char*, 5> kNames = {"query", "key", "value", "selector_query",
                                                          "selector_weight"};
    at::Tensor query;            // [T, num_heads, head_dim] after QK norm and RoPE; all contiguous
    at::Tensor key;              // [T, num_kv_heads, head_dim] after QK norm and RoPE
    at::Tensor value;            // [T, num_kv_heads, head_dim]
    at::Tensor selector_query;   // [T, 4, 128] after RoPE; without a selector undefined (torch.ops: [0])
    at::Tensor selector_weight;  // [T, groups * 4] float32: mix_scale * mix . hidden
  };
  // [T, rows]: queries (with output_gate each head's query, then its gate) | keys | values
  at::Tensor projected;
  int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  bool output_gate = false;
  at::Tensor qk_norm;  // [num_heads + num_kv_heads, head_dim] float32: RMSNorm's factors; undefined: no norm
  double norm_eps = 1e-6;
  at::Tensor cos, sin;   // [positions, rotary_dim / 2] float32; the first rotary_dim dims turn, half-split
  at::Tensor positions;  // [T] int64, rows of the tables
  // [num_kv_heads, pages, 16, head_dim] of projected's dtype or float8_e4m3fn, any strides but contiguous dims, equal
  // for both: keys and values are written here too, at slots [T] int64 = page * 16 + offset, but where a slot is
  // negative. Undefined: they are only returned.
  at::Tensor key_pool, value_pool, slots;
  SelectorPrologue selector = {};
  // Of float8_e4m3fn pools, contiguous [num_kv_heads] float32; undefined: 1. What is stored is the returned key or value
  // divided by its head's scale (ops/e4m3.h).
  at::Tensor key_scale, value_scale;

  static constexpr auto fields() {
    using S = AttentionPrologue;
    using P = SelectorPrologue;
    using K = KeyPreparation;
    constexpr auto at = &S::selector;
    constexpr auto keys = &P::preparation;
    return std::tuple(
        required<&S::projected>("projected"), required<&S::num_heads>("num_heads"),
        required<&S::num_kv_heads>("num_kv_heads"), required<&S::head_dim>("head_dim"),
        required<&S::cos>("cos"), required<&S::sin>("sin"), required<&S::positions>("positions"),
        optional<&S::output_gate>("output_gate"), optional<&S::qk_norm>("qk_norm"),
        optional<&S::norm_eps>("norm_eps"), optional_updated<&S::key_pool>("key_pool"),
        optional_updated<&S::value_pool>("value_pool"), optional<&S::slots>("slots"),
        optional<at, &P::projected>("selector_projected"), optional<at, &P::hidden>("hidden"),
        optional<at, &P::mix>("mix"), optional<at, &P::mix_scale>("mix_scale"),
        optional<at, keys, &K::norm>("key_norm"), optional<at, keys, &K::norm_weight>("key_norm_weight"),
        optional<at, keys, &K::norm_bias>("key_norm_bias"), optional<at, keys, &K::norm_eps>("key_norm_eps"),
        optional<at, keys, &K::cos>("selector_cos"), optional<at, keys, &K::sin>("selector_sin"),
        optional_updated<at, &P::pool>("selector_pool"), optional<at, &P::format>("format"),
        optional<at, &P::global_scale>("global_scale"), optional<&S::key_scale>("key_scale"),
        optional<&S::value_scale>("value_scale"));
  }
  void check() const;
};
AttentionPrologue::Result attention_prologue(const AttentionPrologue& arguments);

// The selector's share alone, where another program prepares the attention's own queries, keys and values.
struct SelectorPrologueAlone {
  static constexpr const char* kName = "selector_prologue";
  struct Result {
    static constexpr std::array<const char*, 2> kNames = {"query", "weight"};
    at::Tensor query;   // [T, 4, 128] after RoPE
    at::Tensor weight;  // [T, groups, 4] float32: mix_scale * mix . hidden
  };
  SelectorPrologue selector;  // with its own positions, where its tables are given
  at::Tensor slots;           // [T] int64 = page * 16 + offset; a negative slot is skipped

  static constexpr auto fields() {
    using S = SelectorPrologueAlone;
    using P = SelectorPrologue;
    constexpr auto at = &S::selector;
    return std::tuple_cat(
        std::tuple(updated<at, &P::pool>("pool"), required<&S::slots>("slots"),
                   required<at, &P::projected>("projected"), required<at, &P::hidden>("hidden"),
                   required<at, &P::mix>("mix"), required<at, &P::format>("format"),
                   optional<at, &P::global_scale>("global_scale"), optional<at, &P::mix_scale>("mix_scale")),
        KeyPreparation::fields<at, &P::preparation>());
  }
  void check() const;
};
SelectorPrologueAlone::Result selector_prologue(const SelectorPrologueAlone& arguments);

// The key append that a prologue with a selector contains; positions dense as the attention's are.
SelectorKeyAppend selector_append(const SelectorPrologue& selector, const at::Tensor& slots,
                                  const at::Tensor& positions);

// Turns dims i and i + half of x [T, heads, dim] by row positions[t] of cos and sin [positions, half]; the rest
// passes. In float32; contiguous, in x's dtype. Differentiable. No operator: on CUDA a kernel with a gradient of
// its own, for the shapes and dtypes that it takes, elsewhere ATen's operators.
at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin);

}  // namespace spot::ops
