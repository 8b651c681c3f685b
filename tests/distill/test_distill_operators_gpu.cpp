// The distillation operators on a GPU against their CPU form, on the same random inputs, and the loss at full
// length. Needs a CUDA build of torch and a GPU.
#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "distill/layer_loss.h"
#include "ops/distill/distill.h"

namespace spot {
namespace {

class DistillOperatorsGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const uint64_t seed = std::random_device{}();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    random_.seed(seed);
    at::manual_seed(seed);
  }
  int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }
  std::mt19937_64 random_;
};

double norm_error(const at::Tensor& got, const at::Tensor& want) {
  return (got.cpu().to(at::kDouble) - want.to(at::kDouble)).norm().item<double>() /
         std::max(want.to(at::kDouble).norm().item<double>(), 1e-3);
}

ops::QueryStrip on_gpu(const ops::QueryStrip& s) {
  return {s.tokens.cuda(), s.low.cuda(), s.last.cuda(), s.first_key, s.width};
}

TEST_F(DistillOperatorsGpu, MatchTheirCpuForm) {
  for (int trial = 0; trial < 40; ++trial) {
    const int64_t tokens = draw(1, 1500), rows = draw(1, tokens), first = draw(0, tokens - rows),
                  start = draw(0, first);
    const int64_t dim = std::vector<int64_t>{64, 128, 256}[static_cast<size_t>(trial % 3)];
    const int64_t kv_heads = draw(1, 4), group = draw(1, 8), key_heads = trial % 2 ? 4 : 1;
    const int64_t k_train = draw(0, 1) ? 32 + draw(0, tokens) : 0;
    // A residual teacher leaves out the document's first keys and each query's last ones.
    const int64_t sinks = trial % 4 < 2 ? 0 : draw(0, first - start),
                  recency = trial % 4 < 2 ? 0 : draw(0, first - start - sinks), low = start + sinks;
    SCOPED_TRACE(fmt::format(
        "trial {}: {} tokens, rows {} from {} on, document from {} without {} and {}, {} kv heads times {} of {}, "
        "{} selector keys, k_train {}",
        trial, tokens, rows, first, start, sinks, recency, kv_heads, group, dim, key_heads, k_train));
    const auto type = trial % 5 == 4 ? at::kHalf : at::kBFloat16;
    const at::Tensor rows_tokens = at::arange(first, first + rows, at::kInt);
    const ops::QueryStrip strip{rows_tokens, at::full_like(rows_tokens, low), rows_tokens - recency, low,
                                (first + rows - recency - low + 7) / 8 * 8};
    const at::Tensor query = at::randn({tokens, kv_heads * group, dim}).to(type),
                     key = at::randn({tokens, kv_heads, dim}).to(type);
    // Any normaliser will do for the comparison; the true ones are near this.
    const at::Tensor logsumexp = at::rand({kv_heads * group, tokens}) + 6.0;
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    const ops::TeacherMass::Result mass = ops::teacher_mass({query, key, logsumexp, strip, scale, 1});
    ASSERT_TRUE(ops::fuses_mass(query.cuda(), key.cuda()));
    const ops::TeacherMass::Result gpu_mass =
        ops::teacher_mass({query.cuda(), key.cuda(), logsumexp.cuda(), on_gpu(strip), scale, 1});
    EXPECT_LE(norm_error(gpu_mass.mass, mass.mass), 1e-5);
    EXPECT_LE(norm_error(gpu_mass.total, mass.total), 1e-5);
    const ops::TeacherMass::Result grouped =
        ops::teacher_mass({query.cuda(), key.cuda(), logsumexp.cuda(), on_gpu(strip), scale, kv_heads});
    EXPECT_LE(norm_error(grouped.mass.mean(1, true), mass.mass), 1e-5);
    EXPECT_LE(norm_error(grouped.total.mean(1, true), mass.total), 1e-5);

    const at::Tensor q = at::randn({tokens, 4, 128}).to(at::kBFloat16),
                     k = at::randn({tokens, key_heads, 128}).to(at::kBFloat16);
    const at::Tensor w = at::randn({tokens, 4}) * 0.05;
    const at::Tensor teacher = mass.mass.select(1, 0), total = mass.total.select(1, 0);
    at::Tensor grad_key = at::zeros({key_heads, tokens, 128}), gpu_grad_key = grad_key.cuda();
    ASSERT_TRUE(ops::fuses_kl(q.cuda(), k.cuda()));
    const ops::SelectorKl::Result want =
        ops::selector_kl({teacher.clone(), total, q, k, w, strip, k_train, grad_key});
    const ops::SelectorKl::Result got = ops::selector_kl(
        {teacher.cuda(), total.cuda(), q.cuda(), k.cuda(), w.cuda(), on_gpu(strip), k_train, gpu_grad_key});
    // A top-k set may differ in a key near its edge, here and there.
    const double edge = k_train > 0 ? 2e-2 : 0.0;
    EXPECT_LE(norm_error(got.loss, want.loss), 1e-4 + edge);
    EXPECT_LE(norm_error(got.entropy, want.entropy), 1e-4);
    EXPECT_LE(norm_error(got.grad_weight, want.grad_weight), 1e-3 + edge);
    EXPECT_LE(norm_error(got.grad_query, want.grad_query), 4e-3 + edge);
    EXPECT_LE(norm_error(gpu_grad_key, grad_key), 4e-3 + edge);
    const ops::SelectorKl::Result measured = ops::selector_kl(
        {teacher.cuda(), total.cuda(), q.cuda(), k.cuda(), w.cuda(), on_gpu(strip), k_train, {}});
    EXPECT_TRUE(at::equal(measured.loss, got.loss));
  }
}

// A training run stops on a loss that is not finite; nothing on the way may swallow it.
TEST_F(DistillOperatorsGpu, NanReachesTheLoss) {
  const at::Tensor tokens = at::arange(300, at::kInt).cuda();
  const ops::QueryStrip strip{tokens, at::zeros_like(tokens), tokens, 0, 304};
  const at::Tensor key = at::randn({300, 1, 128}).to(at::kBFloat16).cuda(),
                   weight = at::rand({300, 4}).cuda();
  at::Tensor query = at::randn({300, 4, 128}).to(at::kBFloat16).cuda();
  query[200][2][5] = NAN;
  for (const int64_t k_train : {0, 50}) {
    const at::Tensor mass = at::full({300, 304}, 1.0 / 300, tokens.options().dtype(at::kFloat));
    const at::Tensor loss =
        ops::selector_kl({mass, mass.sum(-1), query, key, weight, strip, k_train, {}}).loss.isnan();
    EXPECT_TRUE(loss[200].item<bool>());
    EXPECT_EQ(loss.sum().item<int64_t>(), 1);
  }
}

// Neither the operators nor the ATen path hold what is quadratic in the length: less than one [L, L] float32
// map.
TEST_F(DistillOperatorsGpu, SixteenThousandTokensInBoundedMemory) {
  const int64_t tokens = 16384;
  const auto random = [&](at::IntArrayRef shape) {
    return at::randn(shape, at::device(at::kCUDA).dtype(at::kBFloat16));
  };
  LayerLossInputs in;
  in.query = random({tokens, 8, 128});
  in.key = random({tokens, 2, 128});
  in.scale = 1 / std::sqrt(128.0);
  in.selector_query = random({tokens, 4, 128});
  in.selector_key = random({tokens, 4, 128});
  in.selector_weight = at::randn({tokens, 1, 4}, at::device(at::kCUDA)) * 0.05;
  in.logsumexp = std::get<1>(at::_scaled_dot_product_flash_attention(
      in.query.transpose(0, 1).unsqueeze(0), in.key.transpose(0, 1).unsqueeze(0),
      in.key.transpose(0, 1).unsqueeze(0), 0.0, true, false, in.scale))[0];
  for (const auto scope : {TeacherScope::all, TeacherScope::residual}) {
    LayerLossOptions o;
    o.scope = scope;
    o.k_train = 8192;
    o.tile_bytes = int64_t{128} << 20;
    double loss[2];
    for (const bool fused : {true, false}) {
      o.operators = fused ? LayerLossOptions::Operators::fused : LayerLossOptions::Operators::never;
      at::accelerator::synchronizeDevice(0);
      at::accelerator::resetPeakStats(0);
      const int64_t before = at::accelerator::getDeviceStats(0).allocated_bytes[0].current;
      loss[fused] = layer_loss(in, o).loss.item<double>();
      EXPECT_LT(at::accelerator::getDeviceStats(0).allocated_bytes[0].peak - before, tokens * tokens * 4)
          << (fused ? "fused" : "ATen");
    }
    EXPECT_NEAR(loss[0], loss[1], 1e-3 * loss[0]);
  }
}

}  // namespace
}  // namespace spot
