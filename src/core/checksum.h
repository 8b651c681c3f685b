// Checksums against damage: XXH3 of 64 bits, which reads faster than memory does. No protection against intent.
#pragma once

#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
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

// Adds the field "checksum" to a JSON object: that of all its other fields.
void seal(nlohmann::json& object);
// Throws Error when the object has a "checksum" that is not that of its other fields; `source` names the file.
void check_seal(const nlohmann::json& object, const std::string& source);
// Throws Error when the file's checksum is not `expected`; null: nothing is known of it, nothing is checked.
void check_file(const std::filesystem::path& path, const nlohmann::json& expected);

}  // namespace spot
