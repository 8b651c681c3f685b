// E4M3 codes with a scale a block of 128 x 128 to numbers.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

struct DecodeBlocksParams {
  DataType type = DataType::kBf16;   // of y; kBf16 or kF16
  int64_t rows = 0, width = 0;       // width a multiple of 16
  const void* codes = nullptr;       // [rows, width], contiguous, 16-byte aligned
  const float* scales = nullptr;     // [rows / 128, width / 128], both rounded up
  void* y = nullptr;                 // [rows, width], contiguous, 16-byte aligned: code * scale, rounded once
  Overlap overlap = Overlap::kNone;  // kHistory: the same as kLaunch
};

cudaError_t decode_blocks(const DecodeBlocksParams& params, cudaStream_t stream);

}  // namespace spot::kernels
