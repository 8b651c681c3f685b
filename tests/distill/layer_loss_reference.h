// The loss of layer_loss by its definition, query by query in float64, differentiated by autograd; and random
// inputs to feed both.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "distill/layer_loss.h"

namespace spot::test {

struct Reference {
  double loss = 0.0, entropy = 0.0;
  int64_t queries = 0;
  at::Tensor grad_query, grad_key, grad_weight;
  std::vector<double> covered, covered_oracle;
};

// Indices of `entries` ordered by descending value, the lower index first among equals.
inline std::vector<int64_t> ranking(const at::Tensor& entries) {
  const at::Tensor values = entries.detach().contiguous();
  const double* v = values.data_ptr<double>();
  std::vector<int64_t> order(values.numel());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return v[a] > v[b]; });
  return order;
}

inline at::Tensor as_index(std::vector<int64_t> list) {
  std::sort(list.begin(), list.end());
  return at::tensor(list, at::kLong);
}

inline at::Tensor kl(const at::Tensor& p, const at::Tensor& log_q) {
  return (p * (p.log() - log_q)).sum();
}

inline Reference reference(const LayerLossInputs& in, const LayerLossOptions& o) {
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

inline const bool kOneThread = (at::set_num_threads(1), true);  // tensors here are too small to share

inline LayerLossInputs draw(const Shape& s, uint64_t seed, at::ScalarType type = at::kDouble) {
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

// What attention would hand over.
inline void add_logsumexp(LayerLossInputs& in) {
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

inline void expect_near(const at::Tensor& got, const at::Tensor& want, double relative, const char* name) {
  const double scale = want.abs().max().item<double>();
  const double worst = (got.to(at::kDouble) - want).abs().max().item<double>();
  EXPECT_LE(worst, relative * scale + 1e-15) << name << ", largest element " << scale;
}

}  // namespace spot::test
