// Makes the batch of the next tokens of some open sequences.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cache/batch.h"
#include "cache/paged_cache.h"

namespace spot {

struct BatchEntry {
  int64_t sequence = 0;
  std::vector<int32_t> tokens;
  // A decode row (one token, attends as decode does) or a chunk of a prompt. Unset: a decode row if it brings
  // one token and no prefill chunk stands before it.
  std::optional<bool> decode = {};
  bool logits = true;  // whether its last token's logits are wanted (Batch::logit_rows)
};

// A shape that a CUDA graph can be captured with: decode rows only.
struct BatchShape {
  int64_t rows = 0;         // at least as many as entries; the rest is padding
  int64_t table_width = 0;  // pages of the longest sequence there may be
};

// Extends the sequences and says where everything lies, in one copy to the device (pinned, not waited for, on
// a GPU). Decode rows come first. Everything is checked before anything changes. Throws Error on a sequence
// that is not open or occurs twice, no token, ids outside the vocabulary, decode rows behind prefill chunks,
// past max_tokens, and when the cache is full.
Batch build_batch(PagedCache& cache, const std::vector<BatchEntry>& entries);
// The same for decode rows, padded to a shape. No entry at all gives padding only.
Batch build_batch(PagedCache& cache, const std::vector<BatchEntry>& entries, const BatchShape& shape);
// The same into the memory of a batch that build_batch made with this shape, whose tensors keep their
// addresses: what a captured graph reads.
void rebuild_batch(PagedCache& cache, const std::vector<BatchEntry>& entries, const BatchShape& shape,
                   Batch& batch);

// tokens[i] for sequences[i].
Batch make_batch(PagedCache& cache, const std::vector<int64_t>& sequences,
                 const std::vector<std::vector<int32_t>>& tokens);

// After the forward pass: commits every sequence of the batch.
void commit_batch(PagedCache& cache, const Batch& batch);

}  // namespace spot
