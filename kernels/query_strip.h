// A run of queries handled together by the distillation kernels, and the keys they see: what is quadratic in
// the length exists for one strip at a time.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

// Maps of a strip have `width` columns, column c for the key of token first_key + c. Row r sees the keys of
// tokens low[r] .. last[r]: its document up to itself, or a part of that. All lists ascend, and width reaches
// past every token seen.
struct QueryStrip {
  const int32_t* tokens = nullptr;  // [rows], each query's own token
  const int32_t* low = nullptr;     // [rows], the first token that counts, at least first_key
  const int32_t* last = nullptr;    // [rows], the last one, at least low
  int32_t rows = 0;
  int32_t first_key = 0;
  int32_t width = 0;       // a multiple of 8
  int32_t num_tokens = 0;  // of queries and keys in memory
};

// A row whose teacher has less mass than this on the keys that count says nothing: no loss, no gradient.
inline constexpr float kSmallestMass = 1e-37f;

}  // namespace spot::kernels
