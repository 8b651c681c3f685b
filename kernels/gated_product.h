// Elementwise activation(gate) * x: SwiGLU's inner product, and attention's output gate.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

enum class Activation : int32_t { kSilu = 0, kSigmoid = 1 };

struct GatedProductParams {
  DataType type = DataType::kBf16;
  Activation activation = Activation::kSilu;
  int64_t num_rows = 0;
  int32_t num_heads = 1, width = 0;  // a row is num_heads runs of `width` contiguous numbers
  const void* gate = nullptr;
  const void* x = nullptr;
  int64_t gate_row_stride = 0, gate_head_stride = 0, x_row_stride = 0, x_head_stride = 0;  // in numbers
  void* y = nullptr;                                                                       // contiguous
  Overlap overlap = Overlap::kNone;  // kHistory: the same as kLaunch
};

// In float32; the activation is rounded to `type`, then the product, as two separate operators would.
cudaError_t gated_product(const GatedProductParams& params, cudaStream_t stream);

}  // namespace spot::kernels
