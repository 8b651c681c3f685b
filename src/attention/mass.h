// The backbone's true attention distribution, per block: what an oracle selects by and what a selection
// captures.
#pragma once

#include <ATen/ATen.h>

#include "selection/selection.h"

namespace spot {

enum class BlockReduction { sum, max, none };

// Head-averaged softmax probabilities of query [T, num_heads, head_dim] at positions start .. start + T - 1
// over key [num_kv_heads, length, head_dim], reduced over the tokens of each block: sum (the block's mass) or
// max (its best token); none: a column for each token. groups is 1 (mean over all query heads) or
// num_kv_heads (mean over each KV head's query heads). Returns [T, groups, ceil(length / 16)] (none: [T,
// groups, length]) float32; what lies past a query's position holds 0.
// Softmax per head in float32, in query chunks: at most about 2^26 numbers at once.
at::Tensor attention_mass(const at::Tensor& query, const at::Tensor& key, double scale, int64_t start,
                          int64_t groups = 1, BlockReduction reduction = BlockReduction::sum);

struct CapturedMass {
  at::Tensor total;     // [T, groups] float32: true mass on the selected blocks
  at::Tensor residual;  // [T, groups] float32: the same among the blocks that the rule did not reserve (1
                        // when there are none or they hold no mass)
};
// mass [T, groups, blocks] as from attention_mass with sum, or by token (none) where the selection prunes
// tokens; selection has one row per query (rows == T).
CapturedMass captured_mass(const at::Tensor& mass, const Selection& selection, const SelectionRule& rule);
// The reduction whose columns are what the selection chooses among.
inline BlockReduction mass_reduction(const Selection& selection) {
  return selection.tokens.defined() ? BlockReduction::none : BlockReduction::sum;
}
// Which columns of such a mass the selection holds: bool, of the mass's shape.
at::Tensor chosen_columns(const at::Tensor& mass, const Selection& selection);

}  // namespace spot
