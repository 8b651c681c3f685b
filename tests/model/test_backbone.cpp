#include "checkpoint/safetensors.h"
#include "core/files.h"
#include "model/backbone.h"
#include "model/weights.h"
#include "tests/checkpoint/support.h"
#include "tests/model/configs.h"
#include "tests/model/dense_attention.h"

namespace spot {
namespace {

using testing::expect_error;
using testing::fresh_seed;
using testing::GatheredAttention;
using testing::small_qwen3;
using testing::small_qwen3_5;
using testing::TemporaryFolder;

using Tokens = std::vector<int32_t>;
using Named = std::vector<std::pair<std::string, at::Tensor>>;

Tokens random_tokens(const ModelConfig& config, int64_t count, std::mt19937_64& random) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(random() % config.vocab_size));
  return tokens;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return ((a - b).norm() / b.norm()).item<double>();
}

// One sequence or several through the model, keeping the cache between calls.
struct Session {
  explicit Session(const Backbone& model, int64_t pages = 60)
      : model(model), cache(model.config(), pages, model.dtype(), model.device(), 4), attention(cache) {}
  at::Tensor run(const std::vector<int64_t>& sequences, const std::vector<Tokens>& tokens) {
    return model.forward(make_batch(cache, sequences, tokens), attention, cache.states());
  }
  const Backbone& model;
  ModelCache cache;
  GatheredAttention attention;
};

// A checkpoint as tensor_specs describes it, with random values.
Named random_checkpoint(const ModelConfig& config, const std::string& prefix) {
  Named tensors;
  for (const TensorSpec& spec : tensor_specs(config)) {
    tensors.emplace_back(spec.name == "lm_head.weight" ? spec.name : prefix + spec.name,
                         at::randn(spec.shape) * 0.1);
  }
  return tensors;
}

nlohmann::json config_json(const char* architecture) {
  return {{"architectures", {architecture}}, {"hidden_size", 48},        {"num_hidden_layers", 2},
          {"num_attention_heads", 4},        {"num_key_value_heads", 2}, {"head_dim", 16},
          {"intermediate_size", 64},         {"vocab_size", 101},        {"max_position_embeddings", 400}};
}

class Backbones : public ::testing::TestWithParam<bool> {
 protected:
  ModelConfig config() const { return GetParam() ? small_qwen3_5() : small_qwen3(); }
};

TEST_P(Backbones, ChunksDecodeAndBatchesAgreeWithWholePrefill) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  const Backbone model = Backbone::random(config(), at::kCPU, at::kFloat, seed);
  const std::vector<Tokens> prompts = {random_tokens(config(), 150, random),
                                       random_tokens(config(), 1, random),
                                       random_tokens(config(), 71, random)};
  std::vector<at::Tensor> whole;
  for (const Tokens& tokens : prompts) {
    Session session(model);
    whole.push_back(session.run({session.cache.open_sequence()}, {tokens}));
    EXPECT_EQ(whole.back().sizes(),
              (std::vector<int64_t>{static_cast<int64_t>(tokens.size()), config().hidden_size}));
  }
  // All sequences in one cache, each a random share of tokens at a time, in changing company.
  Session session(model);
  std::vector<int64_t> ids;
  std::vector<std::vector<at::Tensor>> parts(prompts.size());
  std::vector<size_t> done(prompts.size(), 0);
  for (size_t i = 0; i < prompts.size(); ++i) ids.push_back(session.cache.open_sequence());
  for (;;) {
    std::vector<int64_t> sequences;
    std::vector<Tokens> tokens;
    std::vector<size_t> owner;
    const bool decode = random() % 2 == 0;
    for (size_t i = 0; i < prompts.size(); ++i) {
      const size_t left = prompts[i].size() - done[i];
      if (left == 0 || random() % 4 == 0) continue;
      const size_t count = decode ? 1 : 1 + random() % std::min<size_t>(left, 90);
      sequences.push_back(ids[i]);
      tokens.emplace_back(prompts[i].begin() + static_cast<long>(done[i]),
                          prompts[i].begin() + static_cast<long>(done[i] + count));
      owner.push_back(i);
      done[i] += count;
    }
    if (!sequences.empty()) {
      const at::Tensor out = session.run(sequences, tokens);
      int64_t first = 0;
      for (size_t i = 0; i < owner.size(); ++i) {
        parts[owner[i]].push_back(out.narrow(0, first, static_cast<int64_t>(tokens[i].size())));
        first += static_cast<int64_t>(tokens[i].size());
      }
    }
    bool all = true;
    for (size_t i = 0; i < prompts.size(); ++i) all &= done[i] == prompts[i].size();
    if (all) break;
  }
  for (size_t i = 0; i < prompts.size(); ++i) EXPECT_LT(difference(at::cat(parts[i]), whole[i]), 1e-4) << i;
}

TEST_P(Backbones, ForkedSequencesContinueAlike) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  const Backbone model = Backbone::random(config(), at::kCPU, at::kFloat, seed);
  Session session(model), elsewhere(model);
  const Tokens prompt = random_tokens(config(), 77, random);
  const int64_t original = session.cache.open_sequence();
  session.run({original}, {prompt});
  const int64_t copy = session.cache.fork_sequence(original);
  const Tokens a = random_tokens(config(), 9, random), b = random_tokens(config(), 9, random);
  session.run({copy}, {b});  // the copy goes its own way
  const at::Tensor forked = session.run({original}, {a});
  const int64_t alone = elsewhere.cache.open_sequence();
  elsewhere.run({alone}, {prompt});
  EXPECT_LT(difference(forked, elsewhere.run({alone}, {a})), 1e-5);
}

TEST_P(Backbones, LaterTokensDoNotChangeEarlierOnes) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  const Backbone model = Backbone::random(config(), at::kCPU, at::kFloat, seed);
  Tokens tokens = random_tokens(config(), 90, random);
  Session session(model);
  const at::Tensor before = session.run({session.cache.open_sequence()}, {tokens});
  tokens[70] = (tokens[70] + 1) % static_cast<int32_t>(config().vocab_size);
  const at::Tensor after = session.run({session.cache.open_sequence()}, {tokens});
  EXPECT_LT(difference(after.narrow(0, 0, 70), before.narrow(0, 0, 70)), 1e-5);
  EXPECT_GT(difference(after.narrow(0, 70, 20), before.narrow(0, 70, 20)), 1e-4);
}

TEST_P(Backbones, BackendSeesTheNormedInputAndContiguousHeads) {
  struct Recorder : AttentionBackend {
    explicit Recorder(PagedCache& cache) : dense(cache) {}
    at::Tensor forward(const AttentionInputs& inputs) override {
      layers.push_back(inputs.layer);
      hidden = inputs.hidden;
      EXPECT_TRUE(inputs.query.is_contiguous() && inputs.key.is_contiguous() && inputs.value.is_contiguous());
      EXPECT_EQ(inputs.key.sizes(), inputs.value.sizes());
      EXPECT_DOUBLE_EQ(inputs.scale, 0.25);
      return dense.forward(inputs);
    }
    GatheredAttention dense;
    std::vector<int64_t> layers;
    at::Tensor hidden;
  };
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  const Backbone model = Backbone::random(config(), at::kCPU, at::kFloat, seed);
  ModelCache cache(config(), 10, at::kFloat, at::kCPU);
  Recorder recorder(cache);
  model.forward(make_batch(cache, {cache.open_sequence()}, {random_tokens(config(), 33, random)}), recorder,
                cache.states());
  EXPECT_EQ(recorder.layers, config().full_attention_layers());
  // Norm weights of a random model are 1: each row's mean square is 1, short of eps.
  EXPECT_LT((recorder.hidden.square().mean(1) - 1).abs().max().item<double>(), 0.05);
}

TEST_P(Backbones, RefusesBatchesThatDoNotFit) {
  std::mt19937_64 random(fresh_seed());
  ModelCache cache(config(), 4, at::kFloat, at::kCPU, 2);
  const int64_t a = cache.open_sequence(), b = cache.open_sequence();
  const auto vocab = static_cast<int32_t>(config().vocab_size);
  expect_error([&] { make_batch(cache, {a, b}, {{1, 2}, {3, vocab}}); }, {fmt::format("token id {}", vocab)});
  expect_error([&] { make_batch(cache, {a}, {Tokens(501, 1)}); }, {"positions", "YaRN"});
  make_batch(cache, {b, a}, {{5, 6, 7}, {8}});
  const Batch next = make_batch(cache, {a, b}, {{9}, {10}});

  const Backbone model = Backbone::random(config(), at::kCPU, at::kFloat, random());
  GatheredAttention attention(cache);
  const auto refuses = [&](const Batch& bad, std::initializer_list<std::string> parts) {
    expect_error([&] { model.forward(bad, attention, cache.states()); }, parts);
  };
  Batch bad = next;
  bad.tokens = at::tensor({0, vocab}, at::kLong);
  refuses(bad, {"token ids run from 0"});
  bad = next;
  bad.starts[0] = 500;
  refuses(bad, {"positions"});
  bad = next;
  bad.positions = at::zeros({3}, at::kLong);
  refuses(bad, {"2 tokens"});
  bad = make_batch(cache, {b, a}, {{5, 6, 7}, {8}});
  bad.num_decodes = 1;
  refuses(bad, {"1 decode rows"});
  if (GetParam()) {
    bad = next;
    bad.state_slots = at::Tensor();
    refuses(bad, {"state slots"});
  }
}

INSTANTIATE_TEST_SUITE_P(, Backbones, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Qwen3_5" : "Qwen3"; });

TEST(Backbone, SeedDecidesRandomWeights) {
  const uint64_t seed = fresh_seed();
  const auto print = [&](uint64_t s) {
    return Backbone::random(small_qwen3(), at::kCPU, at::kFloat, s).fingerprint();
  };
  EXPECT_EQ(print(seed), print(seed));
  EXPECT_NE(print(seed), print(seed + 1));
}

TEST(Backbone, LoadingChecksNamesShapesAndValues) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  write_file_atomically(folder / "config.json", config_json("Qwen3ForCausalLM").dump());
  const ModelConfig config = ModelConfig::load(folder.path());
  const Named good = random_checkpoint(config, "model.");
  const auto load = [&](const Named& tensors, at::ScalarType dtype = at::kFloat) {
    write_safetensors(folder / "model.safetensors", tensors);
    return Backbone::load(folder.path(), at::kCPU, dtype);
  };
  const auto with = [&](const std::string& name, const at::Tensor& tensor) {
    Named changed = good;
    for (auto& [key, value] : changed) {
      if (key == name) value = tensor;
    }
    return changed;
  };
  const std::string up = "model.layers.1.mlp.up_proj.weight";
  EXPECT_EQ(load(good).fingerprint().size(), 16u);

  Named changed = good;
  std::erase_if(changed,
                [&](const auto& entry) { return entry.first == up || entry.first == "lm_head.weight"; });
  expect_error([&] { load(changed); }, {"2 of 25 tensors are missing", up, "lm_head.weight"});
  changed = good;
  changed.emplace_back("model.layers.2.mlp.up_proj.weight", at::zeros({64, 48}));
  expect_error([&] { load(changed); }, {"1 tensors are not part", "model.layers.2.mlp.up_proj.weight"});
  changed = good;
  changed.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", at::zeros({8}));
  EXPECT_NO_THROW(load(changed));
  expect_error([&] { load(with(up, at::zeros({48, 64}))); }, {up, "[48, 64]", "[64, 48]"});
  for (const double value : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
    at::Tensor broken = at::randn({64, 48});
    broken[63][47] = value;
    expect_error([&] { load(with(up, broken)); }, {"model.safetensors", up, "not finite"});
  }
  at::Tensor large = at::randn({64, 48});
  large[3][4] = 1e5;
  EXPECT_NO_THROW(load(with(up, large), at::kBFloat16));
  expect_error([&] { load(with(up, large), at::kHalf); }, {up, "not finite in Half"});
  expect_error([&] { load(with(up, at::zeros({64, 48}, at::kLong))); }, {up, "Long"});
  expect_error([&] { load(good, at::kDouble); }, {"Double"});
}

TEST(Backbone, FingerprintDependsOnWeightsNotOnDtypeOrPrefix) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  const ModelConfig config = small_qwen3_5();
  const Named tensors = random_checkpoint(config, "");
  const auto fingerprint = [&](const std::string& prefix, at::ScalarType stored, double change,
                               at::ScalarType kept) {
    Named named;
    for (const auto& [name, tensor] : tensors) {
      named.emplace_back(name == "lm_head.weight" ? name : prefix + name, tensor.to(stored));
    }
    named[3].second = named[3].second + change;
    write_safetensors(folder / "model.safetensors", named);
    return Backbone::load(folder.path(), config, at::kCPU, kept).fingerprint();
  };
  const std::string first = fingerprint("model.", at::kFloat, 0, at::kFloat);
  EXPECT_EQ(fingerprint("model.language_model.", at::kBFloat16, 0, at::kHalf), first);
  EXPECT_EQ(fingerprint("model.", at::kBFloat16, 0, at::kBFloat16), first);
  EXPECT_NE(fingerprint("model.", at::kFloat, 0.1, at::kFloat), first);
}

TEST(Backbone, VisionAndMultiTokenTensorsAreSkippedAndSaid) {
  TemporaryFolder folder;
  at::manual_seed(fresh_seed());
  Named tensors = random_checkpoint(small_qwen3_5(), "model.language_model.");
  tensors.emplace_back("model.visual.patch_embed.proj.weight", at::randn({4, 4}));
  tensors.emplace_back("mtp.fc.weight", at::randn({4, 4}));
  tensors.emplace_back("mtp.norm.weight", at::randn({4}));
  write_safetensors(folder / "model.safetensors", tensors);
  ::testing::internal::CaptureStderr();
  Backbone::load(folder.path(), small_qwen3_5(), at::kCPU);
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_NE(said.find("1 vision and 2 multi-token-prediction tensors are skipped"), std::string::npos)
      << said;
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1);
}

TEST(Backbone, LogitsAreFloatAndCheckTheirInput) {
  const Backbone model = Backbone::random(small_qwen3(), at::kCPU, at::kBFloat16, fresh_seed());
  EXPECT_EQ(model.logits(at::randn({3, 48}).to(at::kBFloat16)).scalar_type(), at::kFloat);
  expect_error([&] { model.logits(at::zeros({3, 47}, at::kBFloat16)); }, {"[rows, 48]"});
}

}  // namespace
}  // namespace spot
