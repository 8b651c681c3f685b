// The tokens of one forward call, and where everything of theirs lies in the cache.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "cache/page_pools.h"

namespace spot {

// New tokens of several sequences laid end to end; sequence i brings query_lengths[i] tokens at positions
// starts[i], starts[i] + 1, ... The first num_decodes sequences are decode rows, one token each, so that row
// i is sequence i; the others are prefill chunks, of one token or more. A backend treats the two apart.
//
// Rows of sequence -1 are padding (of a batch whose shape a CUDA graph has fixed): token 0 at position 0,
// slot -1, length 0, the spare state slot. Nothing is written for them, and what they compute is nobody's.
struct Batch {
  // On the host, one entry a sequence.
  std::vector<int64_t> sequences;      // ids in the cache
  std::vector<int64_t> starts;         // tokens already in the cache before this call
  std::vector<int64_t> query_lengths;  // sum = T
  std::vector<int64_t> first_pages;    // the first page where the pages are consecutive, else -1
  int64_t num_decodes = 0;
  int64_t page_size = 16;

  // On the model's device. All but tokens and positions are undefined in a batch without a cache (see
  // unpaged_batch).
  at::Tensor tokens;        // [T] int64
  at::Tensor positions;     // [T] int64
  at::Tensor slots;         // [T] int64: page * page_size + offset; negative: not stored
  at::Tensor page_table;    // [num_sequences, most pages] int32, padded with 0
  at::Tensor lengths;       // [num_sequences] int32: tokens with this batch's, those of the last query's past
  at::Tensor query_starts;  // [num_sequences + 1] int32: first row of each sequence, then T
  at::Tensor state_slots;   // [num_sequences] int64; only for models with recurrent states
  at::Tensor logit_rows;    // [n] int64: rows whose logits are wanted (the last row of a sequence), in order
  at::Tensor storage;       // the memory of all these

  int64_t num_sequences() const { return static_cast<int64_t>(sequences.size()); }
  int64_t num_tokens() const { return tokens.numel(); }
  bool is_decode() const { return num_decodes == num_sequences(); }
  // The decode rows, or the prefill chunks, as a batch of their own without logit rows. The tensors are views
  // of this one's, but for the prefill chunks' query_starts.
  Batch decodes() const;
  Batch prefills() const;
  // Every token as a decode row, which sees its sequence up to itself.
  Batch rows() const;
};

// Consecutive new tokens of one sequence in a batch.
struct QueryChunk {
  int64_t sequence;  // index in the batch, not the cache's id
  int64_t first;     // first row in the batch's [T, ...] tensors
  int64_t count;     // rows
  int64_t start;     // position of the first row; row i sees start + i + 1 tokens
};

// The batch's sequences as chunks, in order: all of them, or the prefill chunks only.
std::vector<QueryChunk> query_chunks(const Batch& batch);
std::vector<QueryChunk> prefill_chunks(const Batch& batch);

// Pages of the first `length` tokens of the batch's sequence i, [pages] int32: a row of the page table.
at::Tensor sequence_pages(const Batch& batch, int64_t sequence, int64_t length);
// The first `length` tokens of the batch's sequence i in a pool, as [heads, length, dim]: a view where the pages are
// consecutive and hold numbers, else a copy.
at::Tensor sequence_tokens(const TokenPool& pool, const Batch& batch, int64_t sequence, int64_t length);

// A batch of whole sequences that nothing is kept of, as prefill chunks from position 0: `tokens` cut at
// `part_starts` (ascending, the first 0). For models with recurrent states the caller sets state_slots.
Batch unpaged_batch(const std::vector<int32_t>& tokens, const std::vector<int64_t>& part_starts,
                    at::Device device);

}  // namespace spot
