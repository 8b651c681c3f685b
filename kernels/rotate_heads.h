// Rotary position embedding of heads, half-split: dims i and i + half turn by their position's angle.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

struct RotateHeadsParams {
  DataType type = DataType::kBf16;  // of x and y
  int64_t num_tokens = 0;
  int32_t num_heads = 0;
  int32_t dim = 0;   // a multiple of 4
  int32_t half = 0;  // a multiple of 4; the first 2 half dims turn, the rest passes
  // Pointers and strides (in elements) in whole groups of four numbers; dims contiguous.
  const void* x = nullptr;  // [num_tokens, num_heads, dim]
  int64_t x_token_stride = 0, x_head_stride = 0;
  const int64_t* positions = nullptr;          // [num_tokens], rows of the tables
  const float *cos = nullptr, *sin = nullptr;  // [positions, half], contiguous
  bool backwards = false;                      // by the negative angles: the inverse, and the gradient
  void* y = nullptr;                           // [num_tokens, num_heads, dim], contiguous
};

// In float32, rounded once.
cudaError_t rotate_heads(const RotateHeadsParams& params, cudaStream_t stream);

}  // namespace spot::kernels
