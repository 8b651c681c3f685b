// Selector checkpoints: selector.safetensors holds the weights, selector.json says what they are.
#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <limits>

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
constexpr int64_t kVersion = 3;  // the newest
const std::vector<at::ScalarType> kFloats = {at::kFloat, at::kBFloat16};

// The first that knows the format, so that older programs ask for an upgrade only where they need it.
int64_t version_of(WeightFormat format) {
  return format == WeightFormat::int4 ? 3 : format == WeightFormat::int8 ? 2 : 1;
}

std::string word_of(at::ScalarType type) {
  return std::string(c10::getDtypeNames(type).first);
}

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

bool is_quantised(WeightFormat format) {
  return format == WeightFormat::int8 || format == WeightFormat::int4;
}

// "layers.3.query.scale" of "layers.3.query.weight".
std::string scale_name(const std::string& name) {
  return name.substr(0, name.size() - std::string("weight").size()) + "scale";
}

// What the file holds of a matrix [rows, columns].
struct Rows {
  // int8: int8 [rows, columns], -127 .. 127. int4: uint8 [rows, columns / 2], code + 8 of the even column in the low four
  // bits, of the odd one in the high.
  at::Tensor codes;
  at::Tensor scales;  // int8: float32 [rows]. int4: bfloat16 [rows, columns / 32]

  at::Tensor values() const {
    const at::Tensor numbers =
        codes.scalar_type() == at::kByte
            ? at::stack({codes.bitwise_and(15), codes.bitwise_right_shift(4)}, 2).to(at::kFloat) - 8
            : codes.to(at::kFloat);
    const int64_t rows = codes.size(0), groups = scales.numel() / rows;
    return (numbers.view({rows, groups, -1}) * scales.to(at::kFloat).view({rows, groups, 1})).flatten(1);
  }
};

// Symmetric; ties round to even, a group of zeros has the scale 0. int8: the largest magnitude of a row becomes 127. int4: of
// eight scales, from the one by which the largest magnitude becomes 7 down to 0.7 of it, that of the least squared error; by
// 7/8 of it a largest magnitude of -8 comes back, so that rows which were stored before stay as they are.
Rows quantize_rows(const at::Tensor& matrix, WeightFormat format) {
  const bool int4 = format == WeightFormat::int4;
  const int64_t rows = matrix.size(0), top = int4 ? 7 : 127, bottom = int4 ? -8 : -127;
  const at::Tensor numbers = matrix.view({rows, -1, int4 ? kInt4Group : matrix.size(1)});
  const at::Tensor largest = numbers.abs().amax(2, true);
  at::Tensor codes = at::zeros_like(numbers), scales = at::zeros_like(largest),
             least = at::full_like(largest, std::numeric_limits<double>::infinity(), at::kDouble);
  for (const double share :
       int4 ? std::vector{1.0, 0.95, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7} : std::vector{1.0}) {
    at::Tensor scale = largest * share / top;
    if (int4) scale = scale.to(at::kBFloat16).to(at::kFloat);
    const at::Tensor step = at::where(scale > 0, scale, at::ones_like(scale));
    const at::Tensor code = (numbers / step).round().clamp(bottom, top);
    const at::Tensor error = (code.to(at::kDouble) * scale - numbers).square().sum(2, true);
    const at::Tensor keep = error >= least;  // not for NaN, which loading refuses
    codes = at::where(keep, codes, code), scales = at::where(keep, scales, scale);
    least = at::where(keep, least, error);
  }
  if (!int4) return {codes.view({rows, -1}).to(at::kChar), scales.view({rows})};
  const at::Tensor pairs = (codes + 8).to(at::kByte).view({rows, -1, 2});
  return {pairs.select(2, 0).bitwise_or(pairs.select(2, 1).bitwise_left_shift(4)),
          scales.view({rows, -1}).to(at::kBFloat16)};
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
  check_width(format, backbone_.hidden_size, folder.string());
  for (const auto& [name, parameter] : named_parameters())
    if (!at::isfinite(parameter).all().item<bool>())
      fail("{}: not saved, the weight {} holds values that are not finite", folder.string(), name);
  make_folder(folder);
  std::vector<std::pair<std::string, at::Tensor>> tensors, values;
  for (const auto& [name, parameter] : named_parameters()) {
    const at::Tensor tensor = parameter.detach().to(at::kCPU, at::kFloat).contiguous();
    if (is_quantised(format) && is_matrix(name)) {
      const Rows rows = quantize_rows(tensor, format);
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
                   {"version", version_of(format)},
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
  if (const json version = document.value("version", json());
      !version.is_number_integer() || version < 1 || version > kVersion)
    fail("{} has version {}, this program reads versions 1 to {}; {}", source, version.dump(), kVersion,
         version.is_number_integer() && version > kVersion ? "upgrade it" : "restore the file");
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
  const json format = document.value("weight_format", json());
  const bool int8 = format == to_string(WeightFormat::int8), int4 = format == to_string(WeightFormat::int4);
  if (int4) check_width(WeightFormat::int4, backbone.hidden_size, source);
  const auto check_finite = [&](const at::Tensor& tensor, const std::string& tensor_name) {
    if (!at::isfinite(tensor).all().item<bool>())
      fail("{}: tensor {} holds values that are not finite; train the selector again", file.path().string(),
           tensor_name);
  };
  const auto checked = [&](const std::string& tensor_name, std::vector<int64_t> shape,
                           const std::vector<at::ScalarType>& types) {
    const at::Tensor tensor = file.tensor(tensor_name);
    const at::ScalarType type = tensor.scalar_type();
    if (tensor.sizes() != at::IntArrayRef(shape))
      fail("{}: tensor {} is [{}]; config and backbone make it [{}]", file.path().string(), tensor_name,
           fmt::join(tensor.sizes(), ", "), fmt::join(shape, ", "));
    if (std::find(types.begin(), types.end(), type) == types.end())
      fail("{}: tensor {} is of {}; selector.json makes it {}", file.path().string(), tensor_name,
           word_of(type), word_of(types[0]) + (types.size() > 1 ? " or " + word_of(types[1]) : ""));
    check_finite(tensor, tensor_name);
    return tensor;
  };
  for (int64_t layer : selector.layers_) {
    auto take = [&](const char* part, std::vector<int64_t> shape, at::ScalarType target) {
      const std::string tensor_name = fmt::format("layers.{}.{}", layer, part);
      at::Tensor tensor;
      if (is_matrix(tensor_name) && (int8 || int4)) {
        const int64_t rows = shape[0], columns = shape[1];
        const std::string scale = scale_name(tensor_name);
        tensor =
            int4 ? Rows{checked(tensor_name, {rows, columns / 2}, {at::kByte}),
                        checked(scale, {rows, columns / kInt4Group}, {at::kBFloat16})}
                       .values()
                 : Rows{checked(tensor_name, shape, {at::kChar}), checked(scale, {rows}, kFloats)}.values();
        check_finite(tensor, tensor_name);  // a code times its scale may be beyond float32
        ++scales;
      } else {
        tensor = checked(tensor_name, shape, kFloats).to(at::kFloat);
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
