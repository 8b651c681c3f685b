#include "ops/distill_ops.h"

#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#ifdef SPOT_CUDA
#include "ops/cuda/distill_ops.h"
#endif

namespace spot::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using MassOutputs = std::tuple<at::Tensor, at::Tensor>;
using KlOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

at::ScalarType accumulation(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_strip(const char* op, const QueryStrip& s, const at::Tensor& query, const at::Tensor& key) {
  for (const at::Tensor* list : {&s.tokens, &s.low, &s.last})
    TORCH_CHECK(list->scalar_type() == at::kInt && list->dim() == 1 && list->size(0) == s.tokens.size(0) &&
                    list->size(0) >= 1 && list->is_contiguous() && list->device() == query.device(),
                op, ": tokens, low and last are ", s.tokens.scalar_type(), " ", s.tokens.sizes(), ", ",
                s.low.scalar_type(), " ", s.low.sizes(), " and ", s.last.scalar_type(), " ", s.last.sizes(),
                "; they must be contiguous int32 [rows], at least one, on the queries' device");
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && query.size(0) == key.size(0) &&
                  query.size(2) == key.size(2) && query.scalar_type() == key.scalar_type() &&
                  query.is_floating_point() && key.device() == query.device() && key.size(1) >= 1,
              op, ": query is ", query.scalar_type(), " ", query.sizes(), ", key ", key.scalar_type(), " ",
              key.sizes(), "; they must be [tokens, heads, dim] of one dtype, device, token count and dim");
  TORCH_CHECK(s.first_key >= 0 && s.first_key < query.size(0) && s.width >= 1, op, ": a strip of ", s.width,
              " columns from key ", s.first_key, " on does not fit ", query.size(0), " tokens");
}

void check_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                const QueryStrip& strip, int64_t groups) {
  const char* op = "spot::attention_mass";
  check_strip(op, strip, query, key);
  TORCH_CHECK(query.size(1) % key.size(1) == 0 && groups >= 1 && key.size(1) % groups == 0, op, ": ",
              query.size(1), " query heads, ", key.size(1), " key heads and ", groups,
              " groups; each must divide the one before");
  TORCH_CHECK(logsumexp.dim() == 2 && logsumexp.size(0) == query.size(1) &&
                  logsumexp.size(1) == query.size(0) &&
                  (logsumexp.scalar_type() == at::kFloat || logsumexp.scalar_type() == at::kDouble) &&
                  logsumexp.device() == query.device(),
              op, ": logsumexp is ", logsumexp.scalar_type(), " ", logsumexp.sizes(),
              "; it must be float32 or float64 [", query.size(1), ", ", query.size(0), "]");
}

void check_kl(const at::Tensor& mass, const at::Tensor& total, const at::Tensor& query, const at::Tensor& key,
              const at::Tensor& weight, const QueryStrip& strip, int64_t k_train,
              const at::Tensor& grad_key) {
  const char* op = "spot::selector_kl";
  TORCH_CHECK(k_train >= 0, op, ": k_train is ", k_train, "; it must not be negative");
  check_strip(op, strip, query, key);
  TORCH_CHECK(key.size(1) == 1 || key.size(1) == query.size(1), op, ": key has ", key.size(1),
              " heads; it must have 1, or the query's ", query.size(1));
  TORCH_CHECK((mass.scalar_type() == at::kFloat || mass.scalar_type() == at::kDouble) && mass.dim() == 2 &&
                  mass.size(0) == strip.tokens.size(0) && mass.size(1) == strip.width &&
                  mass.is_contiguous() && mass.device() == query.device(),
              op, ": mass is ", mass.scalar_type(), " ", mass.sizes(),
              "; it must be contiguous float32 or float64 [", strip.tokens.size(0), ", ", strip.width, "]");
  TORCH_CHECK(total.scalar_type() == mass.scalar_type() && total.dim() == 1 &&
                  total.size(0) == mass.size(0) && total.is_contiguous() && total.device() == query.device(),
              op, ": total is ", total.scalar_type(), " ", total.sizes(), "; it must be contiguous ",
              mass.scalar_type(), " [", mass.size(0), "]");
  TORCH_CHECK(weight.scalar_type() == mass.scalar_type() && weight.dim() == 2 &&
                  weight.size(0) == query.size(0) && weight.size(1) == query.size(1) &&
                  weight.device() == query.device(),
              op, ": weight is ", weight.scalar_type(), " ", weight.sizes(), "; it must be ",
              mass.scalar_type(), " [", query.size(0), ", ", query.size(1), "]");
  TORCH_CHECK(!grad_key.defined() || (grad_key.scalar_type() == mass.scalar_type() && grad_key.dim() == 3 &&
                                      grad_key.size(0) == key.size(1) && grad_key.size(1) == key.size(0) &&
                                      grad_key.size(2) == key.size(2) && grad_key.device() == query.device()),
              op, ": grad_key is ", grad_key.defined() ? grad_key.scalar_type() : at::kFloat, " ",
              grad_key.defined() ? grad_key.sizes() : at::IntArrayRef{}, "; it must be ", mass.scalar_type(),
              " [", key.size(1), ", ", key.size(0), ", ", key.size(2), "]");
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

MassOutputs mass_by_tensors(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                            const QueryStrip& s, double scale, int64_t groups) {
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

KlOutputs kl_by_tensors(const at::Tensor& mass, const at::Tensor& total, const at::Tensor& query,
                        const at::Tensor& key, const at::Tensor& weight, const QueryStrip& s, int64_t k_train,
                        at::Tensor grad_key) {
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

template <bool kFused>
MassOutputs mass_op(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                    const at::Tensor& tokens, const at::Tensor& low, const at::Tensor& last,
                    int64_t first_key, int64_t width, double scale, int64_t groups) {
  const QueryStrip strip{tokens, low, last, first_key, width};
  check_mass(query, key, logsumexp, strip, groups);
#ifdef SPOT_CUDA
  if constexpr (kFused)
    if (fuses_mass(query, key)) {
      const AttentionMass out = cuda::attention_mass(query, key, logsumexp, strip, scale, groups);
      return {out.mass, out.total};
    }
#endif
  return mass_by_tensors(query, key, logsumexp, strip, scale, groups);
}

template <bool kFused>
KlOutputs kl_op(at::Tensor mass, const at::Tensor& total, const at::Tensor& query, const at::Tensor& key,
                const at::Tensor& weight, const at::Tensor& tokens, const at::Tensor& low,
                const at::Tensor& last, int64_t first_key, int64_t k_train, const MaybeTensor& grad_key) {
  const QueryStrip strip{tokens, low, last, first_key, mass.dim() == 2 ? mass.size(1) : 0};
  const at::Tensor grad = grad_key.value_or(at::Tensor());
  check_kl(mass, total, query, key, weight, strip, k_train, grad);
#ifdef SPOT_CUDA
  if constexpr (kFused)
    if (fuses_kl(query, key) && mass.scalar_type() == at::kFloat) {
      const SelectorKl out = cuda::selector_kl(mass, total, query, key, weight, strip, k_train, grad);
      return {out.loss, out.entropy, out.grad_query, out.grad_weight};
    }
#endif
  return kl_by_tensors(mass, total, query, key, weight, strip, k_train, grad);
}

template <auto Function>
const auto& handle(const char* name) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(name, "")
                             .typed<std::remove_pointer_t<decltype(Function)>>();
  return op;
}

// Whether rows are 16-byte pieces, as the kernels copy them.
[[maybe_unused]] bool in_pieces(const at::Tensor& x) {
  return x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

}  // namespace

bool fuses_mass(const at::Tensor& query, const at::Tensor& key) {
#ifdef SPOT_CUDA
  const int64_t dim = query.size(2);
  return query.is_cuda() && (query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf) &&
         (dim == 64 || dim == 128 || dim == 256) && in_pieces(query) && in_pieces(key);
#else
  return false;
#endif
}

bool fuses_kl(const at::Tensor& query, const at::Tensor& key) {
#ifdef SPOT_CUDA
  return query.is_cuda() && query.scalar_type() == at::kBFloat16 && query.size(1) == 4 &&
         query.size(2) == 128 && in_pieces(query) && in_pieces(key);
#else
  return false;
#endif
}

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.def(
      "attention_mass(Tensor query, Tensor key, Tensor logsumexp, Tensor tokens, Tensor low, Tensor last, "
      "int first_key, int width, float scale, int groups=1) -> (Tensor mass, Tensor total)");
  library.def(
      "selector_kl(Tensor(a!) mass, Tensor total, Tensor query, Tensor key, Tensor weight, Tensor tokens, "
      "Tensor low, Tensor last, int first_key, int k_train=0, Tensor(b!)? grad_key=None) -> "
      "(Tensor loss, Tensor entropy, Tensor grad_query, Tensor grad_weight)");
}

TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  library.impl("attention_mass", mass_op<false>);
  library.impl("selector_kl", kl_op<false>);
}

#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  library.impl("attention_mass", mass_op<true>);
  library.impl("selector_kl", kl_op<true>);
}
#endif

AttentionMass attention_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& logsumexp,
                             const QueryStrip& strip, double scale, int64_t groups) {
  auto [mass, total] = handle<mass_op<false>>("spot::attention_mass")
                           .call(query, key, logsumexp, strip.tokens, strip.low, strip.last, strip.first_key,
                                 strip.width, scale, groups);
  return {mass, total};
}

SelectorKl selector_kl(at::Tensor mass, const at::Tensor& total, const at::Tensor& query,
                       const at::Tensor& key, const at::Tensor& weight, const QueryStrip& strip,
                       int64_t k_train, at::Tensor grad_key) {
  auto [loss, entropy, grad_query, grad_weight] =
      handle<kl_op<false>>("spot::selector_kl")
          .call(mass, total, query, key, weight, strip.tokens, strip.low, strip.last, strip.first_key,
                k_train, grad_key.defined() ? MaybeTensor(grad_key) : std::nullopt);
  return {loss, entropy, grad_query, grad_weight};
}

}  // namespace spot::ops
