#include "ops/distill/distill.h"

#include <algorithm>

#include "ops/checks.h"

namespace spot::ops {
namespace {

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

// The strip as wide as the map.
QueryStrip strip_of(const SelectorKl& a) {
  QueryStrip strip = a.strip;
  strip.width = a.mass.dim() == 2 ? a.mass.size(1) : 0;
  return strip;
}

}  // namespace

void TeacherMass::check() const {
  const char* op = "spot::teacher_mass";
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

void SelectorKl::check() const {
  const char* op = "spot::selector_kl";
  TORCH_CHECK(k_train >= 0, op, ": k_train is ", k_train, "; it must not be negative");
  const QueryStrip whole = strip_of(*this);
  const int64_t width = whole.width;
  check_strip(op, whole, query, key);
  TORCH_CHECK(key.size(1) == 1 || key.size(1) == query.size(1), op, ": key has ", key.size(1),
              " heads; it must have 1, or the query's ", query.size(1));
  TORCH_CHECK((mass.scalar_type() == at::kFloat || mass.scalar_type() == at::kDouble) && mass.dim() == 2 &&
                  mass.size(0) == strip.tokens.size(0) && mass.size(1) == width && mass.is_contiguous() &&
                  mass.device() == query.device(),
              op, ": mass is ", mass.scalar_type(), " ", mass.sizes(),
              "; it must be contiguous float32 or float64 [", strip.tokens.size(0), ", ", width, "]");
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

namespace {

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

namespace aten {
decltype(ops::teacher_mass) teacher_mass;
decltype(ops::selector_kl) selector_kl;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::teacher_mass) teacher_mass;
decltype(ops::selector_kl) selector_kl;
}  // namespace cuda
#endif

namespace {
namespace fake {

TeacherMass::Result teacher_mass(const TeacherMass& a) {
  const c10::SymInt rows = a.strip.tokens.sym_size(0);
  const auto options =
      a.query.options().dtype(a.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_symint({rows, a.groups, a.strip.width}, options),
          at::empty_symint({rows, a.groups}, options)};
}

SelectorKl::Result selector_kl(const SelectorKl& a) {
  const c10::SymInt rows = a.mass.sym_size(0);
  const auto options = a.mass.options();
  SelectorKl::Result result = {at::empty_symint({rows}, options), at::empty_symint({rows}, options),
                               at::empty({0}, options), at::empty({0}, options)};
  if (a.grad_key.defined()) {
    result.grad_query = at::empty_symint({rows, a.query.sym_size(1), a.query.sym_size(2)}, options);
    result.grad_weight = at::empty_symint({rows, a.query.sym_size(1)}, options);
  }
  return result;
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<TeacherMass>(library);
  define<SelectorKl>(library);
}
TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  implement<aten::teacher_mass>(library);
  implement<aten::selector_kl>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::teacher_mass>(library);
  implement<fake::selector_kl>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::teacher_mass>(library);
  implement<cuda::selector_kl>(library);
}
#endif

TeacherMass::Result teacher_mass(const TeacherMass& arguments) {
  return call(arguments);
}
SelectorKl::Result selector_kl(const SelectorKl& arguments) {
  return call(arguments);
}

}  // namespace spot::ops
