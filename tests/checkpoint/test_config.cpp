#include "checkpoint/config.h"
#include "core/files.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

using nlohmann::json;
using testing::expect_error;
using testing::TemporaryFolder;

// As published on the model hub, shortened to the fields that matter.
const json kQwen3_8B = json::parse(R"({
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643, "eos_token_id": 151645,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
  "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3", "num_attention_heads": 32,
  "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
  "use_sliding_window": false, "vocab_size": 151936})");

const json kLlama32_1B = json::parse(R"({
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "eos_token_id": [128001, 128008, 128009],
  "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
  "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                   "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256})");

// Qwen3.5: {layers, hidden, heads, kv heads, intermediate, linear value heads, tied}.
json qwen3_5(int layers, int hidden, int heads, int kv_heads, int intermediate, int value_heads, bool tied) {
  json text = {{"attention_bias", false},
               {"attn_output_gate", true},
               {"dtype", "bfloat16"},
               {"eos_token_id", 248044},
               {"full_attention_interval", 4},
               {"head_dim", 256},
               {"hidden_act", "silu"},
               {"hidden_size", hidden},
               {"intermediate_size", intermediate},
               {"linear_conv_kernel_dim", 4},
               {"linear_key_head_dim", 128},
               {"linear_num_key_heads", 16},
               {"linear_num_value_heads", value_heads},
               {"linear_value_head_dim", 128},
               {"max_position_embeddings", 262144},
               {"mamba_ssm_dtype", "float32"},
               {"model_type", "qwen3_5_text"},
               {"mtp_num_hidden_layers", 1},
               {"num_attention_heads", heads},
               {"num_hidden_layers", layers},
               {"num_key_value_heads", kv_heads},
               {"rms_norm_eps", 1e-6},
               {"rope_parameters",
                {{"mrope_interleaved", true},
                 {"mrope_section", {11, 11, 10}},
                 {"partial_rotary_factor", 0.25},
                 {"rope_theta", 10000000},
                 {"rope_type", "default"}}},
               {"vocab_size", 248320}};
  return {{"architectures", {"Qwen3_5ForConditionalGeneration"}},
          {"model_type", "qwen3_5"},
          {"text_config", text},
          {"tie_word_embeddings", tied},
          {"vision_config", {{"model_type", "qwen3_5"}}}};
}

TEST(Config, ReadsQwen3) {
  const ModelConfig config = ModelConfig::from_json(kQwen3_8B, "config.json");
  EXPECT_EQ(config.architecture, "Qwen3ForCausalLM");
  EXPECT_EQ(config.model_type, "qwen3");
  EXPECT_EQ(config.hidden_size, 4096);
  EXPECT_EQ(config.num_layers, 36);
  EXPECT_EQ(config.num_heads, 32);
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.intermediate_size, 12288);
  EXPECT_EQ(config.vocab_size, 151936);
  EXPECT_EQ(config.max_position_embeddings, 40960);
  EXPECT_DOUBLE_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_TRUE(config.qk_norm);
  EXPECT_FALSE(config.zero_centred_norm);
  EXPECT_FALSE(config.attention_output_gate);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_EQ(config.rope.rotary_dim, 128);
  EXPECT_DOUBLE_EQ(config.rope.theta, 1e6);
  EXPECT_EQ(config.rope.scaling, RopeScaling::none);
  EXPECT_EQ(config.full_attention_layers().size(), 36u);
  EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{151645});
  EXPECT_EQ(config.torch_dtype, "bfloat16");
}

TEST(Config, ReadsLlama3) {
  const ModelConfig config = ModelConfig::from_json(kLlama32_1B, "config.json");
  EXPECT_FALSE(config.qk_norm);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.rope.scaling, RopeScaling::llama3);
  EXPECT_DOUBLE_EQ(config.rope.factor, 32);
  EXPECT_EQ(config.rope.original_max_position_embeddings, 8192);
  EXPECT_EQ(config.max_position_embeddings, 131072);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int64_t>{128001, 128008, 128009}));
}

TEST(Config, LlamaDefaultsFollowTransformers) {
  json j = kLlama32_1B;
  for (const char* name : {"head_dim", "num_key_value_heads", "rope_scaling", "rope_theta",
                           "tie_word_embeddings", "rms_norm_eps"})
    j.erase(name);
  const ModelConfig config = ModelConfig::from_json(j, "config.json");
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.num_kv_heads, 32);
  EXPECT_DOUBLE_EQ(config.rope.theta, 10000);
  EXPECT_DOUBLE_EQ(config.rms_norm_eps, 1e-6);
  EXPECT_FALSE(config.tie_word_embeddings);
}

TEST(Config, NumbersThatNoModelHasAreNamed) {
  for (const auto& [name, value] : {std::pair{"rms_norm_eps", 1.0},
                                    {"rms_norm_eps", 1.8e19},
                                    {"rms_norm_eps", 0.0},
                                    {"rope_theta", 1.0},
                                    {"rope_theta", 1.8e19},
                                    {"rope_theta", -1e4}}) {
    json j = kLlama32_1B;
    j[name] = value;
    expect_error([&] { ModelConfig::from_json(j, "config.json"); }, {"config.json", name});
  }
}

TEST(Config, ReadsEveryQwen3_5) {
  struct Size {
    int layers, hidden, heads, kv_heads, intermediate, value_heads;
    bool tied;
  };
  for (const Size& s : {Size{24, 1024, 8, 2, 3584, 16, true}, Size{24, 2048, 8, 2, 6144, 16, true},
                        Size{32, 2560, 16, 4, 9216, 32, true}, Size{32, 4096, 16, 4, 12288, 32, false},
                        Size{64, 5120, 24, 4, 17408, 48, false}}) {
    const ModelConfig config = ModelConfig::from_json(
        qwen3_5(s.layers, s.hidden, s.heads, s.kv_heads, s.intermediate, s.value_heads, s.tied),
        "config.json");
    EXPECT_EQ(config.hidden_size, s.hidden);
    EXPECT_EQ(config.tie_word_embeddings, s.tied);
    EXPECT_TRUE(config.zero_centred_norm);
    EXPECT_TRUE(config.attention_output_gate);
    EXPECT_EQ(config.rope.rotary_dim, 64);
    EXPECT_DOUBLE_EQ(config.rope.theta, 1e7);
    EXPECT_EQ(config.linear.num_value_heads, s.value_heads);
    EXPECT_EQ(config.linear.conv_kernel, 4);
    EXPECT_EQ(config.torch_dtype, "bfloat16");
    EXPECT_EQ(config.eos_token_ids, std::vector<int64_t>{248044});
    const auto full = config.full_attention_layers();
    ASSERT_EQ(static_cast<int>(full.size()), s.layers / 4);
    for (size_t i = 0; i < full.size(); ++i) EXPECT_EQ(full[i], static_cast<int64_t>(4 * i + 3));
  }
}

TEST(Config, YarnRaisesTheLastPosition) {
  json j = kQwen3_8B;
  j["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  const ModelConfig published = ModelConfig::from_json(j, "config.json");
  EXPECT_EQ(published.rope.scaling, RopeScaling::yarn);
  EXPECT_EQ(published.max_position_embeddings, 131072);
  ModelConfig set = ModelConfig::from_json(kQwen3_8B, "config.json");
  set.set_yarn(4.0, 32768);
  EXPECT_EQ(set.max_position_embeddings, 131072);
  EXPECT_EQ(set.rope.scaling, RopeScaling::yarn);
  EXPECT_DOUBLE_EQ(set.rope.factor, 4.0);
  expect_error([&] { set.set_yarn(0.5); }, {"factor"});
  // transformers 5 writes rope_parameters with theta inside.
  j.erase("rope_theta");
  j["rope_parameters"] = j["rope_scaling"];
  j["rope_parameters"]["rope_theta"] = 5e6;
  j.erase("rope_scaling");
  EXPECT_DOUBLE_EQ(ModelConfig::from_json(j, "config.json").rope.theta, 5e6);
}

// As published by Mistral AI, Qwen and Hugging Face, shortened.
const json kMistral7B = json::parse(R"({
  "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "model_type": "mistral",
  "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null, "vocab_size": 32768})");
const json kQwen25_05B = json::parse(R"({
  "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "model_type": "qwen2",
  "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24,
  "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
  "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})");
const json kSmolLM3 = json::parse(R"({
  "architectures": ["SmolLM3ForCausalLM"], "hidden_size": 2048, "intermediate_size": 11008, "model_type": "smollm3",
  "max_position_embeddings": 65536, "mlp_bias": false, "attention_bias": false, "num_attention_heads": 16,
  "num_hidden_layers": 9, "num_key_value_heads": 4, "no_rope_layer_interval": 4, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 5000000.0, "sliding_window": null, "use_sliding_window": false,
  "vocab_size": 128256})");

json with(json base, const json& change) {
  base.update(change);
  return base;
}

TEST(Config, ReadsMistralQwen2AndSmolLM3) {
  const ModelConfig mistral = ModelConfig::from_json(kMistral7B, "config.json");
  EXPECT_EQ(mistral.head_dim, 128);
  EXPECT_EQ(mistral.sliding_window, 0);
  EXPECT_FALSE(mistral.qkv_bias || mistral.attention_output_bias || mistral.tie_word_embeddings);
  const ModelConfig qwen2 = ModelConfig::from_json(kQwen25_05B, "config.json");
  EXPECT_EQ(qwen2.head_dim, 64);
  EXPECT_EQ(qwen2.max_position_embeddings, 32768);
  EXPECT_TRUE(qwen2.qkv_bias && !qwen2.attention_output_bias && !qwen2.qk_norm);
  const ModelConfig smollm3 = ModelConfig::from_json(kSmolLM3, "config.json");
  EXPECT_EQ(smollm3.nope_layers, (std::vector<int64_t>{3, 7}));
  EXPECT_TRUE(smollm3.rotates(2) && !smollm3.rotates(3) && smollm3.rotates(8));
  EXPECT_TRUE(smollm3.tie_word_embeddings);
  json bare = kSmolLM3;
  bare.erase("rope_theta");
  EXPECT_DOUBLE_EQ(ModelConfig::from_json(bare, "config.json").rope.theta, 2e6);
}

TEST(Config, AWindowShorterThanTheContextIsTheLimit) {
  // {config, positions, window}; Mistral 7B v0.1 is the first.
  struct Case {
    json config;
    int64_t positions, window;
  };
  json absent = kMistral7B;
  absent.erase("sliding_window");
  for (const Case& c :
       {Case{with(kMistral7B, {{"sliding_window", 4096}}), 4096, 4096}, Case{absent, 4096, 4096},
        Case{with(kMistral7B, {{"sliding_window", 32768}}), 32768, 0},
        Case{with(kQwen25_05B, {{"sliding_window", 100}}), 32768, 0},
        Case{with(kQwen25_05B, {{"use_sliding_window", true}, {"sliding_window", 100}}), 100, 100},
        Case{with(kQwen25_05B,
                  {{"use_sliding_window", true}, {"sliding_window", 100}, {"max_window_layers", 24}}),
             32768, 0},
        Case{with(kSmolLM3, {{"use_sliding_window", true}, {"sliding_window", 777}}), 777, 777},
        Case{with(kLlama32_1B, {{"sliding_window", 512}}), 512, 512}}) {
    ModelConfig config = ModelConfig::from_json(c.config, "config.json");
    EXPECT_EQ(config.max_position_embeddings, c.positions) << c.config;
    EXPECT_EQ(config.sliding_window, c.window) << c.config;
    if (c.window > 0) expect_error([&] { config.set_yarn(4); }, {"sliding window", "YaRN"});
  }
}

TEST(Config, LinearAndDynamicRope) {
  json j = kLlama32_1B;
  for (const char* key : {"type", "rope_type"}) {
    j["rope_scaling"] = {{key, "linear"}, {"factor", 4.0}};
    ModelConfig linear = ModelConfig::from_json(j, "config.json");
    EXPECT_EQ(linear.rope.scaling, RopeScaling::linear);
    EXPECT_DOUBLE_EQ(linear.rope.factor, 4.0);
    EXPECT_EQ(linear.max_position_embeddings, 131072);
    expect_error([&] { linear.set_yarn(2); }, {"linear", "YaRN"});
    j["rope_scaling"] = {{key, "dynamic"}, {"factor", 2.0}};
    ModelConfig dynamic = ModelConfig::from_json(j, "config.json");
    EXPECT_EQ(dynamic.rope.scaling, RopeScaling::dynamic);
    dynamic.set_yarn(2);
    EXPECT_EQ(dynamic.max_position_embeddings, 262144);
  }
}

TEST(Config, GenerationConfigNamesTheEndTokens) {
  TemporaryFolder folder;
  write_file_atomically(folder / "config.json", kQwen3_8B.dump());
  EXPECT_EQ(ModelConfig::load(folder.path()).eos_token_ids, std::vector<int64_t>{151645});
  write_file_atomically(folder / "generation_config.json", R"({"eos_token_id": [151645, 151643]})");
  EXPECT_EQ(ModelConfig::load(folder.path()).eos_token_ids, (std::vector<int64_t>{151645, 151643}));
}

TEST(Config, NumbersBeyondFloat64AreErrorsWhereverTheyStand) {
  TemporaryFolder folder;
  const nlohmann::json whole = read_json("models/tiny-qwen3.5/config.json").flatten();
  int places = 0;
  for (const auto& [path, value] : whole.items()) {
    if (!value.is_number()) continue;
    nlohmann::json changed = whole;
    changed[path] = "HERE";
    std::string text = changed.unflatten().dump();
    text.replace(text.find("\"HERE\""), 6, places++ % 2 ? "1e777" : "-1e777");
    write_file_atomically(folder / "config.json", text);
    expect_error([&] { ModelConfig::load(folder.path()); }, {"config.json", "float64"});
  }
  EXPECT_GT(places, 15);
  write_file_atomically(folder / "config.json", read_file("models/tiny-qwen3.5/config.json"));
  write_file_atomically(folder / "generation_config.json", R"({"eos_token_id": 1e777})");
  expect_error([&] { ModelConfig::load(folder.path()); }, {"generation_config.json", "float64"});
}

TEST(Config, RefusesWhatItCannotRun) {
  const auto refuse = [](const json& base, const json& change, std::initializer_list<std::string> parts) {
    json j = base;
    j.merge_patch(change);
    // merge_patch drops nulls; a null field counts as absent anyway.
    expect_error([&] { ModelConfig::from_json(j, "model/config.json"); }, parts);
  };
  refuse(kQwen3_8B, {{"architectures", {"GPT2LMHeadModel"}}}, {"model/config.json", "GPT2LMHeadModel"});
  refuse(kQwen3_8B, {{"architectures", {"Qwen3MoeForCausalLM"}}}, {"mixture of experts"});
  refuse(kQwen3_8B, {{"architectures", {"Qwen3_5MoeForConditionalGeneration"}}}, {"mixture of experts"});
  refuse(kQwen3_8B, {{"architectures", nullptr}}, {"architectures"});
  refuse(kQwen3_8B, {{"num_experts", 128}}, {"num_experts"});
  refuse(kQwen3_8B, {{"hidden_act", "gelu"}}, {"gelu"});
  refuse(kQwen3_8B, {{"quantization_config", {{"quant_method", "exl2"}}}}, {"quantised", "exl2"});
  refuse(kQwen3_8B, {{"quantization_config", {{"quant_method", "fp8"}}}}, {"weight_block_size"});
  refuse(kQwen3_8B, {{"hidden_size", nullptr}}, {"hidden_size is missing"});
  refuse(kQwen3_8B, {{"hidden_size", 0}}, {"hidden_size is 0"});
  refuse(kQwen3_8B, {{"hidden_size", -4}}, {"hidden_size is -4"});
  refuse(kQwen3_8B, {{"hidden_size", "x"}}, {"hidden_size is \"x\""});
  refuse(kQwen3_8B, {{"hidden_size", 1e3}}, {"hidden_size"});
  refuse(kQwen3_8B, {{"num_key_value_heads", 5}}, {"no multiple"});
  refuse(kQwen3_8B, {{"num_key_value_heads", nullptr}}, {"num_key_value_heads is missing"});
  refuse(kQwen3_8B, {{"head_dim", 127}}, {"127"});
  refuse(kQwen3_8B, {{"rope_scaling", {{"rope_type", "longrope"}, {"factor", 2}}}}, {"longrope"});
  refuse(kQwen3_8B, {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 0.5}}}}, {"factor is 0.5"});
  refuse(kQwen3_8B, {{"rope_scaling", "yarn"}}, {"rope_scaling"});
  refuse(kQwen3_8B, {{"rope_scaling", {{"type", "linear"}}}}, {"rope_scaling", "factor is missing"});
  refuse(kQwen3_8B, {{"rope_scaling", {{"type", "linear"}, {"factor", 0}}}}, {"factor is 0"});
  refuse(kSmolLM3, {{"no_rope_layers", {1, 0}}}, {"no_rope_layers", "9 layers"});
  refuse(kSmolLM3, {{"no_rope_layers", {1, 1, 1, 2, 1, 1, 1, 0, 1}}}, {"no_rope_layers", "layer 3"});
  refuse(kMistral7B, {{"sliding_window", 0}}, {"sliding_window is 0"});
  refuse(kQwen25_05B, {{"hidden_size", 897}}, {"897", "head_dim"});
  refuse(kQwen3_8B, {{"rope_theta", "x"}}, {"rope_theta"});
  refuse(kQwen3_8B, {{"layer_types", {"full_attention"}}}, {"layer_types"});
  refuse(kQwen3_8B, {{"layer_types", json(36, "sliding_attention")}}, {"sliding"});
  refuse(kQwen3_8B, {{"layer_types", json(36, "linear_attention")}}, {"linear_attention"});
  refuse(kQwen3_8B, {{"torch_dtype", "float8_e4m3fn"}}, {"float8"});
  refuse(kQwen3_8B, {{"eos_token_id", "end"}}, {"eos_token_id"});
  refuse(qwen3_5(24, 1024, 8, 2, 3584, 16, true), {{"text_config", {{"attn_output_gate", false}}}},
         {"attn_output_gate"});
  refuse(qwen3_5(24, 1024, 8, 2, 3584, 16, true), {{"text_config", {{"num_experts", 8}}}}, {"num_experts"});
  refuse(qwen3_5(24, 1024, 8, 2, 3584, 17, true), json::object(), {"linear_num_value_heads"});
  refuse(qwen3_5(3, 1024, 8, 2, 3584, 16, true), json::object(), {"full-attention"});
  expect_error([] { ModelConfig::from_json(json::array(), "c"); }, {"object"});
}

}  // namespace
}  // namespace spot
