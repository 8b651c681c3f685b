// The tokens of one forward call.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace spot {

// The new tokens of several sequences laid end to end: the prompt (or a chunk of it) of each in prefill, one
// token of each in decode. Sequence i contributes query_lengths[i] tokens at positions starts[i], starts[i] +
// 1, ...
struct Batch {
  at::Tensor tokens;                   // [T] int64, on the model's device
  at::Tensor positions;                // [T] int64, on the model's device
  std::vector<int64_t> sequences;      // ids in the KvCache
  std::vector<int64_t> starts;         // tokens already in the cache before this call
  std::vector<int64_t> query_lengths;  // sum = T
  at::Tensor state_slots;  // KvCache::state_slots, [num_sequences] int64 on the model's device; may
                           // be left undefined outside a graph capture

  int64_t num_sequences() const { return static_cast<int64_t>(sequences.size()); }
  int64_t num_tokens() const { return tokens.numel(); }
  bool is_decode() const {
    for (int64_t n : query_lengths)
      if (n != 1) return false;
    return true;
  }
};

}  // namespace spot
