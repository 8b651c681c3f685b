#include <ATen/Context.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <random>

#include "selector/wide_linear.h"

namespace spot {
namespace {

double largest(const at::Tensor& x) {
  return x.abs().max().item<double>();
}

// Against float64, with numbers of very different sizes in the float32 operands.
void compare(at::Device device, int64_t tokens, int64_t columns, int64_t rows) {
  const at::Tensor x = at::randn({tokens, columns}).to(at::kBFloat16).to(device);
  const auto spread = [&](at::IntArrayRef sizes) {
    return (at::randn(sizes) * at::pow(10.0, at::randn(sizes))).to(at::kFloat).to(device);
  };
  at::Tensor hidden = x.clone().requires_grad_(true), weight = spread({rows, columns}).requires_grad_(true);
  const at::Tensor grad = spread({tokens, rows});
  const at::Tensor result = wide_linear(hidden, weight);
  ASSERT_EQ(result.scalar_type(), at::kFloat);
  torch::autograd::backward({result}, {grad});

  const at::Tensor x64 = x.to(at::kDouble), w64 = weight.detach().to(at::kDouble), g64 = grad.to(at::kDouble);
  // Each relative to the sum of its products' sizes: three pieces leave 2^-24 of each, a sum of n in float32
  // about sqrt(n) times that; two pieces would leave 2^-17 of each.
  const auto expect = [](const at::Tensor& got, const at::Tensor& a, const at::Tensor& b, double bound) {
    EXPECT_LE(largest((got.to(at::kDouble) - at::mm(a, b)) / at::mm(a.abs(), b.abs())), bound);
  };
  const auto as_float32 = [](int64_t terms) {
    return std::ldexp(1.0 + std::sqrt(static_cast<double>(terms)), -23);
  };
  expect(result.detach(), x64, w64.t(), as_float32(columns));
  expect(weight.grad(), g64.t(), x64, as_float32(tokens));
  ASSERT_EQ(hidden.grad().scalar_type(), at::kBFloat16);
  expect(hidden.grad(), g64, w64, 0.004);
}

TEST(WideLinear, IsAsExactAsFloat32) {
  at::manual_seed(std::random_device()());
  compare(at::kCPU, 33, 40, 4);
  compare(at::kCPU, 1, 8, 1);
  compare(at::kCPU, 300, 512, 32);
}

TEST(WideLinear, OnAGpuToo) {
  if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device";
  at::manual_seed(std::random_device()());
  compare(at::kCUDA, 33, 40, 4);
  compare(at::kCUDA, 4096, 4096, 4);
  compare(at::kCUDA, 512, 1024, 32);
}

}  // namespace
}  // namespace spot
