#include "cache/paged_cache.h"

#include "core/error.h"

namespace spot {

PagedCache::PagedCache(const CacheOptions& options, at::Device device)
    : options_(options),
      allocator_(options.num_pages, options.page_size),
      pools_(options.num_pages, options.page_size, device),
      states_(options.num_sequences, options.num_snapshots, device) {
  allocator_.on_snapshot_dropped([this](int64_t slot) { states_.release_snapshot(slot); });
}

int64_t PagedCache::state_slot(int64_t sequence) const {
  const auto found = state_slots_.find(sequence);
  if (found == state_slots_.end()) fail("sequence {} is not open in the cache", sequence);
  return found->second;
}

int64_t PagedCache::open_sequence(uint64_t salt) {
  const int64_t slot = states_.take(), sequence = allocator_.open(salt);
  state_slots_[sequence] = slot;
  return sequence;
}

int64_t PagedCache::open_sequence(std::span<const int32_t> tokens, uint64_t salt) {
  const int64_t slot = states_.take(), sequence = allocator_.open(tokens, salt, !states_.empty());
  state_slots_[sequence] = slot;
  if (!states_.empty())
    if (const auto snapshot = allocator_.use_snapshot(sequence)) states_.copy(*snapshot, slot);
  return sequence;
}

int64_t PagedCache::cached_prefix(std::span<const int32_t> tokens, uint64_t salt) const {
  return allocator_.match(tokens, salt, !states_.empty());
}

int64_t PagedCache::fork_sequence(int64_t sequence) {
  const int64_t from = state_slot(sequence), slot = states_.take(), copy = allocator_.fork(sequence);
  states_.copy(from, slot);
  state_slots_[copy] = slot;
  return copy;
}

void PagedCache::close_sequence(int64_t sequence) {
  const int64_t slot = state_slot(sequence);
  allocator_.close(sequence);
  states_.release(slot);
  state_slots_.erase(sequence);
}

void PagedCache::extend(int64_t sequence, std::span<const int32_t> tokens) {
  const int64_t end = length(sequence) + static_cast<int64_t>(tokens.size());
  if (end > options_.max_tokens) {
    fail(
        "a sequence of {} tokens exceeds the model's {} positions; shorten the prompt or the answer, or extend the "
        "model with YaRN",
        end, options_.max_tokens);
  }
  if (const auto copy = allocator_.extend(sequence, tokens)) pools_.copy({*copy});
}

void PagedCache::commit(int64_t sequence) {
  allocator_.commit(sequence);
}

void PagedCache::snapshot(int64_t sequence) {
  if (states_.empty() || states_.num_snapshots() == 0 || !allocator_.takes_snapshot(sequence)) return;
  int64_t slot = states_.take_snapshot();
  if (slot < 0) slot = allocator_.drop_oldest_snapshot().value();
  allocator_.attach_snapshot(sequence, slot);
  states_.copy(state_slot(sequence), slot);
}

PagedCache::Mark PagedCache::mark(int64_t sequence) const {
  return {length(sequence), states_.save(state_slot(sequence))};
}

void PagedCache::rollback(int64_t sequence, const Mark& mark) {
  allocator_.shrink(sequence, mark.length);
  states_.restore(state_slot(sequence), mark.states);
}

}  // namespace spot
