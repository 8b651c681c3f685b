// The safetensors file format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace spot {

// A memory-mapped safetensors file. Opening validates the whole header: its length, its JSON (no key twice),
// that each tensor's bytes equal its dtype times its shape, and that the tensors cover the data exactly,
// without gap or overlap.
class SafetensorsFile {
 public:
  // Throws Error naming the file and the offending tensor.
  explicit SafetensorsFile(const std::filesystem::path& path);

  bool has(const std::string& name) const { return entries_.contains(name); }
  // Tensor names, ascending.
  std::vector<std::string> names() const;
  // The tensor on the CPU in its stored dtype. It views the mapping and keeps it alive; writing to it changes
  // this process's private copy, never the file. Throws Error when the name is absent.
  at::Tensor tensor(const std::string& name) const;
  std::vector<int64_t> shape(const std::string& name) const { return entry(name).shape; }
  at::ScalarType dtype(const std::string& name) const { return entry(name).dtype; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::filesystem::path& path() const { return path_; }

 private:
  struct Entry {
    at::ScalarType dtype;
    std::vector<int64_t> shape;
    uint64_t begin, end;  // bytes from the start of the data
  };
  struct Mapping;
  const Entry& entry(const std::string& name) const;
  void read_header();

  std::filesystem::path path_;
  std::shared_ptr<Mapping> mapping_;
  uint64_t data_offset_ = 0;
  std::map<std::string, Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

// Writes tensors (any device and strides) atomically. The same tensors and metadata give the same bytes,
// whatever their order: larger element types first, so that each tensor is aligned to its element, then by
// name. Throws Error on a name given twice, on an element type that the format lacks, and when the file
// cannot be written. `before` is told of each tensor's bytes before they are written; what it throws ends the writing,
// and nothing is left of the file.
void write_safetensors(const std::filesystem::path& path,
                       std::vector<std::pair<std::string, at::Tensor>> tensors,
                       const std::map<std::string, std::string>& metadata = {},
                       const std::function<void(uint64_t bytes)>& before = {});

}  // namespace spot
