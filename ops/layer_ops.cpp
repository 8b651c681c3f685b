#include "ops/layer_ops.h"

#include <torch/library.h>

#include <tuple>

#include "ops/checks.h"
#ifdef SPOT_CUDA
#include <torch/csrc/autograd/custom_function.h>

#include "ops/cuda/layer_ops.h"
#endif

namespace spot::ops {

#ifdef SPOT_CUDA
namespace {

// By ATen a rotation and its gradient are two dozen passes over memory.
struct RotateHeads : torch::autograd::Function<RotateHeads> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& positions, const at::Tensor& cos, const at::Tensor& sin) {
    context->save_for_backward({positions, cos, sin});
    return cuda::rotate_heads(x, positions, cos, sin, false);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    return {cuda::rotate_heads(grads[0].contiguous(), saved[0], saved[1], saved[2], true), {}, {}, {}};
  }
};

}  // namespace
#endif

at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin) {
#ifdef SPOT_CUDA
  if (x.is_cuda() && cuda::rotation_fits(x, positions, cos, sin)) {
    if (at::GradMode::is_enabled() && x.requires_grad()) return RotateHeads::apply(x, positions, cos, sin);
    return cuda::rotate_heads(x, positions, cos, sin, false);
  }
#endif
  const int64_t half = cos.size(1), rest = x.size(2) - 2 * half;
  const at::Tensor c = cos.index_select(0, positions).unsqueeze(1).unsqueeze(1);  // [T, 1, 1, half]
  const at::Tensor s = sin.index_select(0, positions);
  const at::Tensor signed_sin = at::stack({s.neg(), s}, 1).unsqueeze(1);  // [T, 1, 2, half]
  const at::Tensor wide = x.to(at::kFloat);
  // [T, heads, 2, half]: (a, b) -> (a cos - b sin, b cos + a sin).
  const at::Tensor pairs = wide.narrow(2, 0, 2 * half).unflatten(2, {2, half});
  const at::Tensor rotated = at::addcmul(pairs * c, pairs.flip(2), signed_sin).flatten(2);
  return (rest == 0 ? rotated : at::cat({rotated, wide.narrow(2, 2 * half, rest)}, 2)).to(x.scalar_type());
}

namespace {

using MaybeTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

#ifdef SPOT_CUDA
bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}
#endif

void check_device(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* other : others)
    TORCH_CHECK(!other->defined() || other->device() == first.device(), op, ": tensors are on ",
                first.device(), " and on ", other->device(), "; they must share a device");
}

template <bool kFused>
at::Tensor rms_norm_op(const at::Tensor& x, const at::Tensor& factor, double epsilon) {
  const char* op = "spot::rms_norm";
  const auto dtype = x.scalar_type();
  TORCH_CHECK(
      x.dim() >= 1 && x.is_floating_point() && factor.dim() == 1 && factor.size(0) == x.size(-1) &&
          factor.is_contiguous() && (factor.scalar_type() == dtype || factor.scalar_type() == at::kFloat),
      op, ": x is ", dtype, " ", x.sizes(), ", the factor ", factor.scalar_type(), " ", factor.sizes(),
      "; the factor must be [", x.dim() > 0 ? x.size(-1) : 0, "], contiguous, of x's dtype or float32");
  check_device(op, x, {&factor});
#ifdef SPOT_CUDA
  if constexpr (kFused)
    if (has_kernels(dtype)) return cuda::rms_norm(x, factor, epsilon);
#endif
  if (factor.scalar_type() == dtype) return at::rms_norm(x, factor.sizes(), factor, epsilon);
  return at::rms_norm(x.to(at::kFloat), factor.sizes(), factor, epsilon).to(dtype);
}

template <bool kFused>
at::Tensor gated_product_op(const at::Tensor& gate, const at::Tensor& x, std::string activation) {
  const char* op = "spot::gated_product";
  TORCH_CHECK(gate.sizes() == x.sizes() && (x.dim() == 2 || x.dim() == 3) && x.is_floating_point() &&
                  gate.scalar_type() == x.scalar_type() && gate.stride(-1) == 1 && x.stride(-1) == 1,
              op, ": gate is ", gate.scalar_type(), " ", gate.sizes(), ", x ", x.scalar_type(), " ",
              x.sizes(), "; they must have one dtype and one shape of 2 or 3 dims, the last contiguous");
  TORCH_CHECK(activation == "silu" || activation == "sigmoid", op, ": activation is \"", activation,
              "\"; it must be silu or sigmoid");
  check_device(op, gate, {&x});
#ifdef SPOT_CUDA
  if constexpr (kFused)
    if (has_kernels(x.scalar_type())) return cuda::gated_product(gate, x, activation == "silu");
#endif
  return (activation == "silu" ? at::silu(gate) : at::sigmoid(gate)).mul_(x).contiguous();
}

void check_prologue(const AttentionPrologue& a) {
  const char* op = "spot::attention_prologue";
  const auto dtype = a.projected.scalar_type();
  const int64_t rows = (a.num_heads * (a.output_gate ? 2 : 1) + 2 * a.num_kv_heads) * a.head_dim;
  TORCH_CHECK(a.num_heads >= 1 && a.num_kv_heads >= 1 && a.head_dim >= 2 && a.projected.dim() == 2 &&
                  a.projected.size(1) == rows && a.projected.stride(1) == 1 &&
                  a.projected.is_floating_point(),
              op, ": the projections are ", dtype, " ", a.projected.sizes(),
              "; with these heads they must be floating point [tokens, ", rows, "]");
  const int64_t tokens = a.projected.size(0);
  TORCH_CHECK(
      !a.qk_norm.defined() ||
          (a.qk_norm.scalar_type() == at::kFloat && a.qk_norm.dim() == 2 && a.qk_norm.is_contiguous() &&
           a.qk_norm.size(0) == a.num_heads + a.num_kv_heads && a.qk_norm.size(1) == a.head_dim),
      op, ": qk_norm must be contiguous float32 [", a.num_heads + a.num_kv_heads, ", ", a.head_dim, "]");
  for (const at::Tensor* table : {&a.cos, &a.sin})
    TORCH_CHECK(table->scalar_type() == at::kFloat && table->dim() == 2 && table->is_contiguous() &&
                    table->sizes() == a.cos.sizes() && table->size(1) >= 1 &&
                    2 * table->size(1) <= a.head_dim,
                op, ": a rotary table is ", table->scalar_type(), " ", table->sizes(),
                "; it must be contiguous float32 [positions, at most ", a.head_dim / 2, "]");
  TORCH_CHECK(
      a.positions.dim() == 1 && a.positions.size(0) == tokens && a.positions.scalar_type() == at::kLong, op,
      ": positions are ", a.positions.scalar_type(), " ", a.positions.sizes(), "; they must be int64 [",
      tokens, "]");
  TORCH_CHECK(a.key_pool.defined() == a.value_pool.defined() && a.key_pool.defined() <= a.slots.defined(), op,
              ": key_pool, value_pool and slots must be given together");
  check_device(op, a.projected,
               {&a.qk_norm, &a.cos, &a.sin, &a.positions, &a.key_pool, &a.value_pool, &a.slots});
  if (!a.slots.defined()) return;
  TORCH_CHECK(a.slots.dim() == 1 && a.slots.size(0) == tokens && a.slots.scalar_type() == at::kLong, op,
              ": slots are ", a.slots.scalar_type(), " ", a.slots.sizes(), "; they must be int64 [", tokens,
              "]");
  for (const at::Tensor* pool : {&a.key_pool, &a.value_pool})
    TORCH_CHECK(!pool->defined() ||
                    (pool->scalar_type() == dtype && pool->dim() == 4 && pool->is_contiguous() &&
                     pool->size(0) == a.num_kv_heads && pool->size(2) == 16 && pool->size(3) == a.head_dim),
                op, ": a pool is ", pool->scalar_type(), " ", pool->sizes(), "; it must be contiguous ",
                dtype, " [", a.num_kv_heads, ", pages, 16, ", a.head_dim, "]");
}

void check_selector(const AttentionPrologue& a, const SelectorPrologue& s) {
  const char* op = "spot::attention_prologue";
  const int64_t tokens = a.projected.size(0), key_heads = s.pool.dim() == 3 ? s.pool.size(1) : 0;
  const auto dtype = a.projected.scalar_type();
  TORCH_CHECK(a.slots.defined(), op, ": a selector needs slots");
  TORCH_CHECK(s.pool.scalar_type() == at::kByte && s.pool.dim() == 3 && s.pool.is_contiguous() &&
                  (key_heads == 1 || key_heads == 4) && s.pool.size(2) == page_head_bytes(s.format),
              op, ": the selector's pool is ", s.pool.scalar_type(), " ", s.pool.sizes(), "; a ", s.format,
              " pool is contiguous uint8 [pages, 1 or 4, ", page_head_bytes(s.format), "]");
  TORCH_CHECK(s.projected.dim() == 2 && s.projected.size(0) == tokens &&
                  s.projected.size(1) == (4 + key_heads) * 128 && s.projected.stride(1) == 1 &&
                  s.projected.scalar_type() == dtype,
              op, ": the selector's projections are ", s.projected.scalar_type(), " ", s.projected.sizes(),
              "; they must be ", dtype, " [", tokens, ", ", (4 + key_heads) * 128, "]");
  TORCH_CHECK(s.hidden.dim() == 2 && s.hidden.size(0) == tokens && s.hidden.stride(1) == 1 &&
                  s.hidden.scalar_type() == dtype && s.mix.dim() == 2 && s.mix.size(1) == s.hidden.size(1) &&
                  s.mix.size(0) % 4 == 0 && s.mix.is_contiguous() && s.mix.scalar_type() == at::kFloat,
              op, ": hidden is ", s.hidden.scalar_type(), " ", s.hidden.sizes(), " and mix ",
              s.mix.scalar_type(), " ", s.mix.sizes(), "; they must be ", dtype, " [", tokens,
              ", hidden_size] and contiguous float32 [a multiple of 4, hidden_size]");
  check_device(op, a.projected, {&s.projected, &s.hidden, &s.mix, &s.pool});
}

Outputs prologue_by_tensors(const AttentionPrologue& a, const std::optional<SelectorPrologue>& s) {
  const auto dtype = a.projected.scalar_type();
  const int64_t dim = a.head_dim, kv_rows = a.num_kv_heads * dim;
  const int64_t query_rows = a.num_heads * dim * (a.output_gate ? 2 : 1);
  at::Tensor heads;  // [T, num_heads + num_kv_heads, head_dim]
  if (a.output_gate) {
    heads =
        at::cat({a.projected.narrow(1, 0, query_rows).unflatten(1, {a.num_heads, 2 * dim}).narrow(2, 0, dim),
                 a.projected.narrow(1, query_rows, kv_rows).unflatten(1, {a.num_kv_heads, dim})},
                1);
  } else {
    heads = a.projected.narrow(1, 0, query_rows + kv_rows).unflatten(1, {a.num_heads + a.num_kv_heads, dim});
  }
  heads = heads.to(at::kFloat);
  if (a.qk_norm.defined()) heads = at::rms_norm(heads, {dim}, {}, a.norm_eps) * a.qk_norm;
  heads = rotate_heads(heads, a.positions, a.cos, a.sin).to(dtype);
  const at::Tensor query = heads.narrow(1, 0, a.num_heads).contiguous(),
                   key = heads.narrow(1, a.num_heads, a.num_kv_heads).contiguous(),
                   value = a.projected.narrow(1, query_rows + kv_rows, kv_rows)
                               .unflatten(1, {a.num_kv_heads, dim})
                               .contiguous();
  if (a.key_pool.defined()) {
    a.key_pool.flatten(1, 2).index_copy_(1, a.slots, key.transpose(0, 1));
    a.value_pool.flatten(1, 2).index_copy_(1, a.slots, value.transpose(0, 1));
  }
  if (!s) return {query, key, value, {}, {}};
  const at::Tensor both = s->projected.unflatten(1, {4 + s->pool.size(1), 128});
  append_projected_keys(s->pool, a.slots, both.narrow(1, 4, s->pool.size(1)), s->preparation, s->format,
                        s->global_scale);
  const at::Tensor queries = both.narrow(1, 0, 4);
  return {query, key, value,
          s->preparation.cos.defined()
              ? rotate_heads(queries, a.positions, s->preparation.cos, s->preparation.sin)
              : queries.contiguous(),
          at::linear(s->hidden.to(at::kFloat), s->mix) * s->mix_scale};
}

template <bool kFused>
Outputs prologue_op(const at::Tensor& projected, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                    bool output_gate, const MaybeTensor& qk_norm, double norm_eps, const at::Tensor& cos,
                    const at::Tensor& sin, const at::Tensor& positions, const MaybeTensor& key_pool,
                    const MaybeTensor& value_pool, const MaybeTensor& slots,
                    const MaybeTensor& selector_projected, const MaybeTensor& hidden, const MaybeTensor& mix,
                    double mix_scale, std::string key_norm, const MaybeTensor& key_norm_weight,
                    const MaybeTensor& key_norm_bias, double key_norm_eps, const MaybeTensor& selector_cos,
                    const MaybeTensor& selector_sin, const MaybeTensor& selector_pool, std::string format,
                    double global_scale) {
  auto given = [](const MaybeTensor& x) { return x.value_or(at::Tensor()); };
  const AttentionPrologue a{projected,       num_heads,         num_kv_heads, head_dim, output_gate,
                            given(qk_norm),  norm_eps,          cos,          sin,      positions,
                            given(key_pool), given(value_pool), given(slots)};
  check_prologue(a);
  std::optional<SelectorPrologue> s;
  if (given(selector_projected).defined()) {
    TORCH_CHECK(given(hidden).defined() && given(mix).defined() && given(selector_pool).defined(),
                "spot::attention_prologue: a selector needs hidden, mix and selector_pool");
    s = SelectorPrologue{
        *selector_projected,
        *hidden,
        *mix,
        mix_scale,
        {parse_key_norm(key_norm), given(key_norm_weight), given(key_norm_bias), key_norm_eps,
         given(selector_cos), given(selector_sin), selector_cos ? positions : at::Tensor()},
        *selector_pool,
        format,
        global_scale};
    check_selector(a, *s);
    check_preparation(s->projected.unflatten(1, {4 + s->pool.size(1), 128}), s->preparation);
  }
#ifdef SPOT_CUDA
  if constexpr (kFused)
    if (has_kernels(projected.scalar_type()) && cuda::prologue_fits(a)) {
      PrologueOutputs out = cuda::attention_prologue(a, s);
      return {out.query, out.key, out.value, out.selector_query, out.selector_weight};
    }
#endif
  return prologue_by_tensors(a, s);
}

template <auto Function>
const auto& handle(const char* name) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow(name, "")
                             .typed<std::remove_pointer_t<decltype(Function)>>();
  return op;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.def("rms_norm(Tensor x, Tensor factor, float epsilon) -> Tensor");
  library.def("gated_product(Tensor gate, Tensor x, str activation) -> Tensor");
  library.def(
      "attention_prologue(Tensor projected, int num_heads, int num_kv_heads, int head_dim, bool output_gate, "
      "Tensor? qk_norm, float norm_eps, Tensor cos, Tensor sin, Tensor positions, Tensor(a!)? key_pool=None, "
      "Tensor(b!)? value_pool=None, Tensor? slots=None, Tensor? selector_projected=None, Tensor? hidden=None, "
      "Tensor? mix=None, float mix_scale=1.0, str key_norm='none', Tensor? key_norm_weight=None, "
      "Tensor? key_norm_bias=None, float key_norm_eps=1e-6, Tensor? selector_cos=None, "
      "Tensor? selector_sin=None, Tensor(c!)? selector_pool=None, str format='bf16', float global_scale=1.0) -> "
      "(Tensor query, Tensor key, Tensor value, Tensor selector_query, Tensor selector_weight)");
}

TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  library.impl("rms_norm", rms_norm_op<false>);
  library.impl("gated_product", gated_product_op<false>);
  library.impl("attention_prologue", prologue_op<false>);
}

#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  library.impl("rms_norm", rms_norm_op<true>);
  library.impl("gated_product", gated_product_op<true>);
  library.impl("attention_prologue", prologue_op<true>);
}
#endif

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& factor, double epsilon) {
  return handle<rms_norm_op<false>>("spot::rms_norm").call(x, factor, epsilon);
}

at::Tensor gated_product(const at::Tensor& gate, const at::Tensor& x, const std::string& activation) {
  return handle<gated_product_op<false>>("spot::gated_product").call(gate, x, activation);
}

PrologueOutputs attention_prologue(const AttentionPrologue& a,
                                   const std::optional<SelectorPrologue>& selector) {
  auto maybe = [](const at::Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; };
  const SelectorPrologue s = selector.value_or(SelectorPrologue{});
  const KeyPreparation& keys = s.preparation;
  auto [query, key, value, selector_query, selector_weight] =
      handle<prologue_op<false>>("spot::attention_prologue")
          .call(a.projected, a.num_heads, a.num_kv_heads, a.head_dim, a.output_gate, maybe(a.qk_norm),
                a.norm_eps, a.cos, a.sin, a.positions, maybe(a.key_pool), maybe(a.value_pool), maybe(a.slots),
                maybe(s.projected), maybe(s.hidden), maybe(s.mix), s.mix_scale, key_norm_name(keys.norm),
                maybe(keys.norm_weight), maybe(keys.norm_bias), keys.norm_eps, maybe(keys.cos),
                maybe(keys.sin), maybe(s.pool), s.format, s.global_scale);
  return {query, key, value, selector_query, selector_weight};
}

}  // namespace spot::ops
