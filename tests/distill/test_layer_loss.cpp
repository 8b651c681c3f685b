// layer_loss against a reference that follows the definition query by query in float64 and lets autograd
// differentiate.
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <random>

#include "core/error.h"
#include "distill/layer_loss.h"

namespace spot {
namespace {

struct Reference {
  double loss = 0.0, entropy = 0.0;
  int64_t queries = 0;
  at::Tensor grad_query, grad_key, grad_weight;
  std::vector<double> covered, covered_oracle;
};

// Indices of `entries` ordered by descending value, the lower index first among equals.
std::vector<int64_t> ranking(const at::Tensor& entries) {
  const at::Tensor values = entries.detach().contiguous();
  const double* v = values.data_ptr<double>();
  std::vector<int64_t> order(values.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return v[a] > v[b]; });
  return order;
}

at::Tensor as_index(std::vector<int64_t> list) {
  std::sort(list.begin(), list.end());
  return at::tensor(list, at::kLong);
}

at::Tensor kl(const at::Tensor& p, const at::Tensor& log_q) {
  return (p * (p.log() - log_q)).sum();
}

Reference reference(const LayerLossInputs& in, const LayerLossOptions& o) {
  const at::Tensor query = in.query.to(at::kDouble), key = in.key.to(at::kDouble);
  const at::Tensor sq = in.selector_query.to(at::kDouble).detach().clone().requires_grad_();
  const at::Tensor sk = in.selector_key.to(at::kDouble).detach().clone().requires_grad_();
  const at::Tensor sw = in.selector_weight.to(at::kDouble).detach().clone().requires_grad_();
  const int64_t tokens = query.size(0), num_heads = query.size(1), group_size = num_heads / key.size(1);
  const int64_t groups = sw.size(1), B = o.block_size;
  std::vector<int64_t> starts = in.document_starts.empty() ? std::vector<int64_t>{0} : in.document_starts;
  starts.push_back(tokens);

  Reference out;
  out.covered.assign(o.budgets.size(), 0.0);
  out.covered_oracle.assign(o.budgets.size(), 0.0);
  at::Tensor total = at::zeros({}, at::kDouble);
  for (size_t d = 0; d + 1 < starts.size(); ++d) {
    for (int64_t t = starts[d]; t < starts[d + 1]; ++t) {
      if (in.query_rows.defined() && !in.query_rows.eq(t).any().item<bool>()) continue;
      const int64_t position = t - starts[d], keys = position + 1;
      int64_t low = 0, high = keys;
      if (o.scope == TeacherScope::residual) {
        low = (o.sinks + B - 1) / B * B;
        high = std::max<int64_t>(0, keys - o.recency) / B * B;
      }
      if (high <= low) continue;
      ++out.queries;
      for (int64_t g = 0; g < groups; ++g) {
        at::Tensor mass = at::zeros({keys}, at::kDouble);
        for (int64_t h = g * num_heads / groups; h < (g + 1) * num_heads / groups; ++h) {
          const at::Tensor logits =
              in.scale * key.narrow(0, starts[d], keys).select(1, h / group_size).mv(query[t][h]);
          mass = mass + at::softmax(logits, 0) / (num_heads / groups);
        }
        at::Tensor score = at::zeros({keys}, at::kDouble);
        for (int64_t h = 0; h < sq.size(1); ++h) {
          const at::Tensor k = sk.narrow(0, starts[d], keys).select(1, sk.size(1) == 1 ? 0 : h);
          score = score + sw[t][g][h] * at::relu(k.mv(sq[t][h]));
        }
        mass = mass.narrow(0, low, high - low);
        score = score.narrow(0, low, high - low);
        const at::Tensor p = mass / mass.sum();
        out.entropy -= (p * p.log()).sum().item<double>();

        // Blocks of the active tokens (low is a multiple of B, so blocks of the slice are blocks of the
        // document).
        std::vector<at::Tensor> block_score, block_peak, block_mass;
        for (int64_t a = 0; a < high - low; a += B) {
          const int64_t n = std::min(B, high - low - a);
          block_score.push_back(score.narrow(0, a, n).max());
          block_peak.push_back(mass.narrow(0, a, n).max());
          block_mass.push_back(p.narrow(0, a, n).sum());
        }
        const at::Tensor bs = at::stack(block_score), bm = at::stack(block_mass);
        for (size_t i = 0; i < o.budgets.size(); ++i) {
          const double wanted =
              o.budgets[i] < 1 ? o.budgets[i] * static_cast<double>(high - low) : o.budgets[i];
          const auto n = std::clamp<int64_t>(static_cast<int64_t>(std::ceil(wanted / static_cast<double>(B))),
                                             1, bs.numel());
          for (const bool oracle : {false, true}) {
            std::vector<int64_t> order = ranking(oracle ? bm : bs);
            order.resize(n);
            (oracle ? out.covered_oracle : out.covered)[i] +=
                bm.index_select(0, as_index(order)).sum().item<double>();
          }
        }

        at::Tensor entry_mass = mass, entry_score = score;
        int64_t k = o.k_train;
        if (o.teacher == Teacher::block_max) {
          entry_mass = at::stack(block_peak);
          entry_score = bs;
          k /= B;
        }
        if (o.loss == DistillLoss::dense || k >= entry_score.numel()) {
          total = total + kl(entry_mass / entry_mass.sum(), at::log_softmax(entry_score, 0));
          continue;
        }
        const std::vector<int64_t> order = ranking(entry_score);
        const at::Tensor inside = as_index({order.begin(), order.begin() + k});
        const at::Tensor outside = as_index({order.begin() + k, order.end()});
        if (o.rest_bucket) {
          const at::Tensor q = at::softmax(entry_score, 0), pt = entry_mass / entry_mass.sum();
          const auto bucketed = [&](const at::Tensor& x) {
            return at::cat({x.index_select(0, inside), x.index_select(0, outside).sum().view({1})});
          };
          total = total + kl(bucketed(pt), bucketed(q).log());
        } else {
          const at::Tensor pt = entry_mass.index_select(0, inside);
          total = total + kl(pt / pt.sum(), at::log_softmax(entry_score.index_select(0, inside), 0));
        }
      }
    }
  }
  const double count = static_cast<double>(std::max<int64_t>(1, out.queries) * groups);
  total = total / count;
  if (out.queries > 0) total.backward();
  out.loss = total.item<double>();
  out.entropy /= count;
  for (auto* list : {&out.covered, &out.covered_oracle})
    for (double& c : *list) c /= count;
  const auto grad = [](const at::Tensor& x) { return x.grad().defined() ? x.grad() : at::zeros_like(x); };
  out.grad_query = grad(sq);
  out.grad_key = grad(sk);
  out.grad_weight = grad(sw);
  return out;
}

struct Shape {
  int64_t tokens = 37, num_heads = 4, num_kv_heads = 2, head_dim = 10, heads = 4, key_heads = 1, dim = 12,
          groups = 1;
};

const bool kOneThread = (at::set_num_threads(1), true);  // tensors here are too small to share

uint64_t fresh_seed() {
  const uint64_t seed = std::random_device{}();
  ::testing::Test::RecordProperty("seed", std::to_string(seed));
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

LayerLossInputs draw(const Shape& s, uint64_t seed, at::ScalarType type = at::kDouble) {
  at::manual_seed(seed);
  const auto random = [&](at::IntArrayRef size) { return at::randn(size, at::kDouble).to(type); };
  LayerLossInputs in;
  in.query = random({s.tokens, s.num_heads, s.head_dim});
  in.key = random({s.tokens, s.num_kv_heads, s.head_dim});
  in.scale = 1.5 / std::sqrt(static_cast<double>(s.head_dim));
  in.selector_query = random({s.tokens, s.heads, s.dim});
  in.selector_key = random({s.tokens, s.key_heads, s.dim});
  in.selector_weight = random({s.tokens, s.groups, s.heads}) * 0.5;
  return in;
}

void expect_near(const at::Tensor& got, const at::Tensor& want, double relative, const char* name) {
  const double scale = want.abs().max().item<double>();
  const double worst = (got.to(at::kDouble) - want).abs().max().item<double>();
  EXPECT_LE(worst, relative * scale + 1e-15) << name << ", largest element " << scale;
}

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

TEST(LayerLoss, FiniteDifferences) {
  const uint64_t seed = fresh_seed();
  for (const bool rest : {false, true})
    for (const auto teacher : {Teacher::token, Teacher::block_max}) {
      LayerLossOptions o;
      o.rest_bucket = rest;
      o.teacher = teacher;
      o.k_train = 20;
      o.block_size = 4;
      LayerLossInputs in = draw({.key_heads = 4, .groups = 2}, seed + rest);
      const LayerLoss at_point = layer_loss(in, o);
      using Field = at::Tensor LayerLossInputs::*;
      const std::vector<std::pair<Field, at::Tensor>> fields = {
          {&LayerLossInputs::selector_query, at_point.grad_query},
          {&LayerLossInputs::selector_key, at_point.grad_key},
          {&LayerLossInputs::selector_weight, at_point.grad_weight}};
      for (const auto& [field, grad] : fields) {
        const at::Tensor original = in.*field, direction = at::randn_like(original);
        // A step may cross a kink (another top-k set, another largest token, a ReLU): the smallest of several
        // steps' errors is that of one which does not.
        double best = 1e300;
        const double slope = (grad * direction).sum().item<double>();
        for (const double step : {1e-5, 1e-6, 1e-7}) {
          in.*field = original + step * direction;
          const double above = layer_loss(in, o).loss.item<double>();
          in.*field = original - step * direction;
          const double below = layer_loss(in, o).loss.item<double>();
          best = std::min(best, std::abs((above - below) / (2 * step) - slope));
        }
        in.*field = original;
        EXPECT_LE(best, 1e-6 * (1 + std::abs(slope)));
      }
    }
}

// What attention would hand over.
void add_logsumexp(LayerLossInputs& in) {
  const at::Tensor query = in.query.to(at::kDouble), key = in.key.to(at::kDouble);
  const int64_t tokens = query.size(0), group = query.size(1) / key.size(1);
  at::Tensor logits = at::einsum("qhd,khd->hqk", {query, key.repeat_interleave(group, 1)}) * in.scale;
  const at::Tensor index = at::arange(tokens, at::kLong);
  std::vector<int64_t> starts = in.document_starts.empty() ? std::vector<int64_t>{0} : in.document_starts;
  const at::Tensor document = (index.unsqueeze(1) >= at::tensor(starts, at::kLong)).sum(1);
  const at::Tensor unseen =
      (index.unsqueeze(0) > index.unsqueeze(1)).logical_or_(document.unsqueeze(0) != document.unsqueeze(1));
  in.logsumexp = at::logsumexp(logits.masked_fill_(unseen, -std::numeric_limits<double>::infinity()), {-1});
  if (in.query.scalar_type() != at::kDouble) in.logsumexp = in.logsumexp.to(at::kFloat);
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
    SCOPED_TRACE(fmt::format("trial {}: {} tokens, {} of {} heads, {} groups, tiles of {}, scope {}, blocks of {}, {} sinks, "
                             "recency {}",
                             trial, tokens, in.selector_key.size(1), heads, groups, o.tile_rows, static_cast<int>(o.scope),
                             o.block_size, o.sinks, o.recency));
    expect_matches(in, o, 1e-10);
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

void check_slopes(LayerLossInputs in, const LayerLossOptions& o) {
  const LayerLoss at_point = layer_loss(in, o);
  using Field = at::Tensor LayerLossInputs::*;
  const std::vector<std::pair<Field, at::Tensor>> fields = {{&LayerLossInputs::selector_query, at_point.grad_query},
                                                            {&LayerLossInputs::selector_key, at_point.grad_key},
                                                            {&LayerLossInputs::selector_weight, at_point.grad_weight}};
  for (const auto& [field, grad] : fields) {
    const at::Tensor original = in.*field, direction = at::randn_like(original);
    const double slope = (grad * direction).sum().item<double>();
    double best = 1e300;  // a step may cross a kink of the ReLU
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

TEST(LayerLoss, GradientsWeightedAndRoundedOnce) {
  const uint64_t seed = fresh_seed();
  for (const auto operators : {LayerLossOptions::Operators::never, LayerLossOptions::Operators::always})
    for (const int64_t key_heads : {1, 4}) {
      LayerLossOptions o;
      o.loss = DistillLoss::dense;
      o.operators = operators;
      o.tile_rows = 16;
      LayerLossInputs in = draw({.tokens = 47, .head_dim = 32, .key_heads = key_heads, .dim = 64}, seed, at::kBFloat16);
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
  return (got.cpu().to(at::kDouble) - want).norm().item<double>() / std::max(want.norm().item<double>(), 1e-12);
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
        add_logsumexp(in);
        if (trial % 3 == 2) in.query_rows = at::arange(5, 811, 3, at::kLong);
        if (trial / 2 % 2 == 1) o.scope = TeacherScope::residual;
        if (trial / 2 % 4 == 3) in.document_starts = {0, 405};  // six queries of each see a block
        SCOPED_TRACE(fmt::format("trial {}: head_dim {}, {} key heads, scope {}", trial, head_dim, key_heads,
                                 static_cast<int>(o.scope)));
        const Reference want = reference(in, o);
        for (at::Tensor* t : {&in.query, &in.key, &in.logsumexp, &in.selector_query, &in.selector_key, &in.selector_weight})
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

TEST(LayerLoss, TiedScoresTakeTheLowerIndex) {
  LayerLossInputs in = draw({.tokens = 37}, fresh_seed());
  in.selector_key.fill_(-1.0);  // every dot is negative or its weight irrelevant: all scores are 0
  in.selector_query.abs_();
  LayerLossOptions o;
  o.block_size = 1;
  o.k_train = 3;
  expect_matches(in, o, 1e-10);  // the reference sorts stably
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
  const auto message = [](const LayerLossInputs& in, const LayerLossOptions& o) -> std::string {
    try {
      layer_loss(in, o);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const LayerLossInputs good = draw({.tokens = 20}, fresh_seed());
  EXPECT_EQ(message(good, {}), "");
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
}  // namespace spot
