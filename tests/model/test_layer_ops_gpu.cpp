// The CUDA kernels of ops/layer_ops.h against their ATen form on the CPU. Needs a CUDA build of torch and a
// GPU.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "ops/e4m3.h"
#include "ops/layer/layer.h"
#include "tests/selector/support.h"

using namespace spot;
using ops::KeyFormat;
using ops::KeyNorm;
using namespace spot::test;

namespace {

const at::Device kGpu(at::kCUDA, 0);
constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16, at::kHalf};

// Equal but for float32 sums in another order, which may move a rounding by one unit in the last place.
void expect_close(const at::Tensor& got, const at::Tensor& expected, const std::string& what) {
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  ASSERT_EQ(got.scalar_type(), expected.scalar_type()) << what;
  if (expected.numel() == 0) return;
  const auto dtype = expected.scalar_type();
  const double unit = dtype == at::kBFloat16 ? 0x1p-7 : dtype == at::kHalf ? 0x1p-10 : 0;
  const at::Tensor a = got.cpu().to(at::kDouble), b = expected.to(at::kDouble);
  EXPECT_TRUE(at::isfinite(a).all().item<bool>()) << what;
  EXPECT_TRUE(((a - b).abs() <= 1.01 * unit * b.abs() + 4e-6 * (b.abs() + 0.5)).all().item<bool>()) << what;
  // Few roundings move.
  EXPECT_LT((a - b).norm().item<double>(), (0.1 * unit + 1e-6) * b.norm().item<double>() + 1e-5) << what;
}

at::Tensor random_rows(int64_t rows, int64_t width, at::ScalarType dtype, double scale = 2) {
  return (at::randn({rows, width + 2 * random_int(0, 4)}) * scale).to(dtype).narrow(1, 0, width);
}

// The same tensor, with its strides, on the GPU.
at::Tensor there(const at::Tensor& x) {
  if (!x.defined()) return x;
  at::Tensor copy = at::empty_strided(x.sizes(), x.strides(), x.options().device(kGpu));
  return copy.copy_(x);
}

}  // namespace

TEST(GpuLayerOps, RotateHeadsAndItsGradient) {
  fresh_seed();
  for (at::ScalarType dtype : kTypes)
    for (int64_t half : {4, 32, 64, 6}) {  // 6: by ATen
      const at::Tensor angles = at::randn({50, half}) * 3, cos = at::cos(angles), sin = at::sin(angles);
      const at::Tensor positions = at::randint(50, {37}, at::kLong);
      at::Tensor x = at::randn({37, 3, 128}).to(dtype), on_gpu = there(x);
      const at::Tensor grad = at::randn({37, 3, 128}).to(dtype);
      x.requires_grad_();
      on_gpu.requires_grad_();
      const at::Tensor want = ops::rotate_heads(x, positions, cos, sin),
                       got = ops::rotate_heads(on_gpu, there(positions), there(cos), there(sin));
      expect_close(got.detach(), want.detach(), "half " + std::to_string(half));
      want.backward(grad);
      got.backward(there(grad));
      expect_close(on_gpu.grad(), x.grad(), "gradient, half " + std::to_string(half));
    }
}

TEST(GpuLayerOps, RmsNorm) {
  fresh_seed();
  for (at::ScalarType dtype : kTypes)
    for (at::ScalarType factor_type : {dtype, at::kFloat})
      for (int64_t width : {1, 37, 64, 1000, 4096, 5120, 12288})
        for (int64_t rows : {0, 1, 5, 300}) {
          const at::Tensor x = random_rows(rows, width, dtype), factor = at::randn({width}).to(factor_type);
          const at::Tensor got = ops::rms_norm({there(x), there(factor), 1e-6});
          expect_close(got, ops::rms_norm({x, factor, 1e-6}), "width " + std::to_string(width));
          EXPECT_TRUE(at::equal(ops::rms_norm({there(x), there(factor), 1e-6}), got));
          if (rows > 1) {
            EXPECT_TRUE(at::equal(ops::rms_norm({there(x.narrow(0, 1, 1)), there(factor), 1e-6}),
                                  got.narrow(0, 1, 1)));
          }
        }
}

TEST(GpuLayerOps, GatedProduct) {
  fresh_seed();
  for (at::ScalarType dtype : kTypes)
    for (const char* activation : {"silu", "sigmoid"})
      for (int64_t width : {1, 7, 64, 128, 12288})
        for (int64_t rows : {0, 1, 9}) {
          const auto halves = random_rows(rows, 2 * width, dtype, 4).chunk(2, 1);
          const auto on_gpu = there(at::cat({halves[0], halves[1]}, 1)).chunk(2, 1);
          expect_close(ops::gated_product({on_gpu[0], on_gpu[1], activation}),
                       ops::gated_product({halves[0], halves[1], activation}), activation);
          // Head by head, the gate after its query.
          const at::Tensor heads = at::randn({rows, 3, 2 * width}).to(dtype),
                           x = at::randn({rows, 3, width}).to(dtype);
          expect_close(ops::gated_product({there(heads).narrow(2, width, width), there(x), activation}),
                       ops::gated_product({heads.narrow(2, width, width), x, activation}), activation);
        }
}

namespace {

struct Layout {
  int64_t num_heads, num_kv_heads, head_dim, rotary_dim;
};

ops::AttentionPrologue random_attention(const Layout& l, at::ScalarType dtype, int64_t tokens, bool gate,
                                        bool norm, bool stored) {
  constexpr int64_t kPositions = 500, kPages = 8;
  ops::AttentionPrologue a;
  a.num_heads = l.num_heads;
  a.num_kv_heads = l.num_kv_heads;
  a.head_dim = l.head_dim;
  a.output_gate = gate;
  a.projected = random_rows(tokens, ((gate ? 2 : 1) * l.num_heads + 2 * l.num_kv_heads) * l.head_dim, dtype);
  if (norm) a.qk_norm = at::randn({l.num_heads + l.num_kv_heads, l.head_dim});
  const at::Tensor angle = at::rand({kPositions, l.rotary_dim / 2}) * 6;
  a.cos = angle.cos() * 1.2;
  a.sin = angle.sin() * 1.2;
  a.positions = at::randint(0, kPositions, {tokens}, at::kLong);
  a.slots = at::randperm(kPages * 16, at::kLong).slice(0, 0, tokens);
  a.slots.masked_fill_(at::rand({tokens}) < 0.1, -1);
  if (stored) {
    // By heads as ours are, by pages with the heads inside as other engines keep them, or keys and values in turn.
    const int64_t kv_heads = l.num_kv_heads, dim = l.head_dim;
    const bool codes = random_int(0, 2) == 0;
    if (codes) dtype = at::kFloat8_e4m3fn;
    if (codes && random_int(0, 2)) {
      a.key_scale = at::exp2(at::randint(-9, 4, {kv_heads}).to(at::kFloat));
      a.value_scale = at::exp2(at::randint(-9, 4, {kv_heads}).to(at::kFloat));
    }
    if (random_int(0, 2) == 0) {
      a.key_pool = at::zeros({kv_heads, kPages, 16, dim}, dtype);
      a.value_pool = at::zeros_like(a.key_pool);
    } else if (random_int(0, 1)) {
      a.key_pool = at::zeros({kPages, 16, kv_heads, dim}, dtype).permute({2, 0, 1, 3});
      a.value_pool = at::zeros({kPages, 16, kv_heads, dim}, dtype).permute({2, 0, 1, 3});
    } else {
      const at::Tensor both = at::zeros({kPages, 2, 16, kv_heads, dim}, dtype);
      a.key_pool = both.select(1, 0).permute({2, 0, 1, 3});
      a.value_pool = both.select(1, 1).permute({2, 0, 1, 3});
    }
  }
  return a;
}

ops::AttentionPrologue there(const ops::AttentionPrologue& a) {
  ops::AttentionPrologue b = a;
  ops::SelectorPrologue& s = b.selector;
  ops::KeyPreparation& keys = s.preparation;
  for (at::Tensor* x : {&b.projected, &b.qk_norm, &b.cos, &b.sin, &b.positions, &b.key_pool, &b.value_pool,
                        &b.slots, &b.key_scale, &b.value_scale, &s.projected, &s.hidden, &s.mix, &s.pool,
                        &keys.norm_weight, &keys.norm_bias, &keys.cos, &keys.sin})
    *x = there(*x);
  return b;
}

}  // namespace

TEST(GpuLayerOps, PrologueOnEveryLayout) {
  fresh_seed();
  for (at::ScalarType dtype : kTypes)
    for (int64_t dim : {16, 64, 80, 128, 256})
      for (int64_t group : {1, 2, 4, 5, 8, 16})
        for (bool gate : {false, true}) {
          const int64_t kv_heads = random_int(1, 8),
                        tokens = random_int(0, 3) ? random_int(1, 4) : random_int(1, 120);
          const Layout layout{kv_heads * group, kv_heads, dim,
                              random_int(0, 1) ? dim : 2 * random_int(1, dim / 2)};
          const auto a =
              random_attention(layout, dtype, tokens, gate, random_int(0, 1), random_int(0, 2) > 0);
          const auto b = there(a);
          const auto expected = ops::attention_prologue(a), got = ops::attention_prologue(b);
          const std::string what = "dim " + std::to_string(dim) + " group " + std::to_string(group);
          expect_close(got.query, expected.query, what);
          expect_close(got.key, expected.key, what);
          EXPECT_TRUE(at::equal(got.value.cpu(), expected.value)) << what;
          if (a.key_pool.defined()) {
            const bool codes = a.key_pool.scalar_type() == at::kFloat8_e4m3fn;
            const auto bytes = [&](const at::Tensor& x) { return codes ? x.cpu().view(at::kByte) : x.cpu(); };
            EXPECT_TRUE(at::equal(bytes(b.value_pool), bytes(a.value_pool))) << what;
            if (codes) {  // the codes of the keys that this device made
              ops::AttentionPrologue stored = a;
              stored.key_pool = at::zeros_like(a.key_pool);
              const at::Tensor kept = a.slots.ge(0).nonzero().squeeze(1),
                               where = a.slots.index_select(0, kept);
              stored.key_pool.view(at::kByte)
                  .permute({1, 2, 0, 3})
                  .index_put_({at::div(where, 16, "floor"), where.remainder(16)},
                              ops::to_e4m3(got.key.cpu(), a.key_scale).view(at::kByte).index_select(0, kept));
              EXPECT_TRUE(at::equal(bytes(b.key_pool), bytes(stored.key_pool))) << what;
            } else {
              expect_close(b.key_pool, a.key_pool, what);
            }
          }
          // A token alone gives the same bits.
          auto alone = b;
          const int64_t t = random_int(0, tokens - 1);
          for (at::Tensor* x : {&alone.projected, &alone.positions, &alone.slots}) *x = x->narrow(0, t, 1);
          const auto one = ops::attention_prologue(alone);
          EXPECT_TRUE(at::equal(one.query[0], got.query[t]) && at::equal(one.key[0], got.key[t])) << what;
        }
}

TEST(GpuLayerOps, PrologueTakesTheSelectorAlong) {
  fresh_seed();
  const KeyNorm norms[] = {KeyNorm::none, KeyNorm::layernorm, KeyNorm::rmsnorm};
  for (at::ScalarType dtype : kTypes)
    for (const KeyFormat format :
         {KeyFormat::bf16, KeyFormat::int8, KeyFormat::int4, KeyFormat::mxfp4, KeyFormat::nvfp4})
      for (int64_t key_heads : {1, 4})
        for (auto norm : norms) {
          const int64_t tokens = random_int(1, 20), hidden_size = 2 * random_int(1, 2500),
                        groups = random_int(1, 8);
          auto a = random_attention({8, 2, 128, 128}, dtype, tokens, false, true, true);
          ops::SelectorPrologue& s = a.selector;
          s.projected = random_rows(tokens, (4 + key_heads) * 128, dtype);
          s.hidden = random_rows(tokens, hidden_size, dtype);
          s.mix = at::randn({groups * 4, hidden_size}) * 0.1;
          s.mix_scale = 0.044;
          s.preparation.norm = norm;
          if (norm != KeyNorm::none) s.preparation.norm_weight = at::rand({128}) + 0.5;
          if (norm == KeyNorm::layernorm) s.preparation.norm_bias = at::randn({128});
          if (random_int(0, 3)) {
            const at::Tensor angle = at::rand({500, 32}) * 6;
            s.preparation.cos = angle.cos();
            s.preparation.sin = angle.sin();
          }
          s.pool = at::zeros({8, key_heads, kernels::page_head_bytes(format)}, at::kByte);
          s.format = format;
          s.global_scale = 0.0625;
          const auto on_gpu = there(a);
          const auto expected = ops::attention_prologue(a), got = ops::attention_prologue(on_gpu);
          const std::string word = ops::word_of(format);
          expect_close(got.query, expected.query, word);
          expect_close(got.key, expected.key, word);
          expect_close(got.selector_query, expected.selector_query, word);
          EXPECT_LT((got.selector_weight.cpu() - expected.selector_weight).norm().item<double>(),
                    1e-5 * expected.selector_weight.norm().item<double>());
          EXPECT_TRUE(at::equal(on_gpu.selector.pool.cpu(), s.pool)) << word << " key heads " << key_heads;
        }
}
