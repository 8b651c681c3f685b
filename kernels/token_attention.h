// Exact softmax attention of one query token a sequence over a list of single tokens of its paged keys and
// values.
#pragma once

#include "kernels/sparse_decode_attention.h"

namespace spot::kernels {

// As sparse_decode_attention, but `selected` holds positions of tokens below the length, ascending, `counts`
// and `max_selected` are numbers of tokens; `selected` and rows_per_sequence = Hkv are required. Splits and
// folds of sixteen list entries at a time where sparse_decode_attention has a block.
cudaError_t token_attention(const SparseDecodeAttentionParams& params, cudaStream_t stream);

}  // namespace spot::kernels
