#include "core/notice.h"

#include <cstdio>

namespace spot {

void write_stderr(std::string_view text) {
  // Errors are forgotten, so that a disk that has room again gets the next line.
  if (std::fwrite(text.data(), 1, text.size(), stderr) < text.size() || std::fflush(stderr) != 0)
    std::clearerr(stderr);
}

}  // namespace spot
