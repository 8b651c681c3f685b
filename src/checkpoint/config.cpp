#include "checkpoint/config.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <set>

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace {

using nlohmann::json;

// Typed access to one JSON object; every error names the file and the field. A null counts as absent.
class Fields {
 public:
  Fields(const json& object, std::string source) : object_(object), source_(std::move(source)) {}

  bool has(const std::string& name) const { return object_.contains(name); }  // null or not

  const json* find(const std::string& name) const {
    const auto it = object_.find(name);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  std::optional<int64_t> integer(const std::string& name) const {
    const json* value = find(name);
    if (!value) return std::nullopt;
    if (!value->is_number_integer() || (value->is_number_unsigned() && value->get<uint64_t>() > INT64_MAX)) {
      fail("{}: {} is {}, an integer was expected", source_, name, value->dump());
    }
    return value->get<int64_t>();
  }

  // A count: required unless a default is given, and from 1 to 2^31 - 1.
  int64_t count(const std::string& name, std::optional<int64_t> otherwise = {}) const {
    const auto value = integer(name);
    if (!value && otherwise) return *otherwise;
    if (!value) fail("{}: field {} is missing", source_, name);
    if (*value < 1 || *value > INT32_MAX)
      fail("{}: {} is {}, a positive count was expected", source_, name, *value);
    return *value;
  }

  double number(const std::string& name, double otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_number() || !std::isfinite(value->get<double>())) {
      fail("{}: {} is {}, a number was expected", source_, name, value->dump());
    }
    return value->get<double>();
  }

  double positive(const std::string& name, double otherwise) const {
    const double value = number(name, otherwise);
    if (!(value > 0)) fail("{}: {} is {}, a number above 0 was expected", source_, name, value);
    return value;
  }

  bool flag(const std::string& name, bool otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_boolean()) fail("{}: {} is {}, true or false was expected", source_, name, value->dump());
    return value->get<bool>();
  }

  std::string text(const std::string& name, const std::string& otherwise) const {
    const json* value = find(name);
    if (!value) return otherwise;
    if (!value->is_string()) fail("{}: {} is {}, a string was expected", source_, name, value->dump());
    return value->get<std::string>();
  }

  // A sub-object; empty when absent.
  const json& object(const std::string& name) const {
    static const json empty = json::object();
    const json* value = find(name);
    if (!value) return empty;
    if (!value->is_object()) fail("{}: {} is {}, an object was expected", source_, name, value->dump());
    return *value;
  }

  const std::string& source() const { return source_; }

 private:
  const json& object_;
  std::string source_;
};

std::vector<int64_t> token_ids(const Fields& fields, const std::string& name) {
  const json* value = fields.find(name);
  if (!value) return {};
  std::vector<int64_t> ids;
  for (const json& id : value->is_array() ? *value : json::array({*value})) {
    if (!id.is_number_integer() || id < 0 || id > INT32_MAX) {
      fail("{}: {} is {}, a token id or a list of them was expected", fields.source(), name, value->dump());
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

RopeConfig read_rope(const Fields& fields, int64_t head_dim, int64_t max_position_embeddings,
                     double theta_default, double partial_default) {
  // Newer configs keep everything in rope_parameters, older ones theta beside an optional rope_scaling, which
  // transformers reads first where both are there.
  const bool older = !fields.object("rope_scaling").empty();
  const Fields scaling(fields.object(older ? "rope_scaling" : "rope_parameters"),
                       fields.source() + (older ? ": rope_scaling" : ": rope_parameters"));
  RopeConfig rope;
  rope.theta = scaling.positive("rope_theta", fields.positive("rope_theta", theta_default));
  if (rope.theta <= 1 || rope.theta >= 1e15) {
    fail("{}: rope_theta is {}, a number between 1 and 1e15 was expected", fields.source(), rope.theta);
  }
  const double partial =
      scaling.positive("partial_rotary_factor", fields.positive("partial_rotary_factor", partial_default));
  rope.rotary_dim = static_cast<int64_t>(static_cast<double>(head_dim) * partial);
  if (partial > 1 || rope.rotary_dim < 2 || rope.rotary_dim % 2 != 0) {
    fail(
        "{}: partial_rotary_factor {} of head_dim {} rotates {} dims; an even number up to head_dim was "
        "expected",
        fields.source(), partial, head_dim, rope.rotary_dim);
  }

  const std::string type = scaling.text("rope_type", scaling.text("type", "default"));
  if (type == "default" || type == "mrope") return rope;
  if (type == "linear") {
    if (!scaling.find("factor")) fail("{}: field factor is missing", scaling.source());
    rope.scaling = RopeScaling::linear;
    rope.factor = scaling.positive("factor", 1.0);
    return rope;
  }
  if (type == "dynamic") {
    rope.scaling = RopeScaling::dynamic;
    rope.factor = scaling.positive("factor", 1.0);
    return rope;
  }
  if (type == "yarn") {
    rope.scaling = RopeScaling::yarn;
  } else if (type == "llama3") {
    rope.scaling = RopeScaling::llama3;
  } else {
    fail("{}: rope type '{}' is not supported; default, linear, dynamic, yarn and llama3 are",
         scaling.source(), type);
  }
  rope.original_max_position_embeddings =
      fields.count("original_max_position_embeddings",
                   scaling.count("original_max_position_embeddings", max_position_embeddings));
  const double original = static_cast<double>(rope.original_max_position_embeddings);
  rope.factor = scaling.number("factor", static_cast<double>(max_position_embeddings) / original);
  if (rope.factor < 1) fail("{}: factor is {}, at least 1 was expected", scaling.source(), rope.factor);
  if (rope.scaling == RopeScaling::yarn) {
    rope.beta_fast = scaling.positive("beta_fast", 32.0);
    rope.beta_slow = scaling.positive("beta_slow", 1.0);
    rope.truncate = scaling.flag("truncate", true);
    rope.attention_factor = scaling.number("attention_factor", 0.0);
    const double mscale = scaling.number("mscale", 0.0),
                 mscale_all_dim = scaling.number("mscale_all_dim", 0.0);
    if (rope.attention_factor == 0.0 && mscale != 0.0 && mscale_all_dim != 0.0) {
      rope.attention_factor =
          (0.1 * mscale * std::log(rope.factor) + 1.0) / (0.1 * mscale_all_dim * std::log(rope.factor) + 1.0);
    }
    if (rope.attention_factor < 0) {
      fail("{}: attention_factor is {}, a number above 0 was expected", scaling.source(),
           rope.attention_factor);
    }
  } else {
    rope.low_freq_factor = scaling.positive("low_freq_factor", 1.0);
    rope.high_freq_factor = scaling.positive("high_freq_factor", 4.0);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fail("{}: high_freq_factor {} does not exceed low_freq_factor {}", scaling.source(),
           rope.high_freq_factor, rope.low_freq_factor);
    }
  }
  return rope;
}

// `sliding_window`: the model's, within which a sliding layer is a full one; 0: there is none.
std::vector<LayerKind> read_layer_kinds(const Fields& fields, int64_t num_layers, bool hybrid,
                                        int64_t sliding_window) {
  std::vector<LayerKind> kinds(num_layers, LayerKind::full_attention);
  if (const json* types = fields.find("layer_types")) {
    if (!types->is_array() || static_cast<int64_t>(types->size()) != num_layers) {
      fail("{}: layer_types must list {} layers", fields.source(), num_layers);
    }
    for (int64_t i = 0; i < num_layers; ++i) {
      const json& type = (*types)[i];
      if (hybrid && type == "linear_attention") {
        kinds[i] = LayerKind::linear_attention;
      } else if (type != "full_attention" && !(type == "sliding_attention" && sliding_window > 0)) {
        fail("{}: layer {} is of type {}, which is not supported{}", fields.source(), i, type.dump(),
             type == "sliding_attention" ? " without use_sliding_window and sliding_window" : "");
      }
    }
  } else if (hybrid) {
    const int64_t interval = fields.count("full_attention_interval", 4);
    for (int64_t i = 0; i < num_layers; ++i) {
      if ((i + 1) % interval != 0) kinds[i] = LayerKind::linear_attention;
    }
  }
  return kinds;
}

// SmolLM3: no_rope_layers has a 1 for each layer that rotates, else every no_rope_layer_interval-th does not.
std::vector<int64_t> read_nope_layers(const Fields& fields, int64_t num_layers) {
  const json* rotates = fields.find("no_rope_layers");
  if (rotates && (!rotates->is_array() || static_cast<int64_t>(rotates->size()) != num_layers)) {
    fail("{}: no_rope_layers must list {} layers", fields.source(), num_layers);
  }
  const int64_t interval = fields.count("no_rope_layer_interval", 4);
  std::vector<int64_t> layers;
  for (int64_t i = 0; i < num_layers; ++i) {
    const json entry = rotates ? (*rotates)[i] : json((i + 1) % interval == 0 ? 0 : 1);
    if (entry != 0 && entry != 1) {
      fail("{}: no_rope_layers has {} for layer {}, 1 (with RoPE) or 0 was expected", fields.source(),
           entry.dump(), i);
    }
    if (entry == 0) layers.push_back(i);
  }
  return layers;
}

// The window that some layer attends in, 0 where none does. Each architecture has rules of its own.
int64_t read_sliding_window(const Fields& fields, const std::string& architecture, int64_t num_layers) {
  constexpr int64_t kDefault = 4096;  // transformers', of Mistral, Qwen2 and Qwen3
  if (architecture == "MistralForCausalLM") {
    return fields.has("sliding_window") && !fields.find("sliding_window")
               ? 0
               : fields.count("sliding_window", kDefault);
  }
  if (architecture == "LlamaForCausalLM") {  // transformers ignores it; within it there is no difference
    return fields.find("sliding_window") ? fields.count("sliding_window") : 0;
  }
  if (!fields.flag("use_sliding_window", false)) return 0;
  if (architecture == "SmolLM3ForCausalLM") {
    return fields.find("sliding_window") ? fields.count("sliding_window") : 0;
  }
  if (architecture != "Qwen2ForCausalLM" && architecture != "Qwen3ForCausalLM") {
    fail("{}: sliding windows are not supported", fields.source());
  }
  if (fields.has("sliding_window") && !fields.find("sliding_window")) return 0;
  const bool every_layer_sees_all =
      !fields.find("layer_types") && fields.integer("max_window_layers").value_or(28) >= num_layers;
  return every_layer_sees_all ? 0 : fields.count("sliding_window", kDefault);
}

void refuse_unsupported(const Fields& fields) {
  for (const char* name : {"num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"}) {
    if (fields.find(name)) {
      fail("{}: mixture-of-experts models are not supported (field {})", fields.source(), name);
    }
  }
  const std::string activation = fields.text("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    fail("{}: hidden_act '{}' is not supported, silu is", fields.source(), activation);
  }
}

}  // namespace

std::vector<int64_t> ModelConfig::full_attention_layers() const {
  std::vector<int64_t> layers;
  for (int64_t i = 0; i < num_layers; ++i) {
    if (is_full_attention(i)) layers.push_back(i);
  }
  return layers;
}

bool ModelConfig::rotates(int64_t layer) const {
  return !std::binary_search(nope_layers.begin(), nope_layers.end(), layer);
}

void ModelConfig::set_yarn(double factor, int64_t original) {
  if (sliding_window > 0) {
    fail(
        "a model with a sliding window of {} tokens cannot be extended with YaRN; {} positions are its limit",
        sliding_window, max_position_embeddings);
  }
  if (rope.scaling == RopeScaling::linear)
    fail("a model with linear RoPE scaling cannot be extended with YaRN");
  if (!(factor >= 1) || !std::isfinite(factor)) fail("YaRN factor is {}, at least 1 was expected", factor);
  if (original < 0) fail("YaRN original length is {}, a positive count was expected", original);
  if (original == 0) {
    const bool plain = rope.scaling == RopeScaling::none || rope.scaling == RopeScaling::dynamic;
    original = plain ? max_position_embeddings : rope.original_max_position_embeddings;
  }
  const double positions = std::round(factor * static_cast<double>(original));
  if (positions > INT32_MAX) fail("YaRN factor {} over {} positions is too long", factor, original);
  rope.scaling = factor == 1 ? RopeScaling::none : RopeScaling::yarn;
  rope.factor = factor;
  rope.original_max_position_embeddings = original;
  rope.attention_factor = 0;
  max_position_embeddings = std::max(max_position_embeddings, static_cast<int64_t>(positions));
}

ModelConfig ModelConfig::from_json(const json& published, const std::string& source) {
  if (!published.is_object()) fail("{}: a JSON object was expected", source);
  const Fields top(published, source);

  ModelConfig config;
  const json* architectures = top.find("architectures");
  if (!architectures || !architectures->is_array() || architectures->size() != 1 ||
      !architectures->at(0).is_string()) {
    fail("{}: architectures must name one architecture", source);
  }
  config.architecture = architectures->at(0).get<std::string>();
  config.model_type = top.text("model_type", "");
  const bool llama = config.architecture == "LlamaForCausalLM";
  const bool mistral = config.architecture == "MistralForCausalLM";
  const bool qwen2 = config.architecture == "Qwen2ForCausalLM";
  const bool qwen3 = config.architecture == "Qwen3ForCausalLM";
  const bool smollm3 = config.architecture == "SmolLM3ForCausalLM";
  const bool vision_language = config.architecture == "Qwen3_5ForConditionalGeneration";
  const bool qwen3_5 = vision_language || config.architecture == "Qwen3_5ForCausalLM";
  if (config.architecture.find("Moe") != std::string::npos) {
    fail("{}: architecture {} is a mixture of experts, which is not supported", source, config.architecture);
  }
  if (const json* form = top.find("quantization_config")) {
    config.quantization = Quantization::from_json(*form, source);
  }
  if (!llama && !mistral && !qwen2 && !qwen3 && !smollm3 && !qwen3_5) {
    fail(
        "{}: architecture {} is not supported; LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
        "Qwen3ForCausalLM, SmolLM3ForCausalLM, Qwen3_5ForCausalLM and Qwen3_5ForConditionalGeneration are",
        source, config.architecture);
  }
  if (vision_language && !top.find("text_config")) fail("{}: field text_config is missing", source);
  const Fields fields(vision_language ? top.object("text_config") : published,
                      vision_language ? source + ": text_config" : source);
  refuse_unsupported(fields);

  config.hidden_size = fields.count("hidden_size");
  config.num_layers = fields.count("num_hidden_layers");
  config.num_heads = fields.count("num_attention_heads");
  config.num_kv_heads =
      llama ? fields.count("num_key_value_heads", config.num_heads) : fields.count("num_key_value_heads");
  config.intermediate_size = fields.count("intermediate_size");
  config.vocab_size = fields.count("vocab_size");
  config.max_position_embeddings = fields.count("max_position_embeddings");
  if (config.num_layers > 4096) fail("{}: num_hidden_layers is {}", fields.source(), config.num_layers);
  if (config.num_heads % config.num_kv_heads != 0) {
    fail("{}: num_attention_heads {} is no multiple of num_key_value_heads {}", fields.source(),
         config.num_heads, config.num_kv_heads);
  }
  // transformers' defaults where the field is absent.
  config.head_dim = fields.count("head_dim", qwen3     ? 128
                                             : qwen3_5 ? 256
                                                       : config.hidden_size / config.num_heads);
  if (!fields.find("head_dim") && !qwen3 && !qwen3_5 && config.hidden_size % config.num_heads != 0) {
    fail("{}: hidden_size {} is no multiple of num_attention_heads {} and head_dim is missing",
         fields.source(), config.hidden_size, config.num_heads);
  }
  config.rms_norm_eps = fields.positive("rms_norm_eps", 1e-6);
  if (config.rms_norm_eps >= 1) {
    fail("{}: rms_norm_eps is {}, a number below 1 was expected", fields.source(), config.rms_norm_eps);
  }
  config.tie_word_embeddings = top.flag("tie_word_embeddings", fields.flag("tie_word_embeddings", smollm3));
  config.attention_output_bias = !mistral && !qwen2 && fields.flag("attention_bias", false);
  config.qkv_bias = qwen2 || config.attention_output_bias;
  config.mlp_bias = (llama || smollm3) && fields.flag("mlp_bias", false);
  config.qk_norm = qwen3 || qwen3_5;
  config.zero_centred_norm = qwen3_5;
  config.attention_output_gate = qwen3_5;
  if (qwen3_5 && !fields.flag("attn_output_gate", true)) {
    fail("{}: attn_output_gate false is not supported", fields.source());
  }
  config.rope = read_rope(fields, config.head_dim, config.max_position_embeddings, smollm3 ? 2e6 : 1e4,
                          qwen3_5 ? 0.25 : 1.0);
  if (config.rope.scaling == RopeScaling::yarn) {
    config.max_position_embeddings = std::max(
        config.max_position_embeddings,
        static_cast<int64_t>(std::llround(
            config.rope.factor * static_cast<double>(config.rope.original_max_position_embeddings))));
  }
  config.sliding_window = read_sliding_window(fields, config.architecture, config.num_layers);
  config.layer_kinds = read_layer_kinds(fields, config.num_layers, qwen3_5, config.sliding_window);
  if (config.sliding_window >= config.max_position_embeddings) config.sliding_window = 0;
  if (config.sliding_window > 0) config.max_position_embeddings = config.sliding_window;
  if (smollm3) config.nope_layers = read_nope_layers(fields, config.num_layers);
  if (config.full_attention_layers().empty()) fail("{}: no layer is a full-attention layer", fields.source());
  if (qwen3_5) {
    config.linear.num_key_heads = fields.count("linear_num_key_heads");
    config.linear.num_value_heads = fields.count("linear_num_value_heads");
    config.linear.key_head_dim = fields.count("linear_key_head_dim");
    config.linear.value_head_dim = fields.count("linear_value_head_dim");
    config.linear.conv_kernel = fields.count("linear_conv_kernel_dim");
    if (config.linear.num_value_heads % config.linear.num_key_heads != 0) {
      fail("{}: linear_num_value_heads {} is no multiple of linear_num_key_heads {}", fields.source(),
           config.linear.num_value_heads, config.linear.num_key_heads);
    }
  }
  config.torch_dtype =
      fields.text("dtype", fields.text("torch_dtype", top.text("dtype", top.text("torch_dtype", ""))));
  static const std::set<std::string> dtypes = {"", "float32", "float16", "bfloat16"};
  if (!dtypes.contains(config.torch_dtype)) fail("{}: dtype {} is not supported", source, config.torch_dtype);
  config.eos_token_ids = token_ids(top, "eos_token_id");
  if (config.eos_token_ids.empty()) config.eos_token_ids = token_ids(fields, "eos_token_id");
  return config;
}

ModelConfig ModelConfig::load(const std::filesystem::path& folder) {
  const auto path = folder / "config.json";
  ModelConfig config = from_json(read_json(path), path.string());
  const auto generation = folder / "generation_config.json";
  if (has_file(generation)) {
    const json defaults = read_json(generation);
    if (!defaults.is_object()) fail("{}: a JSON object was expected", generation.string());
    auto ids = token_ids(Fields(defaults, generation.string()), "eos_token_id");
    if (!ids.empty()) config.eos_token_ids = std::move(ids);
  }
  return config;
}

}  // namespace spot
