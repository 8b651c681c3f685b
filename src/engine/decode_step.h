// Decode steps of a fixed set of sequences with no host work inside: eager anywhere, one CUDA graph on a GPU.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cache/batch_builder.h"
#include "model/backbone.h"

namespace spot {

// Holds one token of each sequence per step in buffers that never move, so that the step can be captured once
// and
// replayed: lengths, page tables and slots are refreshed in place, and budgets that depend on the data stay
// on the device.
class DecodeStep {
 public:
  // Each sequence can grow to `max_tokens` tokens. All arguments outlive this object.
  DecodeStep(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache,
             std::vector<int64_t> sequences, int64_t max_tokens);
  ~DecodeStep();

  // Runs tokens[i] of sequences[i]; returns float32 logits [sequences, vocab_size], overwritten by the next
  // call. Throws Error
  // when a sequence is full or a token is outside the vocabulary.
  at::Tensor run(const std::vector<int32_t>& tokens);

  // Captures the step in a CUDA graph; later run() calls replay it. Throws Error on the CPU and in builds
  // against a torch without
  // CUDA. The capture itself runs steps that write beyond the sequences' ends, which later tokens overwrite.
  void capture();

 private:
  struct Graph;
  void refresh(const std::vector<int32_t>& tokens);
  at::Tensor forward();

  const Backbone& backbone_;
  AttentionBackend& attention_;
  PagedCache& cache_;
  std::vector<int64_t> sequences_;
  BatchShape shape_;
  Batch batch_;
  at::Tensor logits_;
  std::unique_ptr<Graph> graph_;
};

}  // namespace spot
