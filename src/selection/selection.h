// From block scores to the blocks a query attends to.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "ops/attention/attention.h"
#include "selector/config.h"

namespace spot {

// Throws Error naming the first impossible value.
void validate(const SelectionRule& rule);
// "top-p 0.9" or "top-k 2048" or "top-k 25%": for tables and progress lines.
std::string describe(const SelectionRule& rule);

// The chosen blocks of some rows (a row is one query, or one tile of 16 queries of a sequence).
struct Selection {
  at::Tensor indices;  // [rows, groups, most] int32 block indices, ascending, padded with -1
  at::Tensor counts;   // [rows, groups] int32
  at::Tensor
      predicted_mass;  // [rows, groups] float32: the share of the residual mass (softmax of the scores) kept
  at::Tensor lengths;  // [rows] int32: visible tokens (of the tile's last query)
  // [rows, groups, most * 16] bool: which tokens of the chosen blocks are attended, where a policy prunes
  // token by token. Undefined: all that are visible.
  at::Tensor tokens = {};
  // The same as lists of positions: [rows, groups, any] and [rows, groups] int32, as ops::PrunedTokens.
  at::Tensor token_positions = {}, token_counts = {};

  int64_t rows() const { return counts.size(0); }
  int64_t groups() const { return counts.size(1); }
  // One row alone, as a selection of one row.
  Selection row(int64_t index) const;
};

// Applies the rule to scores [rows, groups, blocks] float32 (blocks past a row's length are ignored), lengths
// [rows] int32; throws Error when the rule is impossible. Any device with an implementation of spot::select_blocks.
Selection select_blocks(const at::Tensor& scores, const at::Tensor& lengths, const SelectionRule& rule);

// Block score = max of its token scores. token_scores [..., tokens] -> [..., ceil(tokens / 16)]; the missing
// tokens of the last block count as -inf.
at::Tensor block_max(const at::Tensor& token_scores);

// Selection::tokens from token_positions and token_counts, without a wait for the device.
at::Tensor token_flags(const Selection& selection);

// A bool mask [rows, groups, blocks] of the chosen blocks.
at::Tensor block_mask(const Selection& selection, int64_t blocks);

// A bool mask [rows, groups, length] of the attended tokens (not causal inside a tile unless they were
// pruned).
at::Tensor token_mask(const Selection& selection, int64_t length);

// Tokens kept and visible, each summed over the rows (kept: averaged over groups): scalar tensors, float64
// and int64, on the selection's device. visible [rows] int32: the tokens each row sees, at most
// selection.lengths and in the same last block. Every rule keeps a row's last block when it is partial.
std::pair<at::Tensor, at::Tensor> count_tokens(const Selection& selection, const at::Tensor& visible);

}  // namespace spot
