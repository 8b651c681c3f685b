// What holds of layer_loss whatever the loss is: parts add up to the whole, what should not matter does not,
// edges stay finite, memory is linear, and what does not fit is refused.
#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>

#include "distill/layer_loss.h"
#include "tests/distill/layer_loss_reference.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

TEST(LayerLoss, CoverageOfSomeQueriesIsThatOfThem) {
  LayerLossInputs in = draw({.tokens = 60}, fresh_seed());
  LayerLossOptions o;
  o.budgets = {0.25, 8};
  o.block_size = 4;
  o.measured_queries = 40;  // two runs of 16
  const LayerLoss some = layer_loss(in, o);
  o.measured_queries = 0;
  EXPECT_EQ(some.loss.item<double>(), layer_loss(in, o).loss.item<double>());
  in.query_rows = at::cat({at::arange(14, 30, at::kLong), at::arange(44, 60, at::kLong)});
  const LayerLoss them = layer_loss(in, o);
  expect_near(some.covered, them.covered, 1e-12, "covered");
  expect_near(some.covered_oracle, them.covered_oracle, 1e-12, "covered_oracle");
  o.measured_queries = 1000;  // more than there are: all
  expect_near(layer_loss(in, o).covered, them.covered, 1e-12, "covered");
}

TEST(LayerLoss, QueryRowsAverageToTheWhole) {
  LayerLossInputs in = draw({.tokens = 40}, fresh_seed());
  LayerLossOptions o;
  o.k_train = 16;
  const LayerLoss whole = layer_loss(in, o);
  double loss = 0.0;
  at::Tensor grad = at::zeros_like(whole.grad_key);
  for (int64_t offset = 0; offset < 4; ++offset) {
    in.query_rows = at::arange(offset, 40, 4, at::kLong);
    const LayerLoss part = layer_loss(in, o);
    EXPECT_EQ(part.queries, 10);
    loss += part.loss.item<double>() / 4;
    grad += part.grad_key / 4;
  }
  EXPECT_NEAR(loss, whole.loss.item<double>(), 1e-12);
  expect_near(grad, whole.grad_key, 1e-12, "grad_key");
}

TEST(LayerLoss, PackedDocumentsAreIndependent) {
  LayerLossInputs in = draw({.tokens = 50}, fresh_seed());
  in.document_starts = {0, 21};
  LayerLossOptions o;
  o.k_train = 16;
  const at::Tensor before = layer_loss(in, o).grad_query.narrow(0, 0, 21).clone();
  for (at::Tensor* t : {&in.query, &in.key, &in.selector_key, &in.selector_query})
    t->narrow(0, 21, 29).normal_();
  EXPECT_TRUE(at::equal(before, layer_loss(in, o).grad_query.narrow(0, 0, 21)));
}

TEST(LayerLoss, GradientsWeightedAndRoundedOnce) {
  const uint64_t seed = fresh_seed();
  for (const auto operators : {LayerLossOptions::Operators::never, LayerLossOptions::Operators::always})
    for (const int64_t key_heads : {1, 4}) {
      LayerLossOptions o;
      o.loss = DistillLoss::dense;
      o.operators = operators;
      o.tile_rows = 16;
      LayerLossInputs in =
          draw({.tokens = 47, .head_dim = 32, .key_heads = key_heads, .dim = 64}, seed, at::kBFloat16);
      in.selector_weight = in.selector_weight.to(at::kFloat);
      add_logsumexp(in);
      if (key_heads == 4) in.query_rows = at::arange(3, 47, 2, at::kLong);  // strips with gaps
      const LayerLoss plain = layer_loss(in, o);
      o.gradient_weight = 0.3;
      o.gradients_rounded = true;
      const LayerLoss got = layer_loss(in, o);
      EXPECT_EQ(got.loss.item<double>(), plain.loss.item<double>());
      EXPECT_EQ(plain.grad_query.scalar_type(), at::kFloat);
      ASSERT_EQ(got.grad_query.scalar_type(), at::kBFloat16);
      ASSERT_EQ(got.grad_key.scalar_type(), at::kBFloat16);
      ASSERT_EQ(got.grad_weight.scalar_type(), at::kFloat);
      const auto compare = [](const at::Tensor& rounded, const at::Tensor& whole, double bound) {
        EXPECT_GT(whole.abs().max().item<double>(), 0.0);
        EXPECT_TRUE(at::allclose(rounded.to(at::kDouble), whole.to(at::kDouble) * 0.3, bound, 1e-30));
      };
      compare(got.grad_query, plain.grad_query, 0x1p-8 * 1.001);
      compare(got.grad_key, plain.grad_key, 0x1p-8 * 1.001);
      compare(got.grad_weight, plain.grad_weight, 1e-6);
    }
}

TEST(LayerLoss, NothingToCount) {
  LayerLossInputs in = draw({.tokens = 30}, fresh_seed());
  add_logsumexp(in);
  for (const auto operators : {LayerLossOptions::Operators::never, LayerLossOptions::Operators::always}) {
    LayerLossOptions o;
    o.operators = operators;
    o.scope = TeacherScope::residual;  // 128 sinks and 256 recent tokens leave nothing of 30
    o.budgets = {0.5};
    o.measured_queries = 128;
    const LayerLoss got = layer_loss(in, o);
    EXPECT_EQ(got.queries, 0);
    EXPECT_EQ(got.loss.item<double>(), 0.0);
    EXPECT_EQ(got.grad_key.abs().max().item<double>(), 0.0);
    EXPECT_EQ(got.covered[0].item<double>(), 0.0);
  }
}

TEST(LayerLoss, VanishingTeacherMassIsFinite) {
  LayerLossInputs in = draw({.tokens = 80, .head_dim = 8}, fresh_seed(), at::kFloat);
  in.scale = 1.0;
  in.key.mul_(0.01);
  in.key.narrow(0, 0, 1).fill_(400.0);  // one sink takes everything
  in.query.abs_();
  add_logsumexp(in);
  for (const auto loss : {DistillLoss::dense, DistillLoss::sparse})
    for (const auto operators : {LayerLossOptions::Operators::never, LayerLossOptions::Operators::always}) {
      LayerLossOptions o;
      o.operators = operators;
      o.loss = loss;
      o.k_train = 16;
      o.block_size = 16;
      o.scope = TeacherScope::residual;
      o.sinks = 16;
      o.recency = 16;
      o.budgets = {0.5};
      o.measured_queries = 128;
      const LayerLoss got = layer_loss(in, o);
      EXPECT_GT(got.queries, 0);
      for (const at::Tensor& t :
           {got.loss, got.grad_query, got.grad_key, got.grad_weight, got.covered, got.teacher_entropy})
        EXPECT_TRUE(at::isfinite(t).all().item<bool>());
      // All logits but the sink's are some hundreds below it.
      EXPECT_EQ(got.loss.item<double>(), 0.0);
      EXPECT_EQ(got.grad_key.abs().max().item<double>(), 0.0);
    }
}

TEST(LayerLoss, NanInputsGiveANanLoss) {
  LayerLossInputs in = draw({.tokens = 33}, fresh_seed(), at::kFloat);
  in.selector_query[20][0][0] = std::nan("");
  EXPECT_TRUE(std::isnan(layer_loss(in, {}).loss.item<double>()));
}

// Counts the bytes that tensors hold on this thread's CPU allocator.
class MemoryMeter : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) override {
    const int64_t now = current_ += size;
    int64_t peak = peak_;
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
    largest_ = std::max<int64_t>(largest_, size);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t peak() const { return peak_; }
  int64_t largest() const { return largest_; }

 private:
  std::atomic<int64_t> current_ = 0, peak_ = 0, largest_ = 0;
};

TEST(LayerLoss, MemoryIsLinearInTheLength) {
  const uint64_t seed = fresh_seed();
  LayerLossOptions o;
  o.k_train = 700;
  o.tile_rows = 32;
  o.budgets = {0.1};
  const auto peak_of = [&](int64_t tokens) {
    LayerLossInputs in = draw({.tokens = tokens, .head_dim = 8, .dim = 8}, seed, at::kFloat);
    in.query_rows = at::arange(tokens - 64, tokens, at::kLong);  // the longest rows
    const auto meter = std::make_shared<MemoryMeter>();
    {
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, meter);
      layer_loss(in, o);
    }
    EXPECT_LT(meter->largest(), tokens * tokens * 4 / 16);
    return meter->peak();
  };
  const int64_t one = peak_of(3001), two = peak_of(6002);
  EXPECT_GT(one, 32 * 3001 * 4);  // the meter sees something
  EXPECT_LT(static_cast<double>(two), 2.2 * static_cast<double>(one));
  EXPECT_LT(two, 6002LL * 6002 * 4 / 2);
}

TEST(LayerLoss, RefusesWhatDoesNotFit) {
  const auto message = [](const LayerLossInputs& in, const LayerLossOptions& o) {
    return error_of([&] { layer_loss(in, o); });
  };
  const LayerLossInputs good = draw({.tokens = 20}, fresh_seed());
  EXPECT_NO_THROW(layer_loss(good, {}));
  LayerLossInputs in = good;
  in.selector_weight = at::zeros({20, 3, 4}, at::kDouble);
  EXPECT_NE(message(in, {}).find("[20, 3, 4]"), std::string::npos);
  in = good;
  in.document_starts = {0, 7, 7};
  EXPECT_NE(message(in, {}).find("found 7 after 7"), std::string::npos);
  in = good;
  in.query_rows = at::tensor({3, 20}, at::kLong);
  EXPECT_NE(message(in, {}).find("found 20 at index 1"), std::string::npos);
  EXPECT_NE(message(good, {.k_train = 3}).find("k_train is 3"), std::string::npos);
}

}  // namespace
