// The tensors of a model folder, whether in one safetensors file or in shards.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "checkpoint/quantization.h"
#include "checkpoint/safetensors.h"

namespace spot {

class Checkpoint {
 public:
  // `path`: a safetensors file, or a folder with model.safetensors or model.safetensors.index.json and its
  // shards. All shards are opened and validated here. Throws Error when a file is missing or malformed, when
  // the index names a file outside the folder, or a tensor that its shard lacks.
  // Quantised matrices appear as the plain ones that they stand for: "x.weight", float32, without their parts.
  explicit Checkpoint(const std::filesystem::path& path, const Quantization& quantization = {});

  bool has(const std::string& name) const { return files_.contains(name) || quantized_.contains(name); }
  std::vector<std::string> names() const;  // ascending
  // See SafetensorsFile::tensor. Throws Error naming the checkpoint when the tensor is absent.
  at::Tensor tensor(const std::string& name) const;
  std::vector<int64_t> shape(const std::string& name) const;
  at::ScalarType dtype(const std::string& name) const {
    return quantized_.contains(name) ? at::kFloat : file(name).dtype(name);
  }
  // Whether the matrix is stored as FP8 codes with a float scale for each block of 128 x 128, and these: "weight" and
  // "weight_scale_inv".
  bool has_fp8_blocks(const std::string& name) const;
  at::Tensor part(const std::string& name, const std::string& suffix) const;
  // The file that holds the tensor or its first part, for messages.
  std::string where(const std::string& name) const {
    const auto it = quantized_.find(name);
    return file(it == quantized_.end() ? name : it->second + quantization_.parts()[0]).path().string();
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  const SafetensorsFile& file(const std::string& name) const;
  void open();
  void fold_quantized();

  std::filesystem::path path_;
  Quantization quantization_;
  std::map<std::string, std::shared_ptr<const SafetensorsFile>> files_;  // by tensor
  std::map<std::string, std::string> quantized_;                         // "x.weight" -> "x."
};

}  // namespace spot
