// Whole decode steps on a GPU, captured and not, with everything fused, against the same backend left to do
// its own
// stores and projections. Needs a CUDA build of torch and a GPU.
#include <gtest/gtest.h>

#include "engine/attention_choice.h"
#include "engine/decode_step.h"
#include "engine/generator.h"
#include "tests/model/configs.h"
#include "tests/selector/support.h"

using namespace spot;

namespace {

const at::Device kGpu(at::kCUDA, 0);

// A backend that asks for nothing beforehand.
class Unprepared : public AttentionBackend {
 public:
  explicit Unprepared(AttentionBackend& inner) : inner_(inner) {}
  at::Tensor forward(const AttentionInputs& inputs) override { return inner_.forward(inputs); }

 private:
  AttentionBackend& inner_;
};

ModelConfig config_of(bool hybrid, int64_t head_dim) {
  ModelConfig config = hybrid ? spot::testing::small_qwen3_5() : spot::testing::small_qwen3();
  config.hidden_size = 256;
  config.intermediate_size = 384;
  config.head_dim = head_dim;
  config.num_heads = 8;
  config.num_kv_heads = 2;
  config.rope.rotary_dim = hybrid ? head_dim / 4 : head_dim;
  config.max_position_embeddings = 4096;
  if (hybrid) config.linear.key_head_dim = config.linear.value_head_dim = 128;
  return config;
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = b.cpu().to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

}  // namespace

class GpuDecodeStep : public ::testing::TestWithParam<std::tuple<bool, int64_t, AttentionKind>> {};

TEST_P(GpuDecodeStep, CapturedAndFusedEqualsUnprepared) {
  const uint64_t seed = test::fresh_seed();
  const auto [hybrid, head_dim, kind] = GetParam();
  const ModelConfig config = config_of(hybrid, head_dim);
  const Backbone backbone = Backbone::random(config, kGpu, at::kBFloat16, seed);
  Selector selector(SelectorConfig{}, config, kGpu, at::kBFloat16, seed);
  AttentionSpec spec;
  spec.kind = kind;
  spec.rule.mode = SelectionMode::top_k;
  spec.rule.budget = 1 << 20;  // everything is chosen: no near-equal blocks that swap places
  const int64_t room = 1200;
  const std::vector<std::vector<int32_t>> prompts = {std::vector<int32_t>(700, 3),
                                                     std::vector<int32_t>(33, 5)};
  std::vector<std::vector<at::Tensor>> logits;
  for (int way = 0; way < 4;
       ++way) {  // unprepared, prepared, captured, captured and with one projection for both
    if (way == 3) selector.join(backbone);
    AttentionRun run(spec, backbone, &selector, 2 * room, 2);
    Unprepared plain(run.backend());
    AttentionBackend& backend = way == 0 ? static_cast<AttentionBackend&>(plain) : run.backend();
    const std::vector<int64_t> ids = {run.cache().open_sequence(), run.cache().open_sequence()};
    backbone.forward(make_batch(run.cache(), ids, prompts), backend, run.cache().states());
    DecodeStep step(backbone, backend, run.cache(), ids, room);
    if (way >= 2) step.capture();
    std::vector<at::Tensor>& out = logits.emplace_back();
    for (int32_t i = 0; i < 40; ++i) out.push_back(step.run({7 + i, 90 - i}).clone());
  }
  for (size_t i = 0; i < logits[0].size(); ++i) {
    EXPECT_LT(difference(logits[1][i], logits[0][i]), 0.03) << "step " << i;
    EXPECT_LT(difference(logits[2][i], logits[1][i]), 1e-3) << "captured step " << i;
    EXPECT_LT(difference(logits[3][i], logits[1][i]), 0.03) << "joined step " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(, GpuDecodeStep,
                         ::testing::Combine(::testing::Bool(), ::testing::Values(64, 128, 256),
                                            ::testing::Values(AttentionKind::dense, AttentionKind::spot,
                                                              AttentionKind::quest,
                                                              AttentionKind::twilight)));
