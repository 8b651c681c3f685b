// Pages of keys or values as float32 rows that page_kernels.h can read.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>

#include <type_traits>
#include <vector>

#include "ops/cpu/page_kernels.h"

namespace spot::ops::cpu {

// Gives a page in place when it is float32 of a whole number of vectors and dense, else converts it. Its tokens lie
// token_stride elements apart. The pointer lives until the next load.
template <typename scalar_t>
class PageLoader {
 public:
  PageLoader(int width, int stride, int64_t token_stride)
      : width_(width), stride_(stride), token_stride_(token_stride) {
    if (!in_place()) buffer_.assign(kPageTokens * stride, 0.0f);
  }
  const float* load(const scalar_t* page, int tokens) {
    if constexpr (std::is_same_v<scalar_t, float>)
      if (in_place()) return page;
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      for (int j = 0; j < tokens; ++j)
        kernels_.from_bfloat16(reinterpret_cast<const uint16_t*>(page + j * token_stride_),
                               buffer_.data() + j * stride_, width_);
    } else if constexpr (std::is_same_v<scalar_t, c10::Float8_e4m3fn>) {
      for (int j = 0; j < tokens; ++j)
        kernels_.from_e4m3(reinterpret_cast<const uint8_t*>(page + j * token_stride_),
                           buffer_.data() + j * stride_, width_);
    } else {
      for (int j = 0; j < tokens; ++j)
        for (int c = 0; c < width_; ++c)
          buffer_[j * stride_ + c] = static_cast<float>(page[j * token_stride_ + c]);
    }
    return buffer_.data();
  }

 private:
  bool in_place() const {
    return std::is_same_v<scalar_t, float> && width_ == stride_ && token_stride_ == stride_;
  }

  const PageKernels& kernels_ = page_kernels();
  int width_, stride_;
  int64_t token_stride_;
  std::vector<float> buffer_;
};

}  // namespace spot::ops::cpu
