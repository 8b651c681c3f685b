// Paged store of keys and values, and of the recurrent states of linear-attention layers.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <vector>

#include "checkpoint/config.h"
#include "kernels/key_format.h"
#include "model/batch.h"

namespace spot {

inline constexpr int64_t kPageSize = kernels::kPageTokens;  // tokens a page; equals the selection block

// Everything a cache holds for one sequence, apart from any cache: copies, on the cache's device.
struct SequenceState {
  int64_t length = 0;
  std::vector<at::Tensor> keys,
      values;  // by layer: [num_kv_heads, length, head_dim]; undefined for linear layers
  std::vector<at::Tensor> conv,
      recurrent;  // by layer, as in KvCache without the slot; undefined for attention layers
};

// Keys and values of every full-attention layer. A layer's pool is [num_kv_heads, num_pages, 16, head_dim],
// so that a page of one head is contiguous, and so that a sequence whose pages are consecutive is a plain
// strided [num_kv_heads, tokens, head_dim] view. Pages are handed out lowest first; all layers share one page
// table.
//
// Linear-attention layers keep a fixed-size state per open sequence instead, in one slot of a pool of slots.
class KvCache {
 public:
  // Memory for the states of `num_sequences` is taken at once on models with linear-attention layers; more
  // sequences can be opened later, which moves the pools (a captured CUDA graph must be captured anew).
  KvCache(const ModelConfig& config, int64_t num_pages, at::ScalarType dtype, at::Device device,
          int64_t num_sequences = 1);

  // A new empty sequence; its id.
  int64_t open_sequence();
  // Returns the sequence's pages to the pool and zeroes its recurrent states.
  void close_sequence(int64_t sequence);
  // A new sequence with the same contents, in pages of its own. Throws Error when too few pages are free.
  int64_t copy_sequence(int64_t sequence);
  // Saves and restores a sequence (prompt caches, moving between caches of the same model).
  SequenceState export_sequence(int64_t sequence) const;
  int64_t import_sequence(const SequenceState& state);

  // A point in a sequence that it can return to: its length and copies of its recurrent states. Tokens
  // appended after the mark are dropped by rollback(), which can be repeated.
  struct Mark {
    int64_t length = 0;
    std::vector<at::Tensor> conv, recurrent;  // by layer, without the slot; undefined for attention layers
  };
  Mark mark(int64_t sequence) const;
  void rollback(int64_t sequence, const Mark& mark);

  // Makes room for `count` more tokens and advances the length. Throws Error when no page is free, saying how
  // many tokens the cache holds, and beyond max_position_embeddings; then nothing has changed.
  void extend(int64_t sequence, int64_t count);
  // Pages that extend(sequence, count) would take.
  int64_t pages_needed(int64_t sequence, int64_t count) const;
  int64_t length(int64_t sequence) const;
  const std::vector<int32_t>& pages(int64_t sequence) const;
  int64_t num_pages() const { return num_pages_; }
  int64_t num_free_pages() const { return static_cast<int64_t>(free_pages_.size()); }

  at::Tensor keys(int64_t layer) const;    // [num_kv_heads, num_pages, 16, head_dim]
  at::Tensor values(int64_t layer) const;  // [num_kv_heads, num_pages, 16, head_dim]

  // Slot (page * 16 + offset) of each token of the batch, [T] int64 on the cache's device. extend() must have
  // run.
  at::Tensor slots(const Batch& batch) const;
  // Page tables of the batch's sequences, [num_sequences, most pages] int32 on the cache's device, padded
  // with 0.
  at::Tensor page_table(const Batch& batch) const;
  // Tokens of each sequence including this batch's, [num_sequences] int32 on the cache's device.
  at::Tensor lengths(const Batch& batch) const;

  // Writes key and value [T, num_kv_heads, head_dim] of the batch's tokens at slots (see above).
  void write(int64_t layer, const at::Tensor& slots, const at::Tensor& key, const at::Tensor& value);
  // Keys or values of one sequence's first `length` tokens as [num_kv_heads, length, head_dim]: a view when
  // its pages are consecutive, else a gathered copy.
  at::Tensor gather(const at::Tensor& pool, int64_t sequence, int64_t length) const;

  // States of a linear-attention layer, float32. conv: the last conv_kernel - 1 inputs of the causal
  // convolution, oldest first, [state slots, conv_kernel - 1, channels]. recurrent: the delta rule's matrix,
  // key by value, [state slots, num_value_heads, key_head_dim, value_head_dim].
  at::Tensor conv_states(int64_t layer) const;
  at::Tensor recurrent_states(int64_t layer) const;
  // State slot of each sequence of the batch, [num_sequences] int64 on the cache's device.
  at::Tensor state_slots(const Batch& batch) const;

  const ModelConfig& config() const { return config_; }
  at::Device device() const { return device_; }
  at::ScalarType dtype() const { return dtype_; }

 private:
  struct Sequence {
    std::vector<int32_t> pages;
    int64_t length = 0;
    int64_t state_slot = 0;
  };
  const Sequence& find(int64_t sequence) const;
  void grow_states(int64_t num_slots);
  const at::Tensor& pool_of(const std::vector<at::Tensor>& pools, int64_t layer, const char* what) const;

  ModelConfig config_;
  int64_t num_pages_;
  at::ScalarType dtype_;
  at::Device device_;
  std::vector<int32_t> free_pages_;        // descending, so that the lowest is taken from the back
  std::vector<int64_t> free_state_slots_;  // descending
  std::map<int64_t, Sequence> sequences_;
  int64_t next_id_ = 0;
  int64_t num_state_slots_ = 0;
  std::vector<at::Tensor> keys_, values_;     // by layer; undefined for linear-attention layers
  std::vector<at::Tensor> conv_, recurrent_;  // by layer; undefined for full-attention layers
};

}  // namespace spot
