// A promise of the engine to score_blocks and select_and_attend on CUDA: while one of these lives in a thread, the
// launch just before each of theirs in the stream wrote nothing that they read but
//
//   score_blocks       the query, the weight and each row's last block of keys
//   select_and_attend  the scores
//
// The rest is then read while that launch drains (kernels/types.h, Overlap::kHistory). A promise about launches, which no
// argument of an operator can carry: made wrongly, stale data is read in silence.
#pragma once

namespace spot::ops {

class SettledHistory {
 public:
  explicit SettledHistory(bool holds) : outer_(current_) { current_ = holds; }
  ~SettledHistory() { current_ = outer_; }
  SettledHistory(const SettledHistory&) = delete;
  SettledHistory& operator=(const SettledHistory&) = delete;
  static bool holds() { return current_; }

 private:
  bool outer_;
  static inline thread_local bool current_ = false;
};

}  // namespace spot::ops
