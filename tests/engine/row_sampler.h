// Choosing the next token from one row of logits.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <random>

#include "engine/sampling.h"

namespace spot {

// One sequence's sampler. The same seed and logits give the same tokens on every platform. Takes temperature,
// top_k and top_p of the options.
class RowSampler {
 public:
  explicit RowSampler(const SamplingOptions& options);
  // logits: [vocab_size] float32, on any device. Ties go to the lower id. Throws Error on non-finite logits.
  int32_t sample(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace spot
