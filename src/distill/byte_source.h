// A file's bytes in order, decompressed on the way.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

namespace spot {

class ByteSource {
 public:
  virtual ~ByteSource() = default;
  // Up to `count` bytes; 0 at the end. Throws Error on unreadable, damaged and truncated data.
  virtual size_t read(char* out, size_t count) = 0;
};

enum class Packing { none, gzip, zstd };

// `name` is what errors call the file.
std::unique_ptr<ByteSource> open_bytes(const std::filesystem::path& path, const std::string& name,
                                       Packing packing);

}  // namespace spot
