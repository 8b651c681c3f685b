#include "text/jinja/limits.h"

namespace spot::jinja {
namespace {

thread_local Budget* current = nullptr;
thread_local int64_t live_bytes = 0;

}  // namespace

Budget::Budget() : outer_(current), bytes_before_(live_bytes) {
  current = this;
}

Budget::~Budget() {
  current = outer_;
}

void spend(int64_t work) {
  if (!current) return;
  current->work_left_ -= work;
  if (current->work_left_ < 0) fault("the template does more work than is allowed ({} steps)", kMaxWork);
}

void hold(int64_t bytes) {
  if (current && live_bytes + bytes - current->bytes_before_ > kMaxLiveBytes)
    fault("the template's values take more than {} MiB", kMaxLiveBytes >> 20);
  live_bytes += bytes;
}

void release(int64_t bytes) noexcept {
  live_bytes -= bytes;
}

}  // namespace spot::jinja
