#include "model/weights.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "checkpoint/checkpoint.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/notice.h"
#include "core/progress.h"

namespace spot {
namespace {

using Init = TensorSpec::Init;

const std::string kHead = "lm_head.weight";

// Gives a tensor of the checkpoint by its unprefixed name, in the dtype asked for.
using Read = std::function<at::Tensor(const std::string& name, at::ScalarType dtype)>;
// Where a model's tensors come from. A matrix that has codes may be taken as these instead.
struct Source {
  Read read;
  std::function<bool(const std::string& name)> has_codes;
  std::function<Fp8Blocks(const std::string& name)> codes;
};

// 64-bit FNV-1a over what a selector depends on: the shape of the model and a few values of every weight,
// rounded to bfloat16 so that the dtype a model is kept in does not matter.
class Fingerprint {
 public:
  explicit Fingerprint(const ModelConfig& c) {
    add(fmt::format("{} {} {} {} {} {} {} {} {} {}", c.hidden_size, c.num_layers, c.num_heads, c.num_kv_heads,
                    c.head_dim, c.intermediate_size, c.vocab_size, c.rope.theta, c.rope.rotary_dim,
                    c.rms_norm_eps));
  }
  void add(const std::string& name, const at::Tensor& tensor) {
    constexpr int64_t kSamples = 16;
    const at::Tensor flat = tensor.reshape({-1});
    const int64_t stride = std::max<int64_t>(1, flat.numel() / kSamples);
    const at::Tensor sample = flat.slice(0, 0, std::min(flat.numel(), kSamples * stride), stride)
                                  .to(at::kFloat)
                                  .to(at::kBFloat16)
                                  .cpu()
                                  .contiguous();
    add(name);
    add(std::string_view(static_cast<const char*>(sample.const_data_ptr()), sample.nbytes()));
  }
  std::string text() const { return fmt::format("{:016x}", hash_); }

 private:
  void add(std::string_view bytes) {
    for (const char byte : bytes) hash_ = (hash_ ^ static_cast<unsigned char>(byte)) * 0x100000001b3u;
  }
  uint64_t hash_ = 0xcbf29ce484222325u;
};

// Lays the tensors out: projections that share an input become one matrix, filled part by part so that no
// second copy of the model ever exists.
class Builder {
 public:
  Builder(const ModelConfig& config, at::Device device, at::ScalarType dtype, Source source,
          Shards shards = {})
      : config_(config),
        device_(device),
        dtype_(dtype),
        source_(std::move(source)),
        shards_(std::move(shards)) {}

  ModelWeights build() {
    ModelWeights weights;
    weights.config = config_;
    weights.dtype = dtype_;
    weights.embedding = source_.read("embed_tokens.weight", dtype_);
    if (shards_.count > 1) weights.sharded.emplace(shards_);
    for (int64_t i = 0; i < config_.num_layers; ++i) {
      weights.layers.push_back(layer(i));
      if (weights.sharded) weights.sharded->take(weights.layers.back());
    }
    weights.final_norm = norm("norm.weight");
    weights.head = config_.tie_word_embeddings ? weights.embedding : source_.read(kHead, dtype_);
    const auto positions = static_cast<double>(config_.max_position_embeddings);
    // Angles, their cosines and their sines.
    within_memory({.what = fmt::format("the rotations of {} positions", config_.max_position_embeddings),
                   .remedy = "lower max_position_embeddings in config.json",
                   .bytes = positions * static_cast<double>(config_.rope.rotary_dim / 2) * 3 * sizeof(float)},
                  [&] { weights.rope = rope_table(config_.rope, config_.max_position_embeddings, device_); });
    if (!config_.nope_layers.empty()) {
      const auto options = at::TensorOptions(device_).dtype(at::kFloat);
      weights.no_rotation = {at::ones({config_.max_position_embeddings, 1}, options),
                             at::zeros({config_.max_position_embeddings, 1}, options)};
    }
    return weights;
  }

 private:
  // The factor a norm multiplies by. Zero-centred weights w are kept as 1 + w in float32, where nothing is
  // rounded.
  at::Tensor norm(const std::string& name) {
    return config_.zero_centred_norm ? source_.read(name, at::kFloat).add_(1) : source_.read(name, dtype_);
  }

  LinearWeights linear(const std::vector<std::string>& parts, bool bias) {
    LinearWeights result;
    if (take_codes(parts)) {
      result = codes(parts);
    } else {
      result.weight = rows(parts, ".weight");
    }
    if (bias) result.bias = rows(parts, ".bias");
    return result;
  }

  // Codes stay codes where products read them: on a GPU, if all parts are codes and their blocks lie as one
  // matrix's. Shards move plain matrices.
  bool take_codes(const std::vector<std::string>& parts) const {
    if (!device_.is_cuda() || dtype_ == at::kFloat || shards_.count > 1) return false;
    for (const std::string& part : parts) {
      const std::vector<int64_t>& shape = shapes_.at(part + ".weight");
      if (!source_.has_codes(part + ".weight") || shape[1] % 16 != 0 ||
          (part != parts.back() && shape[0] % 128 != 0))
        return false;
    }
    return true;
  }

  LinearWeights codes(const std::vector<std::string>& parts) const {
    std::vector<at::Tensor> bytes, scales;
    for (const std::string& part : parts) {
      const Fp8Blocks blocks = source_.codes(part + ".weight");
      bytes.push_back(blocks.codes.view(at::kByte));
      scales.push_back(blocks.scales);
    }
    return {.weight = at::cat(bytes).view(at::kFloat8_e4m3fn), .bias = {}, .scales = at::cat(scales)};
  }

  at::Tensor rows(const std::vector<std::string>& parts, const std::string& suffix) {
    if (parts.size() == 1) return source_.read(parts[0] + suffix, dtype_);
    int64_t total = 0;
    std::vector<int64_t> shape;
    for (const std::string& part : parts) {
      shape = shapes_.at(part + suffix);
      total += shape[0];
    }
    shape[0] = total;
    at::Tensor all = at::empty(shape, at::TensorOptions().dtype(dtype_).device(device_));
    int64_t row = 0;
    for (const std::string& part : parts) {
      const at::Tensor piece = source_.read(part + suffix, dtype_);
      all.narrow(0, row, piece.size(0)).copy_(piece);
      row += piece.size(0);
    }
    return all;
  }

  AttentionWeights attention(const std::string& prefix) {
    AttentionWeights attention;
    attention.qkv = linear({prefix + "q_proj", prefix + "k_proj", prefix + "v_proj"}, config_.qkv_bias);
    attention.out = linear({prefix + "o_proj"}, config_.attention_output_bias);
    if (config_.qk_norm) {
      const auto factor = [&](const std::string& name, int64_t heads) {
        return source_.read(prefix + name, at::kFloat)
            .add(config_.zero_centred_norm ? 1 : 0)
            .expand({heads, -1});
      };
      attention.qk_norm = at::cat(
          {factor("q_norm.weight", config_.num_heads), factor("k_norm.weight", config_.num_kv_heads)});
    }
    return attention;
  }

  DeltaNetWeights delta(const std::string& prefix) {
    DeltaNetWeights delta;
    delta.in = linear(
        {prefix + "in_proj_qkv", prefix + "in_proj_z", prefix + "in_proj_b", prefix + "in_proj_a"}, false);
    delta.out = linear({prefix + "out_proj"}, false);
    // One after another: the order of reading is the fingerprint's, and that of arguments is the compiler's.
    const at::Tensor norm = source_.read(prefix + "norm.weight", at::kFloat);
    const at::Tensor dt_bias = source_.read(prefix + "dt_bias", at::kFloat);
    const at::Tensor a_log = source_.read(prefix + "A_log", at::kFloat);
    const at::Tensor convolution = source_.read(prefix + "conv1d.weight", at::kFloat);
    delta.rule = ops::gated_delta_weights(convolution, a_log, dt_bias, norm, config_.rms_norm_eps);
    return delta;
  }

  LayerWeights layer(int64_t i) {
    const std::string prefix = fmt::format("layers.{}.", i);
    LayerWeights layer;
    layer.input_norm = norm(prefix + "input_layernorm.weight");
    layer.mlp_norm = norm(prefix + "post_attention_layernorm.weight");
    if (config_.is_full_attention(i)) {
      layer.attention = attention(prefix + "self_attn.");
    } else {
      layer.delta = delta(prefix + "linear_attn.");
    }
    layer.gate_up = linear({prefix + "mlp.gate_proj", prefix + "mlp.up_proj"}, config_.mlp_bias);
    layer.down = linear({prefix + "mlp.down_proj"}, config_.mlp_bias);
    return layer;
  }

  static std::map<std::string, std::vector<int64_t>> shapes_of(const ModelConfig& config) {
    std::map<std::string, std::vector<int64_t>> shapes;
    for (const TensorSpec& spec : tensor_specs(config)) shapes[spec.name] = spec.shape;
    return shapes;
  }

  const ModelConfig& config_;
  at::Device device_;
  at::ScalarType dtype_;
  Source source_;
  Shards shards_;
  std::map<std::string, std::vector<int64_t>> shapes_ = shapes_of(config_);
};

// "a, b, c and 12 more"
std::string some_of(const std::vector<std::string>& names) {
  constexpr size_t kShown = 3;
  const std::vector<std::string> shown(names.begin(), names.begin() + std::min(kShown, names.size()));
  const std::string more = names.size() > kShown ? fmt::format(" and {} more", names.size() - kShown) : "";
  return fmt::format("{}{}", fmt::join(shown, ", "), more);
}

// What stands before the names of tensor_specs in this checkpoint.
std::string prefix_of(const Checkpoint& checkpoint) {
  for (const std::string prefix : {"model.language_model.", ""}) {
    if (checkpoint.has(prefix + "embed_tokens.weight")) return prefix;
  }
  return "model.";
}

at::ScalarType parse_dtype(const std::string& name) {
  return name == "bfloat16" ? at::kBFloat16 : name == "float16" ? at::kHalf : at::kFloat;
}

void check_dtype(at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
    fail("a model cannot be kept in {}; float32, bfloat16 and float16 are possible", c10::toString(dtype));
  }
}

}  // namespace

std::vector<TensorSpec> tensor_specs(const ModelConfig& c) {
  std::vector<TensorSpec> specs;
  const Init norm_init = c.zero_centred_norm ? Init::zero : Init::one;
  const auto linear = [&](const std::string& name, int64_t out, int64_t in, bool bias) {
    specs.push_back({name + ".weight", {out, in}});
    if (bias) specs.push_back({name + ".bias", {out}});
  };
  specs.push_back({"embed_tokens.weight", {c.vocab_size, c.hidden_size}});
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const std::string layer = fmt::format("layers.{}.", i);
    specs.push_back({layer + "input_layernorm.weight", {c.hidden_size}, norm_init});
    specs.push_back({layer + "post_attention_layernorm.weight", {c.hidden_size}, norm_init});
    if (c.is_full_attention(i)) {
      const std::string attention = layer + "self_attn.";
      const int64_t query_rows = c.num_heads * c.head_dim * (c.attention_output_gate ? 2 : 1);
      linear(attention + "q_proj", query_rows, c.hidden_size, c.qkv_bias);
      linear(attention + "k_proj", c.num_kv_heads * c.head_dim, c.hidden_size, c.qkv_bias);
      linear(attention + "v_proj", c.num_kv_heads * c.head_dim, c.hidden_size, c.qkv_bias);
      linear(attention + "o_proj", c.hidden_size, c.num_heads * c.head_dim, c.attention_output_bias);
      if (c.qk_norm) {
        specs.push_back({attention + "q_norm.weight", {c.head_dim}, norm_init});
        specs.push_back({attention + "k_norm.weight", {c.head_dim}, norm_init});
      }
    } else {
      const std::string delta = layer + "linear_attn.";
      const int64_t values = c.linear.num_value_heads * c.linear.value_head_dim;
      const int64_t channels = 2 * c.linear.num_key_heads * c.linear.key_head_dim + values;
      linear(delta + "in_proj_qkv", channels, c.hidden_size, false);
      linear(delta + "in_proj_z", values, c.hidden_size, false);
      linear(delta + "in_proj_b", c.linear.num_value_heads, c.hidden_size, false);
      linear(delta + "in_proj_a", c.linear.num_value_heads, c.hidden_size, false);
      linear(delta + "out_proj", c.hidden_size, values, false);
      specs.push_back({delta + "conv1d.weight", {channels, 1, c.linear.conv_kernel}});
      specs.push_back({delta + "A_log", {c.linear.num_value_heads}, Init::log_uniform});
      specs.push_back({delta + "dt_bias", {c.linear.num_value_heads}, Init::one});
      specs.push_back({delta + "norm.weight", {c.linear.value_head_dim}, Init::one});
    }
    linear(layer + "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(layer + "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(layer + "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  }
  specs.push_back({"norm.weight", {c.hidden_size}, norm_init});
  if (!c.tie_word_embeddings) specs.push_back({kHead, {c.vocab_size, c.hidden_size}});
  return specs;
}

bool all_finite(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  // NaN and infinities survive both extremes; unlike isfinite this takes no memory of the tensor's size.
  const auto [least, greatest] = at::aminmax(tensor);
  return std::isfinite(least.item<double>()) && std::isfinite(greatest.item<double>());
}

std::string CheckedTensors::full_name(const std::string& short_name) const {
  return short_name == kHead ? short_name : prefix + short_name;
}

CheckedTensors check_tensors(const Checkpoint& checkpoint, const ModelConfig& config) {
  const std::vector<TensorSpec> specs = tensor_specs(config);
  CheckedTensors found{.prefix = prefix_of(checkpoint)};
  std::vector<std::string> missing, unexpected;
  std::set<std::string> expected;
  for (const TensorSpec& spec : specs) {
    const std::string name = found.full_name(spec.name);
    expected.insert(name);
    if (!checkpoint.has(name)) {
      missing.push_back(name);
    } else if (checkpoint.shape(name) != spec.shape) {
      fail("{}: tensor {} has shape [{}], config.json asks for [{}]", checkpoint.where(name), name,
           fmt::join(checkpoint.shape(name), ", "), fmt::join(spec.shape, ", "));
    }
  }
  if (missing.size() == specs.size()) {
    fail("{}: holds none of the {} tensors of a {}, but others: {}", checkpoint.path().string(), specs.size(),
         config.architecture, some_of(checkpoint.names()));
  }
  if (!missing.empty()) {
    fail("{}: {} of {} tensors are missing: {}", checkpoint.path().string(), missing.size(), specs.size(),
         some_of(missing));
  }
  const bool qwen3_5 = config.zero_centred_norm;
  for (const std::string& name : checkpoint.names()) {
    if (expected.contains(name)) continue;
    if (qwen3_5 && name.starts_with("model.visual.")) {
      ++found.vision;
    } else if (qwen3_5 && name.starts_with("mtp.")) {
      ++found.multi_token;
    } else if (config.quantization.method == Quantization::Method::gptq && name.ends_with(".bias") &&
               checkpoint.tensor(name).count_nonzero().item<int64_t>() == 0) {
      // Some writers give every quantised layer a bias of zeros.
    } else if (!(name == kHead && config.tie_word_embeddings) && !name.ends_with(".rotary_emb.inv_freq")) {
      unexpected.push_back(name);
    }
  }
  if (!unexpected.empty()) {
    fail("{}: {} tensors are not part of a {} with this config.json: {}", checkpoint.path().string(),
         unexpected.size(), config.architecture, some_of(unexpected));
  }
  return found;
}

ModelWeights load_weights(const std::filesystem::path& folder, const ModelConfig& config, at::Device device,
                          std::optional<at::ScalarType> dtype, const Shards& shards) {
  const Checkpoint checkpoint(folder, config.quantization);
  const auto specs = tensor_specs(config);
  const CheckedTensors found = check_tensors(checkpoint, config);
  if (found.vision + found.multi_token > 0 && !is_silent()) {
    notice("{}: the text model is used; {} vision and {} multi-token-prediction tensors are skipped\n",
           checkpoint.path().string(), found.vision, found.multi_token);
  }
  if (config.sliding_window > 0 && !is_silent()) {
    notice(
        "{}: the model attends in a sliding window; it runs up to that window's {} tokens, where "
        "every token sees all before it\n",
        checkpoint.path().string(), config.sliding_window);
  }

  if (!dtype) {
    const at::ScalarType stored = config.torch_dtype.empty()
                                      ? checkpoint.dtype(found.full_name("embed_tokens.weight"))
                                      : parse_dtype(config.torch_dtype);
    dtype = device.is_cpu() ? at::kFloat : stored;
  }
  check_dtype(*dtype);

  double numbers = 0;
  for (const TensorSpec& spec : specs) numbers += static_cast<double>(c10::multiply_integers(spec.shape));
  Fingerprint fingerprint(config);
  Progress progress(fmt::format("Loading {}", folder.string()), static_cast<int64_t>(specs.size()));
  int64_t done = 0;
  const Read read = [&](const std::string& short_name, at::ScalarType target) {
    const std::string name = found.full_name(short_name);
    const at::Tensor stored = checkpoint.tensor(name);
    if (!at::isFloatingType(stored.scalar_type()) || stored.element_size() == 1) {
      fail("{}: tensor {} is of {}, floating point of 16 bits or more was expected", checkpoint.where(name),
           name, c10::toString(stored.scalar_type()));
    }
    fingerprint.add(short_name, stored);
    // A copy always: the mapped file may change or vanish while the model lives.
    const at::Tensor loaded = stored.to(device).to(target, /*non_blocking=*/false, /*copy=*/true);
    if (!all_finite(loaded)) {
      fail("{}: tensor {} holds values that are not finite in {}", checkpoint.where(name), name,
           c10::toString(target));
    }
    progress.update(++done);
    return loaded;
  };
  const auto codes = [&](const std::string& short_name) {
    const std::string name = found.full_name(short_name);
    const at::Tensor decoded = checkpoint.tensor(name);
    fingerprint.add(short_name, decoded);
    if (!all_finite(decoded))
      fail("{}: tensor {} holds values that are not finite", checkpoint.where(name), name);
    progress.update(++done);
    const auto copy = [&](const char* part, at::ScalarType type) {
      return checkpoint.part(name, part).to(device).to(type, /*non_blocking=*/false, /*copy=*/true);
    };
    return Fp8Blocks{copy("weight", at::kFloat8_e4m3fn), copy("weight_scale_inv", at::kFloat)};
  };
  const Source source{
      read, [&](const auto& name) { return checkpoint.has_fp8_blocks(found.full_name(name)); }, codes};
  ModelWeights weights;
  within_memory(
      {.what = fmt::format("{} in {}", folder.string(), c10::toString(*dtype)),
       .remedy = *dtype == at::kFloat ? "use --dtype bfloat16, or a smaller model" : "use a smaller model",
       .bytes = shards.count > 1 ? 0 : numbers * static_cast<double>(c10::elementSize(*dtype)),
       .on_host = device.is_cpu()},
      [&] { weights = Builder(config, device, *dtype, source, shards).build(); });
  weights.fingerprint = fingerprint.text();
  return weights;
}

ModelWeights random_weights(const ModelConfig& config, at::Device device, at::ScalarType dtype,
                            uint64_t seed) {
  check_dtype(dtype);
  std::map<std::string, TensorSpec> specs;
  for (const TensorSpec& spec : tensor_specs(config)) specs[spec.name] = spec;
  at::Generator generator = at::globalContext().defaultGenerator(device).clone();
  generator.set_current_seed(seed);
  Fingerprint fingerprint(config);
  const Read read = [&](const std::string& name, at::ScalarType target) {
    const TensorSpec& spec = specs.at(name);
    at::Tensor tensor = at::empty(spec.shape, at::TensorOptions().dtype(target).device(device));
    switch (spec.init) {
      case Init::normal:
        tensor.normal_(0, 0.02, generator);
        break;
      case Init::one:
        tensor.fill_(1);
        break;
      case Init::zero:
        tensor.zero_();
        break;
      case Init::log_uniform:
        tensor.uniform_(0.01, 16, generator).log_();
        break;
    }
    fingerprint.add(name, tensor);
    return tensor;
  };
  // What the checkpoint would hold as codes is drawn, then quantised.
  const bool fp8 = config.quantization.method == Quantization::Method::fp8;
  const Source source{read, [&](const auto&) { return fp8; },
                      [&](const auto& name) { return quantize_fp8(read(name, dtype)); }};
  ModelWeights weights = Builder(config, device, dtype, source).build();
  weights.fingerprint = fingerprint.text();
  return weights;
}

}  // namespace spot
