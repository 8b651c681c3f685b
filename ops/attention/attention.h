// From block scores to attention: which blocks a row keeps, and exact attention over them. Rows, page tables and
// lengths as in ops/selector/selector.h; pools of keys and values are [num_kv_heads, pages, 16, head_dim] of any
// strides with contiguous dims, equal for both, of the query's dtype or float8_e4m3fn.
#pragma once

#include <ATen/ATen.h>

#include "kernels/select_rules.h"
#include "ops/op.h"

namespace spot::ops {

using kernels::SelectionMode;
using kernels::SelectionRule;

// The rule's fields as a schema has them; `kAt` leads from an operator's struct to its rule.
template <auto... kAt>
constexpr auto rule_fields() {
  using R = SelectionRule;
  return std::tuple(optional<kAt..., &R::mode>("mode"), optional<kAt..., &R::sinks>("sinks"),
                    optional<kAt..., &R::recency>("recency"), optional<kAt..., &R::floor>("floor"),
                    optional<kAt..., &R::cap>("cap"), optional<kAt..., &R::budget>("budget"),
                    optional<kAt..., &R::budget_fraction>("budget_fraction"), optional<kAt..., &R::p>("p"),
                    optional<kAt..., &R::threshold>("threshold"),
                    optional<kAt..., &R::temperature>("temperature"),
                    optional<kAt..., &R::thresholds>("thresholds"));
}

// Which blocks each row keeps; kernels/select_reference.h defines the result exactly. Throws when the blocks are
// fewer than a length needs, or max_selected fewer than the rule may keep.
struct SelectBlocks {
  static constexpr const char* kName = "select_blocks";
  struct Result {
    static constexpr std::array<const char*, 3> kNames = {"indices", "counts", "predicted_mass"};
    // [R, groups, width] int32, ascending, padded with -1. torch.ops gives the width of select_width; here, on
    // the CPU and without max_selected, it is cut to the largest count.
    at::Tensor indices;
    at::Tensor counts;          // [R, groups] int32
    at::Tensor predicted_mass;  // [R, groups] float32: kept share of the residual mass
  };
  at::Tensor scores;   // [R, groups, blocks] float32; blocks past a length are ignored
  at::Tensor lengths;  // [R] int32
  SelectionRule rule = {};
  int64_t max_selected = 0;  // width of the result in blocks; 0: what no row's choice can exceed

  static constexpr auto fields() {
    using S = SelectBlocks;
    return std::tuple_cat(std::tuple(required<&S::scores>("scores"), required<&S::lengths>("lengths")),
                          rule_fields<&S::rule>(), std::tuple(optional<&S::max_selected>("max_selected")));
  }
  void check() const;
};
SelectBlocks::Result select_blocks(const SelectBlocks& arguments);

// The width of a result: max_selected, or the most blocks that the rule can keep of `blocks`.
int64_t select_width(const SelectionRule& rule, int64_t max_selected, int64_t blocks);

// Attention kernels count finished parts in a workspace of this many counters, one a row, KV head and tile of 8
// query heads: more than that in one call throws on CUDA.
inline constexpr int64_t kMaxAttentionParts = 65536;

// softmax(scale * q K^T) V over the selected blocks' visible tokens, accumulated in float32. A row without blocks
// gives zeros. Never reads an unselected page or a token past the length. Returns [R, num_heads, head_dim] in
// query's dtype. Of float8_e4m3fn pools K and V are the stored numbers times key_scale and value_scale. CUDA: bfloat16
// and float16, head_dim 64, 128 and 256, at most 16 query heads a KV head; a token's row begins at 16 bytes.
struct SparseDecodeAttention {
  static constexpr const char* kName = "sparse_decode_attention";
  using Result = at::Tensor;
  at::Tensor query;  // [R, num_heads, head_dim] float32, bfloat16 or float16
  at::Tensor key_pool, value_pool;
  at::Tensor page_table, lengths;
  double scale = 0.0;
  at::Tensor indices, counts;  // of select_blocks, groups 1 or num_kv_heads; both undefined: every block
  at::Tensor key_scale, value_scale;  // float32, one number or [num_kv_heads]; undefined: 1

  static constexpr auto fields() {
    using S = SparseDecodeAttention;
    return std::tuple(required<&S::query>("query"), required<&S::key_pool>("key_pool"),
                      required<&S::value_pool>("value_pool"), required<&S::page_table>("page_table"),
                      required<&S::lengths>("lengths"), required<&S::scale>("scale"),
                      optional<&S::indices>("indices"), optional<&S::counts>("counts"),
                      optional<&S::key_scale>("key_scale"), optional<&S::value_scale>("value_scale"));
  }
  void check() const;
};
at::Tensor sparse_decode_attention(const SparseDecodeAttention& arguments);

// Whether sparse_decode_attention has an implementation for the device, dtype and heads of these.
bool attends(const at::Tensor& query, const at::Tensor& key_pool);

// select_blocks, then sparse_decode_attention over its choice, the same bits, in one launch where the GPU has room.
struct SelectAndAttend {
  static constexpr const char* kName = "select_and_attend";
  struct Result {
    static constexpr std::array<const char*, 4> kNames = {"output", "indices", "counts", "predicted_mass"};
    at::Tensor output, indices, counts;
    at::Tensor predicted_mass;  // empty without with_mass
  };
  at::Tensor scores;
  at::Tensor query;
  at::Tensor key_pool, value_pool;
  at::Tensor page_table, lengths;
  double scale = 0.0;
  SelectionRule rule = {};
  int64_t max_selected = 0;
  bool with_mass = true;              // without it top_k saves time
  at::Tensor key_scale, value_scale;  // as in SparseDecodeAttention

  static constexpr auto fields() {
    using S = SelectAndAttend;
    return std::tuple_cat(
        std::tuple(required<&S::scores>("scores"), required<&S::query>("query"),
                   required<&S::key_pool>("key_pool"), required<&S::value_pool>("value_pool"),
                   required<&S::page_table>("page_table"), required<&S::lengths>("lengths"),
                   required<&S::scale>("scale")),
        rule_fields<&S::rule>(),
        std::tuple(optional<&S::max_selected>("max_selected"), optional<&S::with_mass>("with_mass"),
                   optional<&S::key_scale>("key_scale"), optional<&S::value_scale>("value_scale")));
  }
  void check() const;
};
SelectAndAttend::Result select_and_attend(const SelectAndAttend& arguments);

}  // namespace spot::ops
