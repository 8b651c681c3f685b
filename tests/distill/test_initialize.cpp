#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "../selector/support.h"
#include "attention/dense.h"
#include "core/files.h"
#include "distill/distill_attention.h"
#include "distill/initialize.h"
#include "distill/train_config.h"
#include "text/tokenizer.h"

namespace spot {
namespace {

using test::fresh_seed;
using test::random_int;
using test::small_model;

const bool kOneThread = (at::set_num_threads(1), true);  // test programs run side by side

std::vector<TokenSequence> random_sequences(const ModelConfig& model, int64_t count, int64_t length) {
  std::vector<TokenSequence> sequences(count);
  for (TokenSequence& sequence : sequences) {
    for (int64_t i = 0; i < length; ++i)
      sequence.tokens.push_back(static_cast<int32_t>(random_int(0, model.vocab_size - 1)));
    sequence.parts = sequence.documents = {0};
  }
  return sequences;
}

// The smallest cosine over tokens between a selector's rotated key or query and the backbone's, layer by
// layer.
class Comparison : public AttentionBackend {
 public:
  Comparison(const Selector& selector, std::vector<int64_t> selector_dims, std::vector<int64_t> backbone_dims)
      : selector_(selector), to_(at::tensor(selector_dims)), from_(at::tensor(backbone_dims)) {}
  at::Tensor forward(const AttentionInputs& in) override {
    const SelectorProjection p = selector_.project(in.layer, in.hidden, in.batch.positions);
    const int64_t group = in.query.size(1) / in.key.size(1);
    for (int64_t h = 0; h < 4; ++h) {
      const bool shared = p.key.size(1) == 1;
      const int64_t kv = shared ? 0 : 2 * h % in.key.size(1);
      note(p.key.select(1, shared ? 0 : h), in.key.select(1, kv));
      note(p.query.select(1, h), in.query.select(1, kv * group + h % group));
    }
    return causal_attention(in.query, in.key.transpose(0, 1), in.value.transpose(0, 1), 0, in.scale);
  }
  double least = 1;

 private:
  void note(const at::Tensor& ours, const at::Tensor& theirs) {
    const at::Tensor cosine =
        at::cosine_similarity(ours.index_select(1, to_), theirs.index_select(1, from_), 1, 1e-12);
    least = std::min(least, cosine.min().item<double>());
  }
  const Selector& selector_;
  at::Tensor to_, from_;
};

TEST(StartFromBackbone, RotatedDimsAreTheBackbonesOwnKeysAndQueries) {
  fresh_seed();
  struct Shape {
    int64_t heads, kv_heads, head_dim, rotary, key_heads;
    double yarn;
  };
  for (const Shape& s : {Shape{8, 2, 64, 64, 1, 1}, Shape{3, 1, 64, 64, 1, 1}, Shape{4, 2, 128, 128, 1, 1},
                         Shape{8, 8, 128, 128, 4, 1}, Shape{4, 2, 256, 64, 4, 1}, Shape{4, 2, 32, 32, 1, 1},
                         Shape{6, 3, 64, 64, 1, 4}}) {
    ModelConfig model = small_model(48, 2, s.heads, s.kv_heads, s.head_dim);
    model.architecture = "LlamaForCausalLM";
    model.model_type = "llama";
    model.qk_norm =
        false;  // then keys are linear in the hidden state, and the fit is exact but for the ridge
    model.rope.rotary_dim = s.rotary;
    if (s.yarn > 1) model.set_yarn(s.yarn);
    const Backbone backbone = Backbone::random(model, at::kCPU, at::kFloat, random_int(0, 1 << 30));
    SelectorConfig config;
    config.distillation.teacher_scope = TeacherScope::all;  // of sequences too short to leave anything out
    config.key_heads = s.key_heads;
    config.key_norm = KeyNorm::none;
    Selector selector(config, model, at::kCPU);
    initialize_from_backbone(backbone, selector, random_sequences(model, 3, 300), loss_options(config, {}));

    // Pairs (i, i + 32) of 64 rotated dims beside pairs (j, j + rotary / 2) of the same frequency.
    std::vector<int64_t> ours, theirs;
    for (int64_t i = 0; i < 32; ++i)
      for (int64_t j = 0; j < s.rotary / 2; ++j)
        if (i * s.rotary == j * 64) {
          ours.insert(ours.end(), {i, i + 32});
          theirs.insert(theirs.end(), {j, j + s.rotary / 2});
        }
    ASSERT_EQ(ours.size(), static_cast<size_t>(std::min<int64_t>(64, s.rotary)));
    Comparison comparison(selector, ours, theirs);
    const at::NoGradGuard no_grad;
    forward_sequence(backbone, comparison, random_sequences(model, 1, 200)[0].tokens, {0});
    // YaRN blends frequencies by a ramp over whole dims, which 64 dims and 128 round differently.
    EXPECT_GT(comparison.least, s.yarn > 1 ? 0.9 : 0.99) << s.head_dim << " " << s.rotary;
  }
}

TEST(StartFromBackbone, FindsRealAttentionBeforeTheFirstStep) {
  const Backbone backbone = Backbone::load("models/tiny-qwen3", at::kCPU);
  const std::vector<int32_t> tokens = Tokenizer::load("models/tiny-qwen3").encode(read_file("LICENSE"));
  ASSERT_GT(tokens.size(), 2600u);
  const auto sequence = [&](int64_t first, int64_t count) {
    return TokenSequence{{tokens.begin() + first, tokens.begin() + first + count}, {0}, {0}};
  };
  for (const char* preset : {"spot", "paper"}) {
    const SelectorConfig config = SelectorConfig::from_preset(preset);
    TrainConfig train;
    train.budgets = {0.1};
    const LayerLossOptions options = loss_options(config, train);
    double loss[2], covered[2];
    for (const bool fitted : {false, true}) {
      Selector selector(config, backbone.config(), at::kCPU);
      if (fitted) initialize_from_backbone(backbone, selector, {sequence(0, 1600)}, options);
      DistillAttention attention(selector, options);
      attention.begin(0.0, at::arange(400, 1000, 7));
      forward_sequence(backbone, attention, sequence(1600, 1000).tokens, {0});  // text that was not fitted
      const at::Tensor sums = attention.take_sums().mean(0);
      loss[fitted] = sums[0].item<double>();
      covered[fitted] = sums[2].item<double>();
    }
    std::printf("%s: loss %.3f -> %.3f, covered at 10%% %.3f -> %.3f\n", preset, loss[0], loss[1], covered[0],
                covered[1]);
    EXPECT_LT(loss[1], 0.6 * loss[0]);
    // Without sinks and recency the masses are small, and so is what can be won.
    EXPECT_GT(covered[1], (config.distillation.teacher_scope == TeacherScope::all ? 2 : 1.3) * covered[0]);
  }
}

TEST(StartFromBackbone, LayersWithoutASelectorAndGroupsAreServed) {
  fresh_seed();
  const ModelConfig model = small_model(32, 3, 4, 2, 16);
  const Backbone backbone = Backbone::random(model, at::kCPU, at::kFloat, 7);
  SelectorConfig config;
  config.distillation.teacher_scope = TeacherScope::all;
  config.scope = SelectorScope::kv_group;
  config.selection.dense_layers = {1};
  Selector first(config, model, at::kCPU), second(config, model, at::kCPU);
  const auto sequences = random_sequences(model, 2, 150);
  initialize_from_backbone(backbone, first, sequences, loss_options(config, {}));
  initialize_from_backbone(backbone, second, sequences, loss_options(config, {}));
  const Selector random(config, model, at::kCPU);
  const auto named = first.named_parameters();
  for (size_t i = 0; i < named.size(); ++i) {
    const auto& [name, weight] = named[i];
    EXPECT_TRUE(at::equal(weight, second.parameters()[i])) << name;
    EXPECT_TRUE(at::isfinite(weight).all().item<bool>()) << name;
    EXPECT_EQ(at::equal(weight, random.parameters()[i]), name.find("norm") != std::string::npos) << name;
  }
}

}  // namespace
}  // namespace spot
