// Lines on standard error.
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace spot {

// Writes to standard error and forgets a failure: a full disk, a closed stream or a reader that has gone must not
// end a run. Everything that this project says there goes through it.
void write_stderr(std::string_view text);
template <typename... Args>
void notice(fmt::format_string<Args...> format, Args&&... args) {
  write_stderr(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace spot
