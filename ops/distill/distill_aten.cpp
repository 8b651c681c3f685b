// The distillation loss by ATen: the oracle of the kernels, and what serves where they do not.
#include <algorithm>
#include <limits>

#include "ops/distill/distill.h"

namespace spot::ops::aten {
namespace {

at::ScalarType accumulation(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// [R, width]: whether a row does not see a column.
at::Tensor unseen(const QueryStrip& s) {
  const at::Tensor column = at::arange(s.first_key, s.first_key + s.width, s.tokens.options()).unsqueeze(0);
  return (column < s.low.unsqueeze(1)).logical_or_(column > s.last.unsqueeze(1));
}

// Columns that have a token.
int64_t real_columns(const QueryStrip& s, const at::Tensor& key) {
  return std::min(s.width, key.size(0) - s.first_key);
}

}  // namespace

TeacherMass::Result teacher_mass(const TeacherMass& a) {
  const auto& [query, key, logsumexp, s, scale, groups] = a;
  const auto type = accumulation(query);
  const int64_t rows = s.tokens.size(0), real = real_columns(s, key), kv_heads = key.size(1),
                num_heads = query.size(1);
  const at::Tensor q = query.index_select(0, s.tokens).to(type);
  const at::Tensor k = key.narrow(0, s.first_key, real).to(type);
  const at::Tensor sums = logsumexp.to(type).index_select(1, s.tokens).unsqueeze(-1);  // [num_heads, R, 1]
  at::Tensor mass = at::zeros({rows, groups, s.width}, q.options());
  for (int64_t h = 0; h < num_heads; ++h) {
    const at::Tensor logits = at::mm(q.select(1, h), k.select(1, h / (num_heads / kv_heads)).t()).mul_(scale);
    mass.select(1, h * groups / num_heads).narrow(1, 0, real).add_(logits.sub_(sums[h]).exp_());
  }
  mass.mul_(static_cast<double>(groups) / static_cast<double>(num_heads))
      .masked_fill_(unseen(s).unsqueeze(1), 0.0);
  return {mass, mass.sum(-1)};
}

SelectorKl::Result selector_kl(const SelectorKl& a) {
  const auto& [mass, total, query, key, weight, strip, k_train, grad_key] = a;
  QueryStrip s = strip;
  s.width = mass.size(1);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto type = mass.scalar_type();
  const int64_t heads = query.size(1), real = real_columns(s, key);
  at::Tensor hidden = unseen(s).narrow(1, 0, real);
  const at::Tensor q = query.index_select(0, s.tokens).to(type).transpose(0, 1);  // [heads, R, dim]
  const at::Tensor k =
      key.narrow(0, s.first_key, real).to(type).transpose(0, 1).expand({heads, real, key.size(2)});
  const at::Tensor w = weight.index_select(0, s.tokens);          // [R, heads]
  const at::Tensor dots = at::bmm(q, k.transpose(1, 2)).relu_();  // [heads, R, real]
  at::Tensor scores = at::einsum("hrc,rh->rc", {dots, w}).masked_fill_(hidden, -kInfinity);
  at::Tensor teacher = mass.narrow(1, 0, real).masked_fill(hidden, 0.0);
  const double smallest = type == at::kDouble ? 1e-300 : 1e-37;
  at::Tensor empty = (total < smallest).unsqueeze(1);
  teacher = (teacher / total.unsqueeze(1)).masked_fill_(empty, 0.0);
  const at::Tensor entropy = -at::xlogy(teacher, teacher).sum(-1);
  if (k_train > 0) {
    const at::Tensor order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
    hidden = hidden.logical_or_(
        at::ones_like(hidden).scatter_(-1, order.narrow(1, 0, std::min(k_train, real)), false));
    scores = scores.masked_fill(hidden, -kInfinity);
    teacher = mass.narrow(1, 0, real).masked_fill(hidden, 0.0);
    const at::Tensor kept = teacher.sum(-1, true);
    empty = kept < smallest;
    teacher = (teacher / kept).masked_fill_(empty, 0.0);
  }
  const at::Tensor student_log = at::log_softmax(scores, -1);
  const at::Tensor loss =
      (at::xlogy(teacher, teacher) - teacher * student_log.masked_fill(hidden, 0.0)).sum(-1);
  if (!grad_key.defined()) return {loss, entropy, at::empty({0}, w.options()), at::empty({0}, w.options())};
  const at::Tensor difference = student_log.exp().sub_(teacher).masked_fill_(empty, 0.0);
  const at::Tensor grad_weight = at::einsum("hrc,rc->rh", {dots, difference});
  const at::Tensor dots_grad = (w.t().unsqueeze(-1) * difference).mul_(dots > 0.0);  // [heads, R, real]
  const at::Tensor key_grad = at::bmm(dots_grad.transpose(1, 2), q);                 // [heads, real, dim]
  grad_key.narrow(1, s.first_key, real).add_(key.size(1) == 1 ? key_grad.sum(0, true) : key_grad);
  return {loss, entropy, at::bmm(dots_grad, k).transpose(0, 1).contiguous(), grad_weight};
}

}  // namespace spot::ops::aten
