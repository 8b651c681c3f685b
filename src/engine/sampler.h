// Choosing the next token from logits.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <random>

namespace spot {

struct SamplingOptions {
  double temperature = 0.0;  // 0: greedy
  double top_p = 1.0;        // nucleus, in (0, 1]
  int64_t top_k = 0;         // 0: all
  uint64_t seed = 42;

  // Throws Error on values out of range.
  void check() const;
};

// One sequence's sampler. The same seed and logits give the same tokens on every platform.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);
  // logits: [vocab_size] float32, on any device. Ties go to the lower id. Throws Error on non-finite logits.
  int32_t sample(const at::Tensor& logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 random_;
};

}  // namespace spot
