#include "engine/scheduler.h"

#include <algorithm>

#include "core/error.h"

namespace spot {

Scheduler::Scheduler(PagedCache& cache, const SchedulerOptions& options)
    : cache_(cache), options_(options), chunk_step_(cache.page_size()) {
  if (options.max_sequences < 1)
    fail("the engine was given room for {} sequences; give at least 1", options.max_sequences);
  if (options.max_step_tokens < options.max_sequences + cache.page_size())
    fail("a step of {} tokens leaves no room for a prompt beside {} decoding sequences; give at least {}",
         options.max_step_tokens, options.max_sequences, options.max_sequences + cache.page_size());
  while (chunk_step_ * 2 * 8 <= options.max_step_tokens - options.max_sequences) chunk_step_ *= 2;
}

bool Scheduler::fits(int64_t tokens) const {
  return (tokens + cache_.page_size() - 1) / cache_.page_size() <= cache_.num_pages();
}

void Scheduler::add(Sequence& sequence) {
  waiting_.push_back(&sequence);
}

void Scheduler::remove(Sequence& sequence) {
  if (sequence.cached >= 0) cache_.close_sequence(sequence.cached);
  sequence.cached = -1;
  std::erase(running_, &sequence);
  std::erase(waiting_, &sequence);
}

// Tokens that are not in the cache yet.
int64_t Scheduler::remaining(const Sequence& sequence) const {
  return sequence.length() - cache_.length(sequence.cached);
}

bool Scheduler::decodes(const Sequence& sequence) const {
  return remaining(sequence) == 1 &&
         sequence.length() > std::min(sequence.prefill_end, sequence.prompt_length);
}

// Sets the pages of the next `count` tokens aside, if there are enough.
bool Scheduler::take_pages(const Sequence& sequence, int64_t count) {
  const int64_t needed = cache_.pages_needed(sequence.cached, count);
  if (pages_taken_ + needed > cache_.num_free_pages()) return false;
  pages_taken_ += needed;
  return true;
}

// The same at the cost of those that came later; false when the sequence itself had to give way.
bool Scheduler::make_room(Sequence& sequence, int64_t count) {
  while (!take_pages(sequence, count)) {
    Sequence& last = *running_.back();
    preempt(last);
    if (&last == &sequence) return false;
  }
  return true;
}

void Scheduler::preempt(Sequence& sequence) {
  cache_.close_sequence(sequence.cached);
  sequence.cached = -1;
  std::erase(running_, &sequence);
  std::erase_if(slices_, [&](const Slice& slice) { return slice.sequence == &sequence; });
  waiting_.push_front(&sequence);
  ++preemptions_;
}

// Of at most `most` tokens, so that a chunk ends where its way of reading does, at the places that other
// requests can go on from (recurrent states are kept there), and else at a whole number of `chunk_step_` tokens:
// libraries plan anew for every new shape. 0: wait for a larger step.
int64_t Scheduler::chunk_length(const Sequence& sequence, int64_t most) const {
  const int64_t start = cache_.length(sequence.cached), page = cache_.page_size();
  int64_t end = sequence.length();
  if (start < sequence.prefill_end) end = std::min(end, sequence.prefill_end);
  if (!cache_.states().empty())
    for (const int64_t place : {sequence.context_end, sequence.shareable()})
      if (const int64_t shared = place / page * page; start < shared) end = std::min(end, shared);
  if (end - start <= most) return end - start;
  return std::max<int64_t>((start + most) / chunk_step_ * chunk_step_ - start, 0);
}

void Scheduler::add_slice(Sequence& sequence, int64_t count) {
  const int64_t start = cache_.length(sequence.cached);
  const bool last = start + count == sequence.length();
  const bool decode = last && count == 1 && start >= std::min(sequence.prefill_end, sequence.prompt_length);
  slices_.push_back({.sequence = &sequence,
                     .start = start,
                     .count = count,
                     .decode = decode,
                     .selects = decode || start >= sequence.prefill_end,
                     .logits = last});
}

// Pages that the prompts of running sequences will still need.
int64_t Scheduler::pages_to_come() const {
  int64_t pages = 0;
  for (const Sequence* sequence : running_)
    pages += cache_.pages_needed(sequence->cached, remaining(*sequence));
  return pages;
}

// Whether a prompt that is being read now begins as this one does, further than the cache knows.
bool Scheduler::awaits_shared_prefix(const Sequence& sequence) const {
  if (!options_.prefix_cache) return false;
  for (const Sequence* other : running_) {
    if (other->salt != sequence.salt || cache_.length(other->cached) >= other->shareable()) continue;
    const int64_t most = std::min(other->shareable(), sequence.shareable());
    const auto first = sequence.tokens.begin();
    const int64_t common = std::mismatch(first, first + most, other->tokens.begin()).first - first;
    const int64_t whole = common / cache_.page_size() * cache_.page_size();
    if (whole > 0 &&
        whole > cache_.cached_prefix({sequence.tokens.data(), static_cast<size_t>(sequence.shareable() + 1)},
                                     sequence.salt))
      return true;
  }
  return false;
}

// Opens the sequence if the cache has room for all that is to be read.
bool Scheduler::admit(Sequence& sequence) {
  const auto shareable = static_cast<size_t>(sequence.shareable() + 1);
  sequence.cached = options_.prefix_cache
                        ? cache_.open_sequence({sequence.tokens.data(), shareable}, sequence.salt)
                        : cache_.open_sequence(sequence.salt);
  const int64_t needed = cache_.pages_needed(sequence.cached, remaining(sequence));
  if (pages_to_come() + needed <= cache_.num_free_pages()) return true;
  cache_.close_sequence(sequence.cached);
  sequence.cached = -1;
  return false;
}

std::vector<Slice> Scheduler::schedule() {
  slices_.clear();
  pages_taken_ = 0;
  int64_t left = options_.max_step_tokens;
  const int64_t preemptions = preemptions_;
  const std::vector<Sequence*> order = running_;  // which changes as sequences give way

  for (Sequence* sequence : order) {
    if (sequence->cached < 0 || !decodes(*sequence) || !make_room(*sequence, 1)) continue;
    add_slice(*sequence, 1);
    --left;
  }
  const auto read = [&](Sequence& sequence) {
    const int64_t count = chunk_length(sequence, left);
    if (count == 0) return false;
    if (!make_room(sequence, count)) return true;
    add_slice(sequence, count);
    left -= count;
    return true;
  };
  for (Sequence* sequence : order) {
    if (sequence->cached < 0 || decodes(*sequence)) continue;
    if (!read(*sequence)) break;
  }
  for (size_t i = 0; i < waiting_.size() && preemptions_ == preemptions;) {
    if (left < cache_.page_size() || num_running() == options_.max_sequences) break;
    Sequence& sequence = *waiting_[i];
    if (awaits_shared_prefix(sequence)) {
      ++i;
      continue;
    }
    if (!admit(sequence)) break;
    cached_tokens_ += cache_.length(sequence.cached);
    if (sequence.reused < 0) sequence.reused = cache_.length(sequence.cached);
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    running_.push_back(&sequence);
    if (!read(sequence)) break;
  }
  // Rows of one method lie side by side.
  std::stable_sort(slices_.begin(), slices_.end(), [](const Slice& a, const Slice& b) {
    return std::pair(!a.decode, a.sequence->method) < std::pair(!b.decode, b.sequence->method);
  });
  return slices_;
}

void Scheduler::commit(const std::vector<Slice>& slices) {
  if (!options_.prefix_cache) return;
  for (const Slice& slice : slices) {
    const Sequence& sequence = *slice.sequence;
    const int64_t end = slice.start + slice.count;
    if (sequence.cached < 0 || end > sequence.prefill_end) continue;
    cache_.commit(sequence.cached);
    if (!slice.decode && end % cache_.page_size() == 0) cache_.snapshot(sequence.cached);
  }
}

void Scheduler::restart() {
  while (!running_.empty()) preempt(*running_.back());
}

}  // namespace spot
