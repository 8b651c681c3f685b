// Losses, gradients and coverage of layer_loss: those of the definition (layer_loss_reference.h) and of
// finite differences.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "core/error.h"
#include "distill/layer_loss.h"
#include "tests/distill/layer_loss_reference.h"
#include "tests/selector/support.h"

using namespace spot;
using namespace spot::test;

namespace {

void expect_matches(const LayerLossInputs& in, const LayerLossOptions& o, double relative) {
  const Reference want = reference(in, o);
  const LayerLoss got = layer_loss(in, o);
  EXPECT_EQ(got.queries, want.queries);
  EXPECT_NEAR(got.loss.item<double>(), want.loss, relative * (std::abs(want.loss) + 1e-3));
  EXPECT_NEAR(got.teacher_entropy.item<double>(), want.entropy, relative * (want.entropy + 1e-3));
  expect_near(got.grad_query, want.grad_query, relative, "grad_query");
  expect_near(got.grad_key, want.grad_key, relative, "grad_key");
  expect_near(got.grad_weight, want.grad_weight, relative, "grad_weight");
  for (size_t i = 0; i < o.budgets.size(); ++i) {
    EXPECT_NEAR(got.covered[static_cast<int64_t>(i)].item<double>(), want.covered[i], relative);
    EXPECT_NEAR(got.covered_oracle[static_cast<int64_t>(i)].item<double>(), want.covered_oracle[i], relative);
  }
}

TEST(LayerLoss, EveryCombinationMatchesTheDefinition) {
  const uint64_t seed = fresh_seed();
  int combination = 0;
  for (const auto loss : {DistillLoss::dense, DistillLoss::sparse})
    for (const bool rest : {false, true})
      for (const auto teacher : {Teacher::token, Teacher::block_max})
        for (const auto scope : {TeacherScope::all, TeacherScope::residual})
          for (const int64_t groups : {1, 2})
            for (const int64_t key_heads : {1, 4}) {
              LayerLossOptions o;
              o.loss = loss;
              o.rest_bucket = rest;
              o.teacher = teacher;
              o.scope = scope;
              o.block_size = 4;
              o.k_train = 13;
              o.sinks = 6;
              o.recency = 9;
              o.budgets = {0.1, 0.5, 8, 10000};
              o.tile_rows = 1 + combination % 23;  // tiles that do and do not divide the rows
              LayerLossInputs in = draw({.key_heads = key_heads, .groups = groups}, seed + combination);
              if (combination % 3 == 1) in.document_starts = {0, 5, 6, 27};
              if (combination % 3 == 2) in.query_rows = at::tensor({2, 3, 17, 30, 31, 32, 36}, at::kLong);
              SCOPED_TRACE(
                  fmt::format("combination {}: loss {} rest {} teacher {} scope {} groups {} key heads {}",
                              combination, static_cast<int>(loss), rest, static_cast<int>(teacher),
                              static_cast<int>(scope), groups, key_heads));
              expect_matches(in, o, 1e-10);
              ++combination;
            }
}

TEST(LayerLoss, ManyRandomShapes) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 engine(seed);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  for (int trial = 0; trial < 24; ++trial) {
    const int64_t groups = pick(1, 3), kv = groups * pick(1, 2);
    const int64_t heads = pick(1, 5);
    const Shape s{.tokens = pick(1, 90),
                  .num_heads = kv * pick(1, 3),
                  .num_kv_heads = kv,
                  .head_dim = pick(1, 17),
                  .heads = heads,
                  .key_heads = pick(0, 1) ? heads : 1,
                  .dim = pick(1, 17),
                  .groups = groups};
    LayerLossOptions o;
    o.loss = pick(0, 3) ? DistillLoss::sparse : DistillLoss::dense;
    o.rest_bucket = pick(0, 1);
    o.teacher = pick(0, 1) ? Teacher::token : Teacher::block_max;
    o.scope = pick(0, 1) ? TeacherScope::all : TeacherScope::residual;
    o.block_size = pick(1, 7);
    o.k_train = o.block_size + pick(0, 40);
    o.sinks = pick(0, 9);
    o.recency = pick(0, 9);
    o.tile_rows = pick(0, 30);
    o.budgets = {0.3};
    LayerLossInputs in = draw(s, seed + trial);
    for (int64_t start = 0; start < s.tokens; start += pick(1, 50)) in.document_starts.push_back(start);
    SCOPED_TRACE(
        fmt::format("trial {}: {} tokens, block {}, k_train {}", trial, s.tokens, o.block_size, o.k_train));
    expect_matches(in, o, 1e-10);
  }
}

TEST(LayerLoss, OperatorsMatchTheDefinition) {
  const uint64_t seed = fresh_seed();
  std::mt19937_64 engine(seed);
  const auto pick = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine);
  };
  for (int trial = 0; trial < 40; ++trial) {
    const int64_t heads = pick(1, 4), kv = pick(1, 2), tokens = pick(1, 90);
    LayerLossOptions o;
    o.operators = LayerLossOptions::Operators::always;
    o.loss = trial % 2 ? DistillLoss::sparse : DistillLoss::dense;
    o.k_train = 20;  // the first queries of a document see fewer keys
    o.rest_bucket = pick(0, 1);
    // What the operators do not cover takes the teacher alone from them.
    o.teacher = pick(0, 3) ? Teacher::token : Teacher::block_max;
    o.scope = pick(0, 1) ? TeacherScope::all : TeacherScope::residual;
    o.block_size = pick(1, 7);
    o.sinks = pick(0, 9);
    o.recency = pick(0, 20);
    o.tile_rows = pick(1, 40);
    const int64_t groups = pick(0, 3) ? 1 : kv;
    LayerLossInputs in = draw({.tokens = tokens,
                               .num_heads = kv * pick(1, 3),
                               .num_kv_heads = kv,
                               .heads = heads,
                               .key_heads = pick(0, 1) ? heads : 1,
                               .groups = groups},
                              seed + trial);
    for (int64_t start = 0; start < tokens; start += pick(1, 50)) in.document_starts.push_back(start);
    add_logsumexp(in);
    if (trial % 3 == 0) in.query_rows = at::arange(pick(0, tokens - 1), tokens, pick(1, 5), at::kLong);
    SCOPED_TRACE(fmt::format(
        "trial {}: {} tokens, {} of {} heads, {} groups, tiles of {}, scope {}, blocks of {}, {} sinks, "
        "recency {}",
        trial, tokens, in.selector_key.size(1), heads, groups, o.tile_rows, static_cast<int>(o.scope),
        o.block_size, o.sinks, o.recency));
    expect_matches(in, o, 1e-10);
  }
}

TEST(LayerLoss, TiedScoresTakeTheLowerIndex) {
  LayerLossInputs in = draw({.tokens = 37}, fresh_seed());
  in.selector_key.fill_(-1.0);  // every dot is negative or its weight irrelevant: all scores are 0
  in.selector_query.abs_();
  LayerLossOptions o;
  o.block_size = 1;
  o.k_train = 3;
  expect_matches(in, o, 1e-10);  // the reference sorts stably
}

TEST(LayerLoss, LowPrecisionInputsAccumulateInFloat32) {
  const uint64_t seed = fresh_seed();
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf}) {
    LayerLossOptions o;
    o.loss = DistillLoss::dense;  // a top-k set may differ between precisions
    o.budgets = {0.25};
    const LayerLossInputs in = draw({.tokens = 59, .head_dim = 33, .key_heads = 4, .dim = 65}, seed, type);
    // The reference sees the rounded inputs in float64, so only accumulation differs. A block rank may flip
    // at a near tie, so coverage is compared loosely.
    const Reference want = reference(in, o);
    const LayerLoss got = layer_loss(in, o);
    EXPECT_EQ(got.grad_key.scalar_type(), at::kFloat);
    EXPECT_NEAR(got.loss.item<double>(), want.loss, 1e-5 * want.loss);
    expect_near(got.grad_query, want.grad_query, 1e-4, "grad_query");
    expect_near(got.grad_key, want.grad_key, 1e-4, "grad_key");
    expect_near(got.grad_weight, want.grad_weight, 1e-4, "grad_weight");
    EXPECT_NEAR(got.covered[0].item<double>(), want.covered[0], 1e-3);
  }
}

TEST(LayerLoss, CudaAgreesWithTheDefinition) {
  if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device";
  const uint64_t seed = fresh_seed();
  for (const auto type : {at::kDouble, at::kFloat, at::kBFloat16})
    for (const bool rest : {false, true})
      for (const auto teacher : {Teacher::token, Teacher::block_max}) {
        // In float64 everything is compared; else no top-k, whose set may differ between precisions.
        const bool exact = type == at::kDouble;
        LayerLossOptions o;
        o.loss = exact ? DistillLoss::sparse : DistillLoss::dense;
        o.k_train = 16;
        o.rest_bucket = rest;
        o.teacher = teacher;
        LayerLossInputs in = draw(
            {.tokens = 83, .head_dim = 32, .key_heads = rest ? 4 : 1, .dim = 64, .groups = 2}, seed, type);
        in.document_starts = {0, 17};
        const Reference want = reference(in, o);
        for (at::Tensor* t : {&in.query, &in.key, &in.selector_query, &in.selector_key, &in.selector_weight})
          *t = t->cuda();
        const LayerLoss got = layer_loss(in, o);
        // float32 products may run in TF32; bfloat16 gradients pass one rounding.
        const double relative = exact ? 1e-10 : type == at::kFloat ? 2e-3 : 5e-3;
        EXPECT_NEAR(got.loss.item<double>(), want.loss, relative * want.loss);
        expect_near(got.grad_query.cpu(), want.grad_query, relative, "grad_query");
        expect_near(got.grad_key.cpu(), want.grad_key, relative, "grad_key");
        expect_near(got.grad_weight.cpu(), want.grad_weight, relative, "grad_weight");
      }
}

double norm_error(const at::Tensor& got, const at::Tensor& want) {
  return (got.cpu().to(at::kDouble) - want).norm().item<double>() /
         std::max(want.norm().item<double>(), 1e-12);
}

// The fused kernels against the definition in float64, from the same bfloat16 inputs.
TEST(LayerLoss, CudaKernelsMatchTheDefinition) {
  if (!at::hasCUDA()) GTEST_SKIP() << "no CUDA device";
  const uint64_t seed = fresh_seed();
  int trial = 0;
  for (const int64_t head_dim : {64, 128, 256})
    for (const int64_t key_heads : {1, 4})
      for (const auto loss : {DistillLoss::dense, DistillLoss::sparse}) {
        LayerLossOptions o;
        o.loss = loss;
        o.k_train = 300;
        o.tile_rows = 256;
        LayerLossInputs in = draw({.tokens = 811,
                                   .num_heads = 8,
                                   .num_kv_heads = trial % 2 ? 2 : 8,
                                   .head_dim = head_dim,
                                   .key_heads = key_heads,
                                   .dim = 128},
                                  seed + trial, at::kBFloat16);
        in.selector_weight = in.selector_weight.to(at::kFloat) * 0.1;
        in.document_starts = {0, 111};
        if (trial % 3 == 2) in.query_rows = at::arange(5, 811, 3, at::kLong);
        if (trial / 2 % 2 == 1) o.scope = TeacherScope::residual;
        if (trial / 2 % 4 == 3) in.document_starts = {0, 405};  // six queries of each see a block
        add_logsumexp(in);
        SCOPED_TRACE(fmt::format("trial {}: head_dim {}, {} key heads, scope {}", trial, head_dim, key_heads,
                                 static_cast<int>(o.scope)));
        const Reference want = reference(in, o);
        for (at::Tensor* t :
             {&in.query, &in.key, &in.logsumexp, &in.selector_query, &in.selector_key, &in.selector_weight})
          *t = t->cuda();
        const LayerLoss got = layer_loss(in, o);
        EXPECT_NEAR(got.loss.item<double>(), want.loss, 1e-3 * want.loss);
        EXPECT_NEAR(got.teacher_entropy.item<double>(), want.entropy, 1e-4 * want.entropy);
        // A top-k set may differ from float64's in a key near its edge, here and there.
        const double edge = loss == DistillLoss::sparse ? 5e-3 : 0.0;
        EXPECT_LE(norm_error(got.grad_query, want.grad_query), 4e-3 + edge);
        EXPECT_LE(norm_error(got.grad_key, want.grad_key), 4e-3 + edge);
        EXPECT_LE(norm_error(got.grad_weight, want.grad_weight), 1e-4 + edge);
        const LayerLoss again = layer_loss(in, o);
        EXPECT_TRUE(at::equal(got.grad_key, again.grad_key)) << "not deterministic";
        ++trial;
      }
}

// Through the operators and past them, at the ranges that training has.
TEST(LayerLoss, OperatorsAgreeOnTheResidualTeacher) {
  const uint64_t seed = fresh_seed();
  for (const auto loss : {DistillLoss::dense, DistillLoss::sparse}) {
    LayerLossOptions o;
    o.loss = loss;
    o.scope = TeacherScope::residual;
    o.k_train = 64;
    o.budgets = {0.1};
    o.measured_queries = 64;
    o.tile_rows = 200;
    LayerLossInputs in = draw({.tokens = 1201, .head_dim = 8, .key_heads = 4}, seed);
    in.document_starts = {0, 3, 513};  // of the second document only the last queries see a block
    add_logsumexp(in);
    o.operators = LayerLossOptions::Operators::never;
    const LayerLoss want = layer_loss(in, o);
    o.operators = LayerLossOptions::Operators::always;
    const LayerLoss got = layer_loss(in, o);
    EXPECT_EQ(got.queries, want.queries);
    EXPECT_GT(got.queries, 200);
    expect_near(got.loss, want.loss, 1e-10, "loss");
    expect_near(got.teacher_entropy, want.teacher_entropy, 1e-10, "teacher_entropy");
    expect_near(got.grad_query, want.grad_query, 1e-10, "grad_query");
    expect_near(got.grad_key, want.grad_key, 1e-10, "grad_key");
    expect_near(got.grad_weight, want.grad_weight, 1e-10, "grad_weight");
    expect_near(got.covered, want.covered, 1e-10, "covered");
    expect_near(got.covered_oracle, want.covered_oracle, 1e-10, "covered_oracle");
  }
}

// The gradients against the loss's slopes along random directions.
void check_slopes(LayerLossInputs in, const LayerLossOptions& o) {
  const LayerLoss at_point = layer_loss(in, o);
  using Field = at::Tensor LayerLossInputs::*;
  const std::vector<std::pair<Field, at::Tensor>> fields = {
      {&LayerLossInputs::selector_query, at_point.grad_query},
      {&LayerLossInputs::selector_key, at_point.grad_key},
      {&LayerLossInputs::selector_weight, at_point.grad_weight}};
  for (const auto& [field, grad] : fields) {
    const at::Tensor original = in.*field, direction = at::randn_like(original);
    const double slope = (grad * direction).sum().item<double>();
    // A step may cross a kink (another top-k set, another largest token, a ReLU): the smallest of several
    // steps' errors is that of one which does not.
    double best = 1e300;
    for (const double step : {1e-5, 1e-6, 1e-7}) {
      in.*field = original + step * direction;
      const double above = layer_loss(in, o).loss.item<double>();
      in.*field = original - step * direction;
      best = std::min(best, std::abs((above - layer_loss(in, o).loss.item<double>()) / (2 * step) - slope));
    }
    in.*field = original;
    EXPECT_LE(best, 1e-6 * (1 + std::abs(slope)));
  }
}

TEST(LayerLoss, FiniteDifferences) {
  const uint64_t seed = fresh_seed();
  for (const bool rest : {false, true})
    for (const auto teacher : {Teacher::token, Teacher::block_max}) {
      LayerLossOptions o;
      o.rest_bucket = rest;
      o.teacher = teacher;
      o.k_train = 20;
      o.block_size = 4;
      SCOPED_TRACE(fmt::format("rest {}, teacher {}", rest, static_cast<int>(teacher)));
      check_slopes(draw({.key_heads = 4, .groups = 2}, seed + rest), o);
    }
}

TEST(LayerLoss, OperatorsFiniteDifferences) {
  const uint64_t seed = fresh_seed();
  for (const auto loss : {DistillLoss::dense, DistillLoss::sparse})
    for (const auto scope : {TeacherScope::all, TeacherScope::residual}) {
      LayerLossOptions o;
      o.operators = LayerLossOptions::Operators::always;
      o.loss = loss;
      o.scope = scope;
      o.block_size = 2;
      o.k_train = 8;
      o.sinks = 3;
      o.recency = 5;
      LayerLossInputs in = draw({.key_heads = 4}, seed);
      in.document_starts = {0, 11};
      add_logsumexp(in);
      SCOPED_TRACE(fmt::format("loss {}, scope {}", static_cast<int>(loss), static_cast<int>(scope)));
      check_slopes(in, o);
    }
}

}  // namespace
