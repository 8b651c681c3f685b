// Which tokens of which sequences the next step runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <vector>

#include "cache/paged_cache.h"

namespace spot {

// One answer in progress: the tokens it has, and how far they lie in the cache.
struct Sequence {
  int64_t id = 0;
  std::vector<int32_t> tokens;  // prompt, then output
  int64_t prompt_length = 0;
  int64_t method = 0;
  // Tokens before this position are read by the method's prefill and can be shared with other requests of the
  // same salt; each one from here on selects for itself. INT64_MAX under dense attention, where both are one.
  int64_t prefill_end = 0;
  // Where the prompt's context ends, whatever the method: requests that ask something else of it go on from here.
  int64_t context_end = 0;
  uint64_t salt = 0;
  int64_t cached = -1;  // the cache's sequence; -1 while it waits
  int64_t reused = -1;  // tokens that the prefix cache held when its turn first came

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  // The longest prefix that may be taken from other requests: what is read alike, but for the last token, whose
  // logits are wanted.
  int64_t shareable() const { return std::min(prefill_end, length() - 1); }
};

// The next `count` tokens of a sequence.
struct Slice {
  Sequence* sequence = nullptr;
  int64_t start = 0, count = 0;
  bool decode = false;   // a decode row
  bool selects = false;  // each token selects for itself, as a decode row does
  bool logits = false;   // the last of the sequence's tokens is among them: the next one can be chosen
};

struct SchedulerOptions {
  int64_t max_step_tokens = 2048;  // tokens of one step, decode rows and prompt chunks together
  int64_t max_sequences = 16;      // that run at once
  bool prefix_cache = true;
};

// First come, first served. Every running sequence whose tokens are all read decodes one token a step; what is
// left of the step's tokens reads prompts, in chunks that end at multiples of about an eighth of the step (or at page
// ends, if steps are small). When pages run out, the sequence
// that came last gives up its pages and waits to be read again (from the prefix cache, as far as that lasts).
class Scheduler {
 public:
  // The cache outlives the scheduler. Throws Error when the options leave no room for a prompt chunk.
  Scheduler(PagedCache& cache, const SchedulerOptions& options);

  // The sequence outlives its stay, from add() to remove(). It must fit the cache alone (see fits()).
  void add(Sequence& sequence);
  // Finished or cancelled: its pages are free at once.
  void remove(Sequence& sequence);
  // The next step: decode rows first, by method; then chunks. Empty only when nothing is running or waiting.
  std::vector<Slice> schedule();
  // After the step's forward pass: what can be shared with later requests is.
  void commit(const std::vector<Slice>& slices);
  // After a failed step: every running sequence waits again, as if nothing of it had been read.
  void restart();

  // Whether a sequence of `tokens` can ever run.
  bool fits(int64_t tokens) const;
  int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
  int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
  int64_t num_preemptions() const { return preemptions_; }
  int64_t cached_tokens() const { return cached_tokens_; }  // prompt tokens that were not read again

 private:
  int64_t remaining(const Sequence& sequence) const;
  bool decodes(const Sequence& sequence) const;
  bool take_pages(const Sequence& sequence, int64_t count);
  bool make_room(Sequence& sequence, int64_t count);
  void preempt(Sequence& sequence);
  int64_t chunk_length(const Sequence& sequence, int64_t most) const;
  int64_t pages_to_come() const;
  bool awaits_shared_prefix(const Sequence& sequence) const;
  bool admit(Sequence& sequence);
  void add_slice(Sequence& sequence, int64_t count);

  PagedCache& cache_;
  SchedulerOptions options_;
  int64_t chunk_step_;  // pages' tokens times a power of two, at most an eighth of a step's room for prompts
  std::vector<Sequence*> running_;  // in order of arrival
  std::deque<Sequence*> waiting_;
  std::vector<Slice> slices_;  // of the step that is being made
  int64_t pages_taken_ = 0;    // by them
  int64_t preemptions_ = 0, cached_tokens_ = 0;
};

}  // namespace spot
