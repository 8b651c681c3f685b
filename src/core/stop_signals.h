// Ends that are asked for: interrupts, a job's end, a terminal that goes away.
#pragma once

#include <csignal>
#include <iterator>

namespace spot {

// While alive notes the first SIGINT, SIGTERM or SIGHUP; a second of the same kind acts as if this were not there. A
// signal that was ignored before (nohup) stays ignored. SIGPIPE is ignored meanwhile: a reader of the progress lines that
// goes away must not end the work. One at a time.
class StopSignals {
 public:
  // Does nothing unless `active`.
  explicit StopSignals(bool active);
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  bool received() const;

 private:
  static constexpr int kSignals[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
  bool active_;
  struct sigaction old_[std::size(kSignals)] = {};
};

}  // namespace spot
