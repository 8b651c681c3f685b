// x W^T, with W as it is or as FP8 codes with a scale a block, the form of published FP8 checkpoints. On CUDA up to
// 32 rows of x, a decode step's, go to a kernel that is bound by the bytes of W and whose rows are the same bits
// whatever else is in the batch; more go to the library's product, codes decoded first.
#pragma once

#include <ATen/ATen.h>

#include "ops/op.h"

namespace spot::ops {

// y = x W^T + bias, or y += with `accumulate`; sums in float32, rounded once.
struct Linear {
  static constexpr const char* kName = "linear";
  using Result = void;
  at::Tensor x;       // [T, in] float32, bfloat16 or float16, rows contiguous
  at::Tensor weight;  // [out, in] contiguous, of x's dtype or float8_e4m3fn codes
  at::Tensor y;       // [T, out] of x's dtype, rows contiguous
  at::Tensor scales;  // of codes: float32 [out / 128, in / 128], rounded up, contiguous; undefined without
  at::Tensor bias;    // [out] of x's dtype, or undefined
  bool accumulate = false;

  static constexpr auto fields() {
    using S = Linear;
    return std::tuple(required<&S::x>("x"), required<&S::weight>("weight"), updated<&S::y>("y"),
                      optional<&S::scales>("scales"), optional<&S::bias>("bias"),
                      optional<&S::accumulate>("accumulate"));
  }
  void check() const;
};
void linear(const Linear& arguments);

// code * scale, [out, in] of `dtype`.
at::Tensor decode_blocks(const at::Tensor& codes, const at::Tensor& scales, at::ScalarType dtype);

}  // namespace spot::ops
