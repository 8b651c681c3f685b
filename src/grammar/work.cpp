#include "grammar/work.h"

#include <limits>

namespace {
constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
thread_local int64_t left = kNoLimit;
}  // namespace

namespace xgrammar {
void CountWork(int64_t steps) {
  if (left == kNoLimit) return;
  left -= steps;
  if (left < 0) throw spot::TooMuchWork();
}
}  // namespace xgrammar

namespace spot {

WorkLimit::WorkLimit(int64_t most) : most_(most) {
  left = most;
}

WorkLimit::~WorkLimit() {
  left = kNoLimit;
}

int64_t WorkLimit::done() const {
  return most_ - left;
}

}  // namespace spot
