// The selector's operators: from a layer's hidden states to queries, mixing weights and keys, keys into their
// paged cache, and from the cache to block scores. src/selector/selector.h has the formulas.
//
// R rows: a row is one query with its own page table row and length; decode has one row a sequence. Page tables
// hold page ids, 16 tokens a page, [R, pages] int32 (a row may be expanded over R); lengths [R] int32 count a
// row's visible tokens, its own included. The CPU implementations are the oracle of the CUDA ones.
//
// A pool of selector keys is contiguous uint8 [pages, key_heads, bytes of a page and head], key_heads 1 (shared)
// or 4; kernels/key_format.h defines the formats, of which f32 exists on the CPU only.
#pragma once

#include <ATen/ATen.h>

#include "kernels/key_format.h"
#include "kernels/selector_key_math.h"
#include "ops/op.h"

namespace spot::ops {

using kernels::KeyFormat;
using kernels::KeyNorm;

// How projected keys become stored ones: norm over each key's 128 dims, then RoPE on the first 64, half-split.
struct KeyPreparation {
  KeyNorm norm = KeyNorm::none;
  at::Tensor norm_weight, norm_bias;  // [128] float32; undefined: 1 and 0
  double norm_eps = 1e-6;
  at::Tensor cos, sin;   // [positions, 32] float32; undefined: no rotation
  at::Tensor positions;  // [T] int64, rows of the tables

  // `kAt` leads from an operator's struct to this one.
  template <auto... kAt>
  static constexpr auto fields() {
    using P = KeyPreparation;
    return std::tuple(optional<kAt..., &P::norm>("norm"), optional<kAt..., &P::norm_weight>("norm_weight"),
                      optional<kAt..., &P::norm_bias>("norm_bias"),
                      optional<kAt..., &P::norm_eps>("norm_eps"), optional<kAt..., &P::cos>("cos"),
                      optional<kAt..., &P::sin>("sin"), optional<kAt..., &P::positions>("positions"));
  }
  void check(const char* op, const at::Tensor& keys) const;  // keys [T, any, 128]
};

// Writes keys at their slots, prepared in the same kernel, all in float32. A negative slot is skipped.
struct SelectorKeyAppend {
  static constexpr const char* kName = "selector_key_append";
  using Result = void;
  at::Tensor pool;
  at::Tensor slots;  // [T] int64 = page * 16 + offset
  at::Tensor keys;   // [T, key_heads, 128], any floating dtype
  KeyFormat format = KeyFormat::bf16;
  double global_scale = 1.0;  // nvfp4's
  KeyPreparation preparation = {};

  static constexpr auto fields() {
    using S = SelectorKeyAppend;
    return std::tuple_cat(
        std::tuple(updated<&S::pool>("pool"), required<&S::slots>("slots"), required<&S::keys>("keys"),
                   required<&S::format>("format"), optional<&S::global_scale>("global_scale")),
        KeyPreparation::fields<&S::preparation>());
  }
  void check() const;
};
void selector_key_append(const SelectorKeyAppend& arguments);

// The first `length` tokens behind a page table, dequantised: [length, key_heads, 128] float32.
struct SelectorKeyGather {
  static constexpr const char* kName = "selector_key_gather";
  using Result = at::Tensor;
  at::Tensor pool;
  at::Tensor page_table;  // [pages] int32
  int64_t length = 0;
  KeyFormat format = KeyFormat::bf16;
  double global_scale = 1.0;

  static constexpr auto fields() {
    using S = SelectorKeyGather;
    return std::tuple(required<&S::pool>("pool"), required<&S::page_table>("page_table"),
                      required<&S::length>("length"), required<&S::format>("format"),
                      optional<&S::global_scale>("global_scale"));
  }
  void check() const;
};
at::Tensor selector_key_gather(const SelectorKeyGather& arguments);

// Block scores [R, groups, max_blocks] float32: the maximum over a block's visible tokens of
// sum_h weight[r, g, h] ReLU(query[r, h] . key[token, h]); -inf past the length.
struct ScoreBlocks {
  static constexpr const char* kName = "score_blocks";
  using Result = at::Tensor;
  at::Tensor query;   // [R, 4, 128], any floating dtype
  at::Tensor weight;  // [R, groups, 4] float32
  at::Tensor pool;
  at::Tensor page_table, lengths;
  KeyFormat format = KeyFormat::bf16;
  double global_scale = 1.0;
  int64_t max_blocks = 0;  // 0: the page table's width

  static constexpr auto fields() {
    using S = ScoreBlocks;
    return std::tuple(required<&S::query>("query"), required<&S::weight>("weight"),
                      required<&S::pool>("pool"), required<&S::page_table>("page_table"),
                      required<&S::lengths>("lengths"), required<&S::format>("format"),
                      optional<&S::global_scale>("global_scale"), optional<&S::max_blocks>("max_blocks"));
  }
  void check() const;
};
at::Tensor score_blocks(const ScoreBlocks& arguments);

// A layer's hidden states through its selector:
//   query   RoPE(hidden W_q)            [T, 4, 128] of hidden's dtype
//   weight  mix_scale * hidden W_w      [T, groups, 4] float32 (float64 for float64 hidden)
//   key     RoPE(norm(hidden W_k))      [T, key_heads, 128] of hidden's dtype
// The products of query and key run in hidden's dtype, norm, RoPE and weight in float32 (float64). Differentiable
// in hidden and the weights. Source: SpotAttention (arXiv 2606.22874) section 2.2.
struct SelectorProject {
  static constexpr const char* kName = "selector_project";
  struct Result {
    static constexpr std::array<const char*, 3> kNames = {"query", "weight", "key"};
    at::Tensor query, weight, key;
  };
  at::Tensor hidden;        // [T, hidden_size]
  at::Tensor query_weight;  // [4 * 128, hidden_size]
  at::Tensor key_weight;    // [key_heads * 128, hidden_size]
  at::Tensor mix_weight;    // [groups * 4, hidden_size]
  at::Tensor positions;     // [T] int64, rows of cos and sin
  KeyNorm norm = KeyNorm::none;
  at::Tensor norm_weight, norm_bias;  // [128]; undefined: 1 and 0
  double norm_eps = 1e-6;
  at::Tensor cos, sin;  // [positions, half] float32, the first 2 * half dims turn; undefined: no rotation
  double mix_scale = 0.04419417382415922;  // (4 * 128)^-1/2

  static constexpr auto fields() {
    using S = SelectorProject;
    return std::tuple(required<&S::hidden>("hidden"), required<&S::query_weight>("query_weight"),
                      required<&S::key_weight>("key_weight"), required<&S::mix_weight>("mix_weight"),
                      required<&S::positions>("positions"), optional<&S::norm>("norm"),
                      optional<&S::norm_weight>("norm_weight"), optional<&S::norm_bias>("norm_bias"),
                      optional<&S::norm_eps>("norm_eps"), optional<&S::cos>("cos"), optional<&S::sin>("sin"),
                      optional<&S::mix_scale>("mix_scale"));
  }
  void check() const;
};
SelectorProject::Result selector_project(const SelectorProject& arguments);

}  // namespace spot::ops
