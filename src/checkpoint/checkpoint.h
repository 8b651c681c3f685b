// The tensors of a model folder, whether in one safetensors file or in shards.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/safetensors.h"

namespace spot {

class Checkpoint {
 public:
  // `path`: a safetensors file, or a folder with model.safetensors or model.safetensors.index.json and its
  // shards. All shards are opened and validated here. Throws Error when a file is missing or malformed, when
  // the index names a file outside the folder, or a tensor that its shard lacks.
  explicit Checkpoint(const std::filesystem::path& path);

  bool has(const std::string& name) const { return files_.contains(name); }
  std::vector<std::string> names() const;  // ascending
  // See SafetensorsFile::tensor. Throws Error naming the checkpoint when the tensor is absent.
  at::Tensor tensor(const std::string& name) const { return file(name).tensor(name); }
  std::vector<int64_t> shape(const std::string& name) const { return file(name).shape(name); }
  at::ScalarType dtype(const std::string& name) const { return file(name).dtype(name); }
  // The file that holds the tensor, for messages.
  std::string where(const std::string& name) const { return file(name).path().string(); }
  const std::filesystem::path& path() const { return path_; }

 private:
  const SafetensorsFile& file(const std::string& name) const;

  std::filesystem::path path_;
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> files_;  // by tensor
};

}  // namespace spot
