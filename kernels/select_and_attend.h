// Selection and sparse decode attention as one step: what follows score_blocks in every layer.
#pragma once

#include "kernels/select_blocks.h"
#include "kernels/sparse_decode_attention.h"

namespace spot::kernels {

struct SelectAndAttendParams {
  SelectionRule rules;            // block_size must be 16
  const float* scores = nullptr;  // [rows, score_stride] float32; rows = B * attention.rows_per_sequence
  int64_t score_stride = 0;
  int32_t max_blocks = 0;       // no row has more; at most kMaxSelectBlocks
  int32_t* selected = nullptr;  // out [rows, max_selected], as SelectBlocksParams
  int32_t max_selected = 0;
  int32_t* counts = nullptr;              // out [rows]
  float* covered_share = nullptr;         // out [rows], may be null
  SparseDecodeAttentionParams attention;  // its selected, counts, max_selected and overlap are ignored
  Overlap overlap = Overlap::kNone;       // kHistory: the attention's queries too are read at once
};

enum class SelectAndAttendPath : int32_t {
  kChoose = 0,      // fused where all its thread blocks run at once, else the two kernels
  kFused = 1,       // one launch, where the card has the shared memory
  kTwoKernels = 2,  // select_blocks, then sparse_decode_attention
};

// Equal bits to select_blocks followed by sparse_decode_attention, whichever path runs.
cudaError_t select_and_attend(const SelectAndAttendParams& params, cudaStream_t stream,
                              SelectAndAttendPath path = SelectAndAttendPath::kChoose);

}  // namespace spot::kernels
