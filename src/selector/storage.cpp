// Selector checkpoints: selector.safetensors holds the weights, selector.json says what they are.
#include <fmt/ranges.h>

#include <bit>
#include <fstream>

#include "checkpoint/safetensors.h"
#include "core/checksum.h"
#include "core/error.h"
#include "core/files.h"
#include "selector/selector.h"

namespace spot {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kFormat = "spotattention-selector";
constexpr int64_t kVersion = 2;  // 1 knows no int8 rows; what has none is still written as 1

// Ties the two files together: a hash over the names, shapes and a sample of the values.
std::string weights_id(const std::vector<std::pair<std::string, at::Tensor>>& tensors) {
  uint64_t hash = 0xcbf29ce484222325ull;
  auto add = [&](uint64_t word) {
    for (int shift = 0; shift < 64; shift += 8) hash = (hash ^ ((word >> shift) & 0xff)) * 0x100000001b3ull;
  };
  for (const auto& [name, tensor] : tensors) {
    for (char c : name) add(static_cast<unsigned char>(c));
    const float* data = tensor.const_data_ptr<float>();
    const int64_t step = std::max<int64_t>(1, tensor.numel() / 1024);
    for (int64_t i = 0; i < tensor.numel(); i += step) add(std::bit_cast<uint32_t>(data[i]));
  }
  return fmt::format("{:016x}", hash);
}

bool is_matrix(const std::string& name) {
  return name.ends_with("query.weight") || name.ends_with("key.weight");
}

// "layers.3.query.scale" of "layers.3.query.weight".
std::string scale_name(const std::string& name) {
  return name.substr(0, name.size() - std::string("weight").size()) + "scale";
}

struct Rows {
  at::Tensor codes;   // int8 [rows, columns], -127 .. 127
  at::Tensor scales;  // float32 [rows]
  at::Tensor values() const { return codes.to(at::kFloat) * scales.unsqueeze(1); }
};

// Symmetric, the largest magnitude of a row becomes 127; ties round to even. A row of zeros has the scale 0.
Rows quantize_rows(const at::Tensor& matrix) {
  const at::Tensor scales = matrix.abs().amax(1) / 127;
  const at::Tensor steps = at::where(scales > 0, scales, at::ones_like(scales)).unsqueeze(1);
  return {(matrix / steps).round().clamp(-127, 127).to(at::kChar), scales};
}

json backbone_facts(const ModelConfig& backbone) {
  return {{"architecture", backbone.architecture}, {"hidden_size", backbone.hidden_size},
          {"num_layers", backbone.num_layers},     {"num_heads", backbone.num_heads},
          {"num_kv_heads", backbone.num_kv_heads}, {"head_dim", backbone.head_dim}};
}

void check_backbone(const json& stored, const json& actual, const std::string& source) {
  if (!stored.is_object())
    fail("{}: field \"backbone\" is missing or no object; the selector must be saved again", source);
  for (const auto& [name, value] : actual.items()) {
    auto found = stored.find(name);
    if (found == stored.end())
      fail("{}: field \"backbone.{}\" is missing; the selector must be saved again", source, name);
    if (*found != value)
      fail(
          "{} was distilled for another backbone: its {} is {}, this model's is {}; use the model it was "
          "made for or distil a selector for this one",
          source, name, found->dump(), value.dump());
  }
}

}  // namespace

fs::path Selector::resolve(const std::string& selector, const fs::path& model_folder) {
  const fs::path path(selector);
  const bool bare = !selector.empty() && !path.has_parent_path() && selector != "." && selector != "..";
  if (bare && fs::is_directory(model_folder / "selectors" / path)) return model_folder / "selectors" / path;
  if (fs::is_directory(path)) return path;
  if (bare)
    fail(
        "there is no selector \"{}\": neither {} nor a folder of that name exists; train one with `spot "
        "distill`",
        selector, (model_folder / "selectors" / path).string());
  fail("the selector folder {} does not exist", selector);
}

void Selector::save(const fs::path& folder, const std::string& fingerprint, const json& notes,
                    WeightFormat format) const {
  make_folder(folder);
  std::vector<std::pair<std::string, at::Tensor>> tensors, values;
  for (const auto& [name, parameter] : named_parameters()) {
    const at::Tensor tensor = parameter.detach().to(at::kCPU, at::kFloat).contiguous();
    if (format == WeightFormat::int8 && is_matrix(name)) {
      const Rows rows = quantize_rows(tensor);
      tensors.emplace_back(name, rows.codes), tensors.emplace_back(scale_name(name), rows.scales);
      values.emplace_back(name, rows.values());
      continue;
    }
    const bool half = format == WeightFormat::bfloat16 && is_matrix(name);
    tensors.emplace_back(name, half ? tensor.to(at::kBFloat16) : tensor);
    values.emplace_back(name, tensors.back().second.to(at::kFloat));
  }
  const std::string id = weights_id(values);
  write_safetensors(folder / "selector.safetensors", tensors,
                    {{"format", kFormat}, {"weights_id", id}, {"preset", config_.preset}});
  json backbone = backbone_facts(backbone_);
  backbone["fingerprint"] = fingerprint;
  json document = {{"format", kFormat},
                   {"version", format == WeightFormat::int8 ? kVersion : 1},
                   {"weight_format", to_string(format)},
                   {"config", config_.to_json()},
                   {"backbone", std::move(backbone)},
                   {"layers", layers_},
                   {"weights_id", id},
                   {"tensors_checksum", checksum_of_file(folder / "selector.safetensors")},
                   {"notes", notes}};
  seal(document);
  write_file_atomically(folder / "selector.json", document.dump(2) + "\n");
}

void Selector::save_config(const fs::path& folder, const json& notes) const {
  const fs::path path = folder / "selector.json";
  json document = read_json(path);
  check_seal(document, path.string());
  document["config"] = config_.to_json();
  document["notes"] = notes;
  seal(document);
  write_file_atomically(path, document.dump(2) + "\n");
}

bool Selector::made_for(const std::string& fingerprint) const {
  return fingerprint_.empty() || fingerprint.empty() || fingerprint_ == fingerprint;
}

std::pair<Selector, json> Selector::read_document(const fs::path& folder, const ModelConfig& backbone,
                                                  at::Device device) {
  const std::string source = (folder / "selector.json").string();
  const json document = read_json(folder / "selector.json");
  if (!document.is_object() || document.value("format", json()) != kFormat)
    fail("{} is not a selector: its field \"format\" must be \"{}\"", source, kFormat);
  if (const json version = document.value("version", json()); version != 1 && version != kVersion)
    fail("{} has version {}, this program reads versions 1 to {}; upgrade it", source, version.dump(),
         kVersion);
  check_seal(document, source);
  check_backbone(document.value("backbone", json()), backbone_facts(backbone), source);

  Selector selector;
  selector.bind(SelectorConfig::from_json(document.value("config", json()), source + ": config"), backbone,
                device);
  if (const json weights = document.at("backbone").value("fingerprint", json("")); weights.is_string())
    selector.fingerprint_ = weights.get<std::string>();
  else
    fail("{}: field \"backbone.fingerprint\" must be a string", source);
  selector.notes_ = document.value("notes", json::object());
  if (document.value("layers", json()) != json(selector.layers_))
    fail("{}: field \"layers\" is {}, but the backbone and dense_layers give {}", source,
         document.value("layers", json()).dump(), json(selector.layers_).dump());
  return {std::move(selector), document};
}

SelectorConfig Selector::read_config(const std::string& name, const fs::path& model_folder,
                                     const ModelConfig& backbone) {
  return read_document(resolve(name, model_folder), backbone, at::kCPU).first.config();
}

Selector Selector::load(const std::string& name, const fs::path& model_folder, const ModelConfig& backbone,
                        at::Device device, at::ScalarType dtype) {
  const fs::path folder = resolve(name, model_folder);
  const std::string source = (folder / "selector.json").string();
  auto [selector, document] = read_document(folder, backbone, device);

  // The id ties the two files together and is made of a sample of the weights; the checksum, which older selectors lack,
  // covers every byte.
  const SafetensorsFile file(folder / "selector.safetensors");
  const auto& metadata = file.metadata();
  if (!metadata.contains("weights_id") || document.value("weights_id", json()) != metadata.at("weights_id"))
    fail("{} and selector.safetensors beside it were not written together; restore both from the same run",
         source);
  check_file(file.path(), document.value("tensors_checksum", json()));
  const SelectorConfig& config = selector.config_;
  std::vector<std::pair<std::string, at::Tensor>> read;  // in the order of save()
  size_t scales = 0;
  const bool int8_rows = document.value("weight_format", json()) == to_string(WeightFormat::int8);
  const auto checked = [&](const std::string& tensor_name, std::vector<int64_t> shape, bool codes) {
    const at::Tensor tensor = file.tensor(tensor_name);
    const at::ScalarType type = tensor.scalar_type();
    if (tensor.sizes() != at::IntArrayRef(shape))
      fail("{}: tensor {} is {}; config and backbone make it {}", file.path().string(), tensor_name,
           fmt::join(tensor.sizes(), "x"), fmt::join(shape, "x"));
    if (codes ? type != at::kChar : type != at::kFloat && type != at::kBFloat16)
      fail("{}: tensor {} is of {}; selector.json makes it {}", file.path().string(), tensor_name,
           c10::toString(type), codes ? "int8" : "float32 or bfloat16");
    if (!codes && !at::isfinite(tensor).all().item<bool>())
      fail("{}: tensor {} holds values that are not finite; train the selector again", file.path().string(),
           tensor_name);
    return tensor;
  };
  for (int64_t layer : selector.layers_) {
    auto take = [&](const char* part, std::vector<int64_t> shape, at::ScalarType target) {
      const std::string tensor_name = fmt::format("layers.{}.{}", layer, part);
      const bool codes = int8_rows && is_matrix(tensor_name);
      at::Tensor tensor = checked(tensor_name, shape, codes).to(codes ? at::kChar : at::kFloat);
      if (codes) {
        const at::Tensor row_scales = checked(scale_name(tensor_name), {shape[0]}, false);
        tensor = Rows{tensor, row_scales.to(at::kFloat)}.values();
        ++scales;
      }
      read.emplace_back(tensor_name, tensor);
      return tensor.to(at::TensorOptions(device).dtype(target), /*non_blocking=*/false, /*copy=*/true);
    };
    LayerWeights& weights = selector.weights_[layer];
    weights.query = take("query.weight", {config.num_heads * config.head_dim, backbone.hidden_size}, dtype);
    weights.key = take("key.weight", {config.key_heads * config.head_dim, backbone.hidden_size}, dtype);
    stack(weights);
    weights.mix =
        take("mix.weight", {selector.groups_ * config.num_heads, backbone.hidden_size}, fine_type(dtype));
    if (config.key_norm != KeyNorm::none)
      weights.norm_weight = take("key_norm.weight", {config.head_dim}, fine_type(dtype));
    if (config.key_norm == KeyNorm::layernorm)
      weights.norm_bias = take("key_norm.bias", {config.head_dim}, fine_type(dtype));
  }
  if (file.names().size() != read.size() + scales)
    fail("{} holds {} tensors, the config makes {}", file.path().string(), file.names().size(),
         read.size() + scales);
  if (weights_id(read) != metadata.at("weights_id"))
    fail("{}: the weights are not those that were saved; the file is damaged, restore it or train again",
         file.path().string());
  return selector;
}

}  // namespace spot
