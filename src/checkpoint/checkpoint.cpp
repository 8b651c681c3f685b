#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace fs = std::filesystem;

namespace {

// Weights in a form that is not read, for a folder without safetensors files: what to do about it.
std::string advice(const fs::path& folder) {
  std::error_code code;
  for (fs::directory_iterator entry(folder, code), end; !code && entry != end; entry.increment(code)) {
    const std::string name = entry->path().filename().string();
    if (name.ends_with(".gguf")) return fmt::format("; tools/convert_gguf.py makes a checkpoint of {}", name);
    if (name.ends_with(".bin") || name.ends_with(".pt") || name.ends_with(".pth"))
      return fmt::format("; {} holds pickled tensors, save the model anew as safetensors", name);
    if (name.ends_with(".safetensors"))
      return fmt::format("; {} is there, but without an index it cannot be the whole model", name);
  }
  return "";
}

bool shape_is_empty(const std::vector<int64_t>& shape) {
  return std::find(shape.begin(), shape.end(), 0) != shape.end();
}

}  // namespace

Checkpoint::Checkpoint(const fs::path& path, const Quantization& quantization)
    : path_(path), quantization_(quantization) {
  open();
  fold_quantized();
}

void Checkpoint::open() {
  const fs::path& path = path_;
  std::error_code code;
  fs::path single = path;
  if (fs::is_directory(path, code)) {
    single = path / "model.safetensors";
    const fs::path index_path = path / "model.safetensors.index.json";
    if (!fs::exists(single, code) && has_file(index_path)) {
      const nlohmann::json index = read_json(index_path);
      const auto map = index.is_object() ? index.find("weight_map") : index.end();
      if (map == index.end() || !map->is_object()) fail("{}: weight_map is missing", index_path.string());
      std::map<std::string, std::shared_ptr<const SafetensorsFile>> opened;
      for (const auto& [name, shard] : map->items()) {
        if (!shard.is_string())
          fail("{}: the file of tensor '{}' is not a string", index_path.string(), name);
        const auto& file_name = shard.get_ref<const std::string&>();
        // A shard lies beside its index: anything else could read files that the user did not name.
        if (file_name.empty() || fs::path(file_name).filename() != file_name || file_name == "." ||
            file_name == "..") {
          fail("{}: tensor '{}' points to '{}', which is no file name", index_path.string(), name, file_name);
        }
        auto& file = opened[file_name];
        if (!file) file = std::make_shared<const SafetensorsFile>(path / file_name);
        if (!file->has(name)) {
          fail("{}: tensor '{}' is missing, although {} places it there", file->path().string(), name,
               index_path.filename().string());
        }
        files_[name] = file;
      }
      if (files_.empty()) fail("{}: weight_map is empty", index_path.string());
      return;
    }
    if (!fs::exists(single, code) && !fs::is_symlink(single, code)) {
      fail("{}: holds neither model.safetensors nor model.safetensors.index.json{}", path.string(),
           advice(path));
    }
  }
  const auto file = std::make_shared<const SafetensorsFile>(single);
  for (const std::string& name : file->names()) files_[name] = file;
}

// Finds the matrices that lie here in parts.
void Checkpoint::fold_quantized() {
  const std::vector<std::string> parts = quantization_.parts();
  if (parts.empty()) return;
  for (const auto& [name, file] : files_) {
    if (!name.ends_with("." + parts[0])) continue;
    const std::string stem = name.substr(0, name.size() - parts[0].size());
    for (const std::string& part : parts)
      if (!files_.contains(stem + part) && part != Quantization::kOptionalPart)
        fail("{}: tensor '{}' is missing, although '{}' is there", path_.string(), stem + part, name);
    if (quantization_.method == Quantization::Method::fp8 && !files_.contains(stem + "weight"))
      fail("{}: tensor '{}' is missing, although '{}' is there", path_.string(), stem + "weight", name);
    for (const std::string& part : {name, stem + "qzeros", stem + "scales", stem + "g_idx", stem + "weight"})
      if (files_.contains(part) && shape_is_empty(shape(part)))
        fail("{}: tensor '{}' holds nothing", where(part), part);
    quantized_[stem + "weight"] = stem;
  }
}

at::Tensor Checkpoint::tensor(const std::string& name) const {
  const auto it = quantized_.find(name);
  if (it == quantized_.end()) return file(name).tensor(name);
  const std::string& stem = it->second;
  return quantization_.dequantize(
      [&](const std::string& part) {
        return files_.contains(stem + part) ? file(stem + part).tensor(stem + part) : at::Tensor();
      },
      where(name) + ": " + stem.substr(0, stem.size() - 1));
}

bool Checkpoint::has_fp8_blocks(const std::string& name) const {
  return quantization_.method == Quantization::Method::fp8 && quantization_.block_rows == 128 &&
         quantization_.block_columns == 128 && quantized_.contains(name);
}

at::Tensor Checkpoint::part(const std::string& name, const std::string& suffix) const {
  const std::string part = quantized_.at(name) + suffix;
  return file(part).tensor(part);
}

std::vector<int64_t> Checkpoint::shape(const std::string& name) const {
  const auto it = quantized_.find(name);
  if (it == quantized_.end()) return file(name).shape(name);
  const std::string& stem = it->second;
  return quantization_.shape([&](const std::string& part) { return file(stem + part).shape(stem + part); });
}

std::vector<std::string> Checkpoint::names() const {
  std::set<std::string> names;
  for (const auto& [name, file] : files_) names.insert(name);
  for (const auto& [name, stem] : quantized_) {
    for (const std::string& part : quantization_.parts()) names.erase(stem + part);
    names.insert(name);
  }
  return {names.begin(), names.end()};
}

const SafetensorsFile& Checkpoint::file(const std::string& name) const {
  const auto it = files_.find(name);
  if (it == files_.end()) fail("{}: tensor '{}' is missing", path_.string(), name);
  return *it->second;
}

}  // namespace spot
