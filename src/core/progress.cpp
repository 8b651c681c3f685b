#include "core/progress.h"

#include <unistd.h>

#include <algorithm>

#include "core/notice.h"

namespace spot {
namespace {

std::string clock_text(double seconds) {
  const auto s = static_cast<int64_t>(seconds + 0.5);
  return s >= 3600 ? fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60)
                   : fmt::format("{}:{:02}", s / 60, s % 60);
}

double between(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

bool silent = false;

}  // namespace

void silence() {
  silent = true;
}
bool is_silent() {
  return silent;
}

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)),
      total_(std::max<int64_t>(total, 1)),
      terminal_(::isatty(STDERR_FILENO) == 1),
      start_(std::chrono::steady_clock::now()),
      last_(start_) {}

Progress::~Progress() {
  if (drawn_) draw(true);
}

void Progress::start_from(int64_t done) {
  base_ = done_ = done;
}

double Progress::seconds() const {
  return between(start_, std::chrono::steady_clock::now());
}

void Progress::update(int64_t done, const std::string& note) {
  done_ = done;
  note_ = note;
  const auto now = std::chrono::steady_clock::now();
  if (between(start_, now) < 0.5 || (drawn_ && between(last_, now) < (terminal_ ? 0.1 : 10.0))) return;
  last_ = now;
  drawn_ = true;
  draw(false);
}

void Progress::draw(bool final) {
  if (silent) return;
  const double elapsed = seconds();
  const double share = std::clamp(static_cast<double>(done_) / static_cast<double>(total_), 0.0, 1.0);
  std::string line = fmt::format("{} ", label_);
  if (terminal_) {
    const int filled = static_cast<int>(share * 24);
    line += fmt::format("[{}{}] ", std::string(filled, '#'), std::string(24 - filled, ' '));
  }
  line += fmt::format("{}/{} {:.0f}%", done_, total_, 100 * share);
  if (!note_.empty()) line += " " + note_;
  line += fmt::format(", {} elapsed", clock_text(elapsed));
  if (!final && done_ > base_) {
    line += fmt::format(", {} left", clock_text(elapsed * static_cast<double>(total_ - done_) /
                                                static_cast<double>(done_ - base_)));
  }
  if (terminal_) {
    notice("\r{}\x1b[K{}", line, final ? "\n" : "");
  } else {
    notice("{}\n", line);
  }
}

}  // namespace spot
