#pragma once

#include "attention/policy.h"

namespace spot {

// StreamingLLM: the first `sinks` tokens and the latest ones, `budget` tokens in all.
class StreamingPolicy : public SelectionPolicy {
 public:
  // Throws Error when budget <= sinks.
  explicit StreamingPolicy(int64_t budget, int64_t sinks = 128);
  std::string name() const override { return "streaming"; }
  int64_t groups() const override { return 1; }
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;
};

}  // namespace spot
