// Checksums against damage: XXH3 of 64 bits, which reads faster than memory does. No protection against intent.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace spot {

class Checksum {
 public:
  Checksum();
  ~Checksum();
  void add(std::string_view bytes);
  // Sixteen hexadecimal digits.
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

std::string checksum_of(std::string_view bytes);
// Of a whole file. Throws Error when it cannot be read.
std::string checksum_of_file(const std::filesystem::path& path);

}  // namespace spot
