// The backbone on a GPU: equal to the CPU, and capturable in a CUDA graph. Needs a CUDA build of torch and a

#include <ATen/core/grad_mode.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "checkpoint/safetensors.h"
#include "model/backbone.h"
#include "model/weights.h"
#include "tests/checkpoint/support.h"
#include "tests/model/configs.h"
#include "tests/model/dense_attention.h"

namespace spot {
namespace {

using testing::fresh_seed;
using testing::GatheredAttention;
using testing::TemporaryFolder;
using Tokens = std::vector<int32_t>;

double difference(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.cpu().to(at::kDouble), y = b.cpu().to(at::kDouble);
  return ((x - y).norm() / y.norm()).item<double>();
}

Tokens random_tokens(const ModelConfig& config, int64_t count, std::mt19937_64& random) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(random() % config.vocab_size));
  return tokens;
}

// Dense attention of a decode batch in fixed shapes: reads the batch's tensors alone, which are refilled
// between replays.
class FixedShapeAttention : public AttentionBackend {
 public:
  explicit FixedShapeAttention(PagedCache& cache) : pools_(cache.pools()) {}

  at::Tensor forward(const AttentionInputs& inputs) override {
    const Batch& batch = inputs.batch;
    const at::Tensor keys = pools_.get("keys", inputs.layer), values = pools_.get("values", inputs.layer);
    keys.flatten(1, 2).index_copy_(1, batch.slots, inputs.key.transpose(0, 1));
    values.flatten(1, 2).index_copy_(1, batch.slots, inputs.value.transpose(0, 1));
    const int64_t sequences = batch.page_table.size(0), longest = batch.page_table.size(1) * batch.page_size;
    const auto history = [&](const at::Tensor& pool) {  // [sequences, num_kv_heads, longest, head_dim]
      return pool.index_select(1, batch.page_table.flatten())
          .flatten(1, 2)
          .unflatten(1, {sequences, longest})
          .transpose(0, 1);
    };
    const at::Tensor visible =
        at::arange(longest, batch.lengths.options()).unsqueeze(0) < batch.lengths.unsqueeze(1);
    return at::scaled_dot_product_attention(inputs.query.unsqueeze(2), history(keys), history(values),
                                            visible.unsqueeze(1).unsqueeze(1), 0.0, false, inputs.scale, true)
        .squeeze(2);
  }

 private:
  PagePools& pools_;
};

class GpuBackbones : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override { ASSERT_TRUE(at::hasCUDA()) << "this test needs a GPU"; }
  ModelConfig config() const { return GetParam() ? testing::small_qwen3_5() : testing::small_qwen3(); }
  const at::Device gpu{at::kCUDA, 0};
};

TEST_P(GpuBackbones, LogitsEqualTheCpus) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  at::manual_seed(seed);
  TemporaryFolder folder;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const TensorSpec& spec : tensor_specs(config())) {
    tensors.emplace_back(spec.name == "lm_head.weight" ? spec.name : "model." + spec.name,
                         at::randn(spec.shape) * 0.2);
  }
  write_safetensors(folder / "model.safetensors", tensors);
  const std::vector<Tokens> prompts = {random_tokens(config(), 131, random),
                                       random_tokens(config(), 3, random)};
  const Tokens next = random_tokens(config(), 2, random);
  const auto run = [&](at::Device device, at::ScalarType dtype) {
    const Backbone model = Backbone::load(folder.path(), config(), device, dtype);
    ModelCache cache(config(), 40, dtype, device, 2);
    GatheredAttention attention(cache);
    const std::vector<int64_t> ids = {cache.open_sequence(), cache.open_sequence()};
    std::vector<at::Tensor> logits;
    logits.push_back(model.logits(model.forward(make_batch(cache, ids, prompts), attention, cache.states())));
    for (int step = 0; step < 3; ++step) {
      const Batch batch = make_batch(cache, ids, {{next[0]}, {next[1]}});
      logits.push_back(model.logits(model.forward(batch, attention, cache.states())));
    }
    EXPECT_EQ(logits[0].scalar_type(), at::kFloat);
    return at::cat(logits).cpu();
  };
  const at::Tensor expected = run(at::kCPU, at::kFloat);
  EXPECT_LT(difference(run(gpu, at::kFloat), expected), 1e-4);
  const double cpu_rounding = difference(run(at::kCPU, at::kBFloat16), expected);
  EXPECT_LT(difference(run(gpu, at::kBFloat16), expected), 1.5 * cpu_rounding + 0.005);
}

TEST_P(GpuBackbones, DecodeStepReplaysAsAGraph) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  const at::NoGradGuard no_grad;
  const Backbone model = Backbone::random(config(), gpu, at::kBFloat16, seed);
  ModelCache cache(config(), 60, at::kBFloat16, gpu, 3);
  GatheredAttention eager(cache);
  FixedShapeAttention fixed(cache);
  const std::vector<int64_t> ids = {cache.open_sequence(), cache.open_sequence(), cache.open_sequence()};
  model.forward(make_batch(cache, ids,
                           {random_tokens(config(), 70, random), random_tokens(config(), 5, random),
                            random_tokens(config(), 17, random)}),
                eager, cache.states());
  const auto one_each = [&] {
    std::vector<Tokens> tokens;
    for (int i = 0; i < 3; ++i) tokens.push_back(random_tokens(config(), 1, random));
    return tokens;
  };
  const auto marks = [&] {
    std::vector<PagedCache::Mark> marks;
    for (const int64_t id : ids) marks.push_back(cache.mark(id));
    return marks;
  };
  const auto rollback = [&](const std::vector<PagedCache::Mark>& to) {
    for (size_t i = 0; i < ids.size(); ++i) cache.rollback(ids[i], to[i]);
  };

  // Capture on a side stream, after a warm-up; what they change is undone.
  const auto before = marks();
  const BatchShape shape{.rows = 3, .table_width = 16};
  const auto entries = [&](const std::vector<Tokens>& tokens) {
    std::vector<BatchEntry> list;
    for (size_t i = 0; i < ids.size(); ++i) list.push_back({.sequence = ids[i], .tokens = tokens[i]});
    return list;
  };
  Batch held = build_batch(cache, entries(one_each()), shape);
  c10::cuda::getCurrentCUDAStream().synchronize();  // the side stream waits for nothing of this one
  at::cuda::CUDAGraph graph;
  at::Tensor logits;
  {
    const c10::cuda::CUDAStreamGuard stream(c10::cuda::getStreamFromPool());
    model.logits(model.forward(held, fixed, cache.states()));
    c10::cuda::getCurrentCUDAStream().synchronize();
    graph.capture_begin();
    logits = model.logits(model.forward(held, fixed, cache.states()));
    graph.capture_end();
    c10::cuda::getCurrentCUDAStream().synchronize();
  }
  rollback(before);

  for (int step = 0; step < 20; ++step) {
    const auto tokens = one_each();
    const auto here = marks();
    const at::Tensor expected =
        model.logits(model.forward(make_batch(cache, ids, tokens), eager, cache.states()));
    rollback(here);
    rebuild_batch(cache, entries(tokens), shape, held);
    graph.replay();
    EXPECT_LT(difference(logits, expected), 0.02) << "step " << step;
  }
}

// FP8 codes stay codes on a GPU; there the prompt's products read them decoded, a decode step's as they are.
TEST(GpuFp8, LogitsEqualThoseOfTheDecodedMatrices) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 random(seed);
  at::manual_seed(seed);
  ModelConfig config = testing::small_qwen3();
  config.head_dim = config.rope.rotary_dim = 64;
  config.intermediate_size = 128;
  config.quantization.method = Quantization::Method::fp8;
  TemporaryFolder folder;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const TensorSpec& spec : tensor_specs(config)) {
    const at::Tensor tensor = at::randn(spec.shape) * 0.2;
    const std::string name = spec.name == "lm_head.weight" ? spec.name : "model." + spec.name;
    if (!spec.name.ends_with("_proj.weight")) {
      tensors.emplace_back(name, tensor);
      continue;
    }
    const Fp8Blocks blocks = quantize_fp8(tensor);
    tensors.emplace_back(name, blocks.codes);
    tensors.emplace_back(name + "_scale_inv", blocks.scales);
  }
  write_safetensors(folder / "model.safetensors", tensors);
  const at::Device gpu{at::kCUDA, 0};
  const std::vector<Tokens> prompts = {random_tokens(config, 131, random), random_tokens(config, 3, random)};
  const auto run = [&](at::Device device, at::ScalarType dtype) {
    const Backbone model = Backbone::load(folder.path(), config, device, dtype);
    EXPECT_EQ(model.projection(0).weight.scalar_type(), device.is_cuda() ? at::kFloat8_e4m3fn : dtype);
    ModelCache cache(config, 40, dtype, device, 2);
    GatheredAttention attention(cache);
    const std::vector<int64_t> ids = {cache.open_sequence(), cache.open_sequence()};
    std::vector<at::Tensor> logits;
    for (const std::vector<Tokens>& tokens : {prompts, {{5}, {7}}, {{11}, {3}}})
      logits.push_back(
          model.logits(model.forward(make_batch(cache, ids, tokens), attention, cache.states())));
    return at::cat(logits).cpu();
  };
  const at::Tensor expected = run(at::kCPU, at::kFloat);
  const double cpu_rounding = difference(run(at::kCPU, at::kBFloat16), expected);
  EXPECT_LT(difference(run(gpu, at::kBFloat16), expected), 1.5 * cpu_rounding + 0.005);
}

INSTANTIATE_TEST_SUITE_P(, GpuBackbones, ::testing::Bool(),
                         [](const auto& info) { return info.param ? "Qwen3_5" : "Qwen3"; });

}  // namespace
}  // namespace spot
