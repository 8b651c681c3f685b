// Top-K, dual top-p and threshold selection of blocks on the device, exact and deterministic.
#pragma once

#include "kernels/select_rules.h"
#include "kernels/types.h"

namespace spot::kernels {

inline constexpr int32_t kMaxSelectBlocks = 65536;  // blocks a row: 1,048,576 tokens of 16

struct SelectBlocksParams {
  SelectionRule rules;  // select_rules.h
  int32_t rows = 0;     // R = sequences * rows_per_sequence
  int32_t rows_per_sequence =
      1;  // selections of one sequence (1, or one a KV head); row r is sequence r / this
  const float* scores = nullptr;     // [R, score_stride] float32
  int64_t score_stride = 0;          // >= blocks of the longest row
  const int32_t* lengths = nullptr;  // [sequences] tokens, on the device; at most kMaxSelectBlocks blocks
  int32_t* selected = nullptr;       // out [R, max_selected] block indices, ascending, then -1
  int32_t max_selected = 0;   // >= smallest_capacity(rules); smaller than a row's choice it acts as a cap
  int32_t* counts = nullptr;  // out [R]
  float* covered_share = nullptr;  // out [R], share of the residual mass that was selected; may be null
  Overlap overlap = Overlap::kNone;
};

// Equal, index for index and bit for bit, to select_blocks_reference (select_reference.h) of every row.
cudaError_t select_blocks(const SelectBlocksParams& params, cudaStream_t stream);

// True if the rules are in range: block size and temperature positive, budgets not negative, p not NaN, thresholds positive.
bool valid_rules(const SelectionRule& rules);

}  // namespace spot::kernels
