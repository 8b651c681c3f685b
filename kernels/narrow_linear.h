// y = x W^T of few rows of x, as a decode step multiplies them: the bytes of W are the work.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

inline constexpr int32_t kNarrowRows = 32;   // at most
inline constexpr int32_t kScaleBlock = 128;  // rows and columns of W that share a scale

struct NarrowLinearParams {
  DataType type = DataType::kBf16;  // of x, bias and y, and of W unless e4m3; kBf16 or kF16
  bool e4m3 = false;                // W is E4M3 codes, each times its block's scale (a NaN code stays NaN)
  int32_t num_rows = 0;             // of x: 1 to kNarrowRows
  int32_t width = 0, out = 0;       // W is [out, width]; width a multiple of 8, for codes of 16
  const void* x = nullptr;  // [num_rows, width], rows x_stride apart, a multiple of 8; 16-byte aligned
  int64_t x_stride = 0;
  const void* weight = nullptr;   // contiguous, 16-byte aligned
  const float* scales = nullptr;  // of codes: [out / 128, width / 128], both rounded up
  const void* bias = nullptr;     // [out], or null
  void* y = nullptr;              // [num_rows, out], rows y_stride apart
  int64_t y_stride = 0;
  bool accumulate = false;  // y += x W^T (+ bias) instead
  // kHistory: W, its scales and the bias are read at once, so they must have been written before the predecessor
  // started; x and y wait for it.
  Overlap overlap = Overlap::kNone;
};

// Sums in float32, in an order that depends on the width alone; rounded once. A row's results depend on that row alone.
cudaError_t narrow_linear(const NarrowLinearParams& params, cudaStream_t stream);

}  // namespace spot::kernels
