// RMSNorm of rows: y = x / sqrt(mean(x^2) + epsilon) * factor.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

struct RmsNormParams {
  DataType type = DataType::kBf16;  // of x and y
  int64_t num_rows = 0;
  int32_t width = 0;
  const void* x = nullptr;                 // [num_rows, width], numbers of a row contiguous
  int64_t x_stride = 0;                    // from one row to the next
  const void* factor = nullptr;            // [width]: what the normalised row is multiplied by
  DataType factor_type = DataType::kBf16;  // `type` or float32
  float epsilon = 1e-6f;
  void* y = nullptr;                 // [num_rows, width] contiguous
  Overlap overlap = Overlap::kNone;  // kHistory: the same as kLaunch
};

// In float32, rounded once. The factor is read before the wait for the preceding kernel, which must not have
// written it. A row's result depends on the row alone.
cudaError_t rms_norm(const RmsNormParams& params, cudaStream_t stream);

}  // namespace spot::kernels
