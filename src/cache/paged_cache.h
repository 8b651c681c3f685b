// What is kept of open sequences: which pages are whose, the pools under them, and the states beside them.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "cache/block_allocator.h"
#include "cache/page_pools.h"
#include "cache/state_slots.h"

namespace spot {

struct CacheOptions {
  int64_t num_pages = 1;
  int64_t page_size = 16;
  int64_t max_tokens = 0;     // of one sequence: the model's positions
  int64_t vocab_size = 0;     // token ids lie below
  int64_t num_sequences = 1;  // state slots, of models with recurrent states: how many sequences can be open
  int64_t num_snapshots = 0;  // of recurrent states, kept as prefix-cache entries
};

// Pools and states are declared after construction, before the first sequence is opened.
class PagedCache {
 public:
  PagedCache(const CacheOptions& options, at::Device device);
  PagedCache(const PagedCache&) = delete;
  PagedCache& operator=(const PagedCache&) = delete;

  PagePools& pools() { return pools_; }
  const PagePools& pools() const { return pools_; }
  StateSlots& states() { return states_; }
  const StateSlots& states() const { return states_; }
  const BlockAllocator& allocator() const { return allocator_; }
  const CacheOptions& options() const { return options_; }
  at::Device device() const { return pools_.device(); }
  int64_t num_pages() const { return pools_.num_pages(); }
  int64_t num_free_pages() const { return allocator_.num_free_pages(); }
  int64_t page_size() const { return options_.page_size; }
  int64_t bytes() const { return pools_.bytes() + states_.bytes(); }

  // A new empty sequence; its id. Throws Error when every state slot is taken.
  int64_t open_sequence(uint64_t salt = 0);
  // A new sequence that begins with the longest prefix of `tokens` that is cached under `salt`; length() says
  // how much, at most all but the last token. With recurrent states: up to the last block end that has a
  // snapshot.
  int64_t open_sequence(std::span<const int32_t> tokens, uint64_t salt = 0);
  // How much that would be.
  int64_t cached_prefix(std::span<const int32_t> tokens, uint64_t salt = 0) const;
  // A new sequence with the same contents: shares the pages, and copies the states.
  int64_t fork_sequence(int64_t sequence);
  // Its committed pages serve the prefix cache until they are needed.
  void close_sequence(int64_t sequence);

  // Makes room for more tokens, whose keys and values are still to be computed. Throws Error when no page is
  // free, and past max_tokens; then nothing has changed.
  void extend(int64_t sequence, std::span<const int32_t> tokens);
  // After the forward pass: what the sequence holds is computed, and its full pages can be shared.
  void commit(int64_t sequence);
  // After commit, at a length that is a multiple of the page size: keeps the recurrent states as a
  // prefix-cache entry of this length (in place of the least recently used snapshot when all are taken). Does
  // nothing without recurrent states, without room for snapshots, and where there is one.
  void snapshot(int64_t sequence);

  // A point in a sequence that it can return to, any number of times: its length and copies of its states.
  struct Mark {
    int64_t length = 0;
    std::vector<at::Tensor> states;
  };
  Mark mark(int64_t sequence) const;
  void rollback(int64_t sequence, const Mark& mark);

  int64_t length(int64_t sequence) const { return allocator_.length(sequence); }
  const std::vector<int32_t>& pages(int64_t sequence) const { return allocator_.pages(sequence); }
  int64_t pages_needed(int64_t sequence, int64_t count) const {
    return allocator_.pages_needed(sequence, count);
  }
  // The sequence's slot in states(); without recurrent states any number.
  int64_t state_slot(int64_t sequence) const;

 private:
  CacheOptions options_;
  BlockAllocator allocator_;
  PagePools pools_;
  StateSlots states_;
  std::map<int64_t, int64_t> state_slots_;
};

}  // namespace spot
