// The one exception type of the project.
#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace spot {

// what() is one sentence: what is wrong, where (file, tensor, shape), what to do. The command line prints it
// after "error: " and exits with status 1.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws Error with a formatted message.
template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

// The first line of a torch exception's text, without its C++ backtrace: what a user should see of it.
std::string first_line(const std::exception& e);

}  // namespace spot
