#include "core/stop_signals.h"

namespace spot {
namespace {

volatile std::sig_atomic_t stop_signal = 0;

}  // namespace

StopSignals::StopSignals(bool active) : active_(active) {
  if (!active_) return;
  stop_signal = 0;
  for (size_t i = 0; i < std::size(kSignals); ++i) {
    sigaction(kSignals[i], nullptr, &old_[i]);
    if (old_[i].sa_handler == SIG_IGN) continue;
    struct sigaction action = {};
    if (kSignals[i] == SIGPIPE) {
      action.sa_handler = SIG_IGN;
    } else {
      action.sa_handler = [](int signal) { stop_signal = signal; };
      action.sa_flags = static_cast<int>(SA_RESETHAND) | SA_RESTART;
    }
    sigaction(kSignals[i], &action, nullptr);
  }
}

StopSignals::~StopSignals() {
  if (!active_) return;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_[i], nullptr);
}

bool StopSignals::received() const {
  return active_ && stop_signal != 0;
}

}  // namespace spot
