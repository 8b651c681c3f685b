// What the libFuzzer targets share. Each gives any bytes to one reader, from which nothing but spot::Error may come;
// AddressSanitizer and UBSan watch. `make fuzz` builds them (preset asan) and runs each for some
// seconds.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "core/error.h"

namespace spot::fuzz {

// A folder in memory for files of this process.
class Folder {
 public:
  Folder() : path_("/dev/shm/spot-fuzz-" + std::to_string(::getpid())) {
    std::filesystem::create_directories(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::filesystem::path write(const std::string& name, const uint8_t* data, size_t size) const {
    std::ofstream out(path_ / name, std::ios::binary | std::ios::trunc);
    out.write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
    out.close();
    if (!out) std::abort();
    return path_ / name;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

inline const Folder& folder() {
  static const Folder one;
  return one;
}

template <typename Read>
int expect_nothing_but_errors(const Read& read) {
  try {
    read();
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace spot::fuzz
