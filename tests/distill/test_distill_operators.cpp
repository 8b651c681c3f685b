// The ATen form of the distillation operators against their definition, row by row in float64.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "ops/distill/distill.h"

namespace spot {
namespace {

class DistillOperators : public ::testing::Test {
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
  // Queries `first` and on of one document, without its first `sinks` and each query's last `recency` keys.
  static ops::QueryStrip strip_of(int64_t first, int64_t rows, int64_t sinks, int64_t recency) {
    const at::Tensor tokens = at::arange(first, first + rows, at::kInt);
    return {tokens, at::full_like(tokens, sinks), tokens - recency, sinks, first + rows - recency - sinks};
  }
  std::mt19937_64 random_;
};

void expect_near(const at::Tensor& got, const at::Tensor& want, const char* name) {
  ASSERT_EQ(got.sizes(), want.sizes()) << name;
  EXPECT_LE((got - want).abs().max().item<double>(), 1e-11 * (1 + want.abs().max().item<double>())) << name;
}

TEST_F(DistillOperators, MassIsOfTheSoftmaxOverAllKeys) {
  for (int trial = 0; trial < 12; ++trial) {
    const int64_t tokens = draw(20, 60), sinks = trial % 3 ? draw(0, 5) : 0,
                  recency = trial % 3 ? draw(0, 6) : 0;
    const int64_t first = draw(sinks + recency, tokens - 2), rows = draw(1, tokens - first);
    const ops::QueryStrip s = strip_of(first, rows, sinks, recency);
    const at::Tensor query = at::randn({tokens, 4, 6}, at::kDouble),
                     key = at::randn({tokens, 2, 6}, at::kDouble);
    at::Tensor logits = at::einsum("qhd,khd->hqk", {query, key.repeat_interleave(2, 1)}) * 0.7;
    logits.masked_fill_(at::ones({tokens, tokens}, at::kBool).triu(1), -INFINITY);
    const at::Tensor whole = at::softmax(logits, -1), logsumexp = at::logsumexp(logits, {-1});
    for (const int64_t groups : {1, 2}) {
      const at::Tensor by_group = whole.view({groups, 4 / groups, tokens, tokens}).mean(1).transpose(0, 1);
      at::Tensor want = at::zeros({rows, groups, s.width}, at::kDouble);
      for (int64_t r = 0; r < rows; ++r)
        want[r].narrow(1, 0, first + r - recency + 1 - sinks) =
            by_group[first + r].narrow(1, sinks, first + r - recency + 1 - sinks);
      const ops::TeacherMass::Result got = ops::teacher_mass({query, key, logsumexp, s, 0.7, groups});
      expect_near(got.mass, want, "mass");
      expect_near(got.total, want.sum(-1), "total");
      if (sinks == 0 && recency == 0)
        expect_near(got.total, at::ones({rows, groups}, at::kDouble), "total of all");
    }
  }
}

TEST_F(DistillOperators, DivergenceIsOfTheRenormalisedTeacher) {
  for (int trial = 0; trial < 12; ++trial) {
    const int64_t tokens = draw(20, 60), sinks = draw(0, 5), recency = draw(0, 6),
                  key_heads = trial % 2 ? 4 : 1;
    const int64_t first = draw(sinks + recency, tokens - 2), rows = draw(1, tokens - first);
    const int64_t k_train = draw(0, 1) * draw(1, 30);
    SCOPED_TRACE(fmt::format("trial {}: {} tokens, rows {} from {}, {} sinks, recency {}, k_train {}", trial,
                             tokens, rows, first, sinks, recency, k_train));
    const ops::QueryStrip s = strip_of(first, rows, sinks, recency);
    const at::Tensor query = at::randn({tokens, 4, 6}, at::kDouble),
                     key = at::randn({tokens, key_heads, 6}, at::kDouble),
                     weight = at::randn({tokens, 4}, at::kDouble);
    // Attention may leave the keys any share of its mass, or none.
    at::Tensor mass = at::rand({rows, s.width}, at::kDouble) * at::rand({rows, 1}, at::kDouble).pow(20);
    const int64_t silent = draw(0, rows - 1);
    mass[silent].zero_();
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = first + r - recency + 1 - sinks;
      mass[r].narrow(0, seen, s.width - seen).zero_();
    }

    const at::Tensor q = query.clone().requires_grad_(), k = key.clone().requires_grad_(),
                     w = weight.clone().requires_grad_();
    at::Tensor sum = at::zeros({}, at::kDouble), want_loss = at::zeros({rows}, at::kDouble),
               want_entropy = at::zeros({rows}, at::kDouble);
    for (int64_t r = 0; r < rows; ++r) {
      if (r == silent) continue;
      const int64_t t = first + r, seen = t - recency + 1 - sinks;
      const at::Tensor dots =
          at::einsum("hd,khd->kh", {q[t], k.narrow(0, sinks, seen).expand({seen, 4, 6})}).relu();
      at::Tensor scores = dots.mv(w[t]), teacher = mass[r].narrow(0, 0, seen);
      const at::Tensor all = teacher / teacher.sum();
      want_entropy[r] = -(all * all.log()).sum();
      if (k_train > 0 && k_train < seen) {
        const at::Tensor order = std::get<1>(at::sort(scores.detach(), true, 0, true)).narrow(0, 0, k_train);
        scores = scores.index_select(0, order);
        teacher = teacher.index_select(0, order);
      }
      teacher = teacher / teacher.sum();
      const at::Tensor loss = (teacher * (teacher.log() - at::log_softmax(scores, 0))).sum();
      want_loss[r] = loss.detach();
      sum = sum + loss;
    }
    const auto grad = [](const at::Tensor& x) { return x.grad().defined() ? x.grad() : at::zeros_like(x); };
    if (sum.requires_grad()) sum.backward();

    at::Tensor grad_key = at::zeros({key_heads, tokens, 6}, at::kDouble);
    const ops::SelectorKl::Result got =
        ops::selector_kl({mass.clone(), mass.sum(-1), query, key, weight, s, k_train, grad_key});
    expect_near(got.loss, want_loss, "loss");
    expect_near(got.entropy, want_entropy, "entropy");
    expect_near(got.grad_query, grad(q).narrow(0, first, rows), "grad_query");
    expect_near(got.grad_weight, grad(w).narrow(0, first, rows), "grad_weight");
    expect_near(grad_key.transpose(0, 1), grad(k), "grad_key");
  }
}

TEST_F(DistillOperators, RefuseListsAndTotalsThatDoNotFit) {
  const ops::QueryStrip good = strip_of(10, 5, 2, 3);
  const at::Tensor query = at::randn({20, 4, 6}), key = at::randn({20, 1, 6}), weight = at::randn({20, 4});
  const auto message = [&](const ops::QueryStrip& s, const at::Tensor& total) -> std::string {
    try {
      ops::selector_kl({at::rand({5, good.width}), total, query, key, weight, s, 0, {}});
    } catch (const c10::Error& e) {
      return e.what_without_backtrace();
    }
    return "";
  };
  EXPECT_EQ(message(good, at::ones({5})), "");
  EXPECT_NE(message(good, at::ones({4})).find("total is Float [4]"), std::string::npos);
  EXPECT_NE(message(good, at::ones({5}, at::kDouble)).find("total is Double [5]"), std::string::npos);
  ops::QueryStrip strip = good;
  strip.last = good.last.narrow(0, 0, 4);
  EXPECT_NE(message(strip, at::ones({5})).find("and Int [4]"), std::string::npos);
}

}  // namespace
}  // namespace spot
