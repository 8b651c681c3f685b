#include "ops/layer/layer.h"

#include <utility>

#ifdef SPOT_CUDA
#include <torch/csrc/autograd/custom_function.h>

#include "ops/cuda/rotate_heads.h"
#endif
#include "ops/checks.h"

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
  if (positions.is_cpu() && positions.numel() > 0) {
    const auto [least, most] = at::aminmax(positions);
    TORCH_CHECK(least.item<int64_t>() >= 0 && most.item<int64_t>() < cos.size(0),
                "spot: positions reach from ", least.item<int64_t>(), " to ", most.item<int64_t>(),
                "; the rotary table has rows 0 to ", cos.size(0) - 1);
  }
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

void RmsNorm::check() const {
  const char* op = "spot::rms_norm";
  const auto dtype = x.scalar_type();
  TORCH_CHECK(
      x.dim() >= 1 && x.is_floating_point() && factor.dim() == 1 && factor.size(0) == x.size(-1) &&
          factor.is_contiguous() && (factor.scalar_type() == dtype || factor.scalar_type() == at::kFloat),
      op, ": x is ", dtype, " ", x.sizes(), ", the factor ", factor.scalar_type(), " ", factor.sizes(),
      "; the factor must be [", x.dim() > 0 ? x.size(-1) : 0, "], contiguous, of x's dtype or float32");
  check_devices(op, x, {&factor});
}

void GatedProduct::check() const {
  const char* op = "spot::gated_product";
  TORCH_CHECK(gate.sizes() == x.sizes() && (x.dim() == 2 || x.dim() == 3) && x.is_floating_point() &&
                  gate.scalar_type() == x.scalar_type() && gate.stride(-1) == 1 && x.stride(-1) == 1,
              op, ": gate is ", gate.scalar_type(), " ", gate.sizes(), ", x ", x.scalar_type(), " ",
              x.sizes(), "; they must have one dtype and one shape of 2 or 3 dims, the last contiguous");
  TORCH_CHECK(activation == "silu" || activation == "sigmoid", op, ": activation is \"", activation,
              "\"; it must be silu or sigmoid");
  check_devices(op, gate, {&x});
}

namespace {

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
  check_devices(op, a.projected,
                {&a.qk_norm, &a.cos, &a.sin, &a.positions, &a.key_pool, &a.value_pool, &a.slots, &a.key_scale,
                 &a.value_scale});
  const bool codes = a.key_pool.defined() && a.key_pool.scalar_type() == at::kFloat8_e4m3fn;
  check_scales(op, a.key_pool, a.num_kv_heads, a.key_scale, a.value_scale, /*one_for_all=*/false);
  if (!a.slots.defined()) return;
  check_slots(op, a.slots, tokens);
  if (!a.key_pool.defined()) return;
  const auto stored = codes ? at::kFloat8_e4m3fn : dtype;
  check_pool(op, "key_pool", a.key_pool, a.num_kv_heads, a.head_dim, stored);
  check_pool(op, "value_pool", a.value_pool, a.num_kv_heads, a.head_dim, stored);
  TORCH_CHECK(a.value_pool.sizes() == a.key_pool.sizes() && a.value_pool.strides() == a.key_pool.strides(),
              op, ": value_pool is ", a.value_pool.sizes(), " with strides ", a.value_pool.strides(),
              "; it must match key_pool, ", a.key_pool.sizes(), " with strides ", a.key_pool.strides());
}

void check_selector(const char* op, const SelectorPrologue& s, const at::Tensor& slots,
                    const at::Tensor& positions, int64_t tokens, at::ScalarType dtype) {
  TORCH_CHECK(s.hidden.defined() && s.mix.defined() && s.pool.defined(), op,
              ": a selector needs hidden, mix and selector_pool");
  check_key_pool(op, s.pool, s.format);
  const int64_t key_heads = s.pool.size(1);
  TORCH_CHECK(slots.defined(), op, ": a selector needs slots");
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
  check_devices(op, s.projected, {&slots, &s.hidden, &s.mix, &s.pool});
  const SelectorKeyAppend append = selector_append(s, slots, positions);
  append.preparation.check(op, append.keys);
}

}  // namespace

void AttentionPrologue::check() const {
  check_prologue(*this);
  if (selector.projected.defined()) {
    check_selector("spot::attention_prologue", selector, slots, positions, projected.size(0),
                   projected.scalar_type());
    check_devices("spot::attention_prologue", projected, {&selector.projected});
  }
}

void SelectorPrologueAlone::check() const {
  const char* op = "spot::selector_prologue";
  TORCH_CHECK(selector.projected.dim() == 2 && selector.projected.is_floating_point(), op,
              ": the projections are ", selector.projected.scalar_type(), " ", selector.projected.sizes(),
              "; they must be floating point [tokens, (4 + key_heads) * 128]");
  check_slots(op, slots, selector.projected.size(0));
  check_selector(op, selector, slots, selector.preparation.positions, selector.projected.size(0),
                 selector.projected.scalar_type());
}

SelectorKeyAppend selector_append(const SelectorPrologue& s, const at::Tensor& slots,
                                  const at::Tensor& positions) {
  const int64_t key_heads = s.pool.size(1), rows = key_heads * kernels::kKeyDim;
  KeyPreparation preparation = s.preparation;
  preparation.positions = preparation.cos.defined() ? positions : at::Tensor();
  return {s.pool,
          slots,
          s.projected.narrow(1, s.projected.size(1) - rows, rows).unflatten(1, {key_heads, kernels::kKeyDim}),
          s.format,
          s.global_scale,
          preparation};
}

namespace aten {
decltype(ops::rms_norm) rms_norm;
decltype(ops::gated_product) gated_product;
decltype(ops::attention_prologue) attention_prologue;
decltype(ops::selector_prologue) selector_prologue;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::rms_norm) rms_norm;
decltype(ops::gated_product) gated_product;
decltype(ops::attention_prologue) attention_prologue;
decltype(ops::selector_prologue) selector_prologue;
}  // namespace cuda
#endif

namespace {
namespace fake {

at::Tensor rms_norm(const RmsNorm& a) {
  return at::empty_symint(a.x.sym_sizes(), a.x.options());
}

at::Tensor gated_product(const GatedProduct& a) {
  return at::empty_symint(a.x.sym_sizes(), a.x.options());
}

AttentionPrologue::Result attention_prologue(const AttentionPrologue& a) {
  const c10::SymInt tokens = a.projected.sym_size(0);
  const auto options = a.projected.options();
  auto heads = [&](int64_t count) { return at::empty_symint({tokens, count, a.head_dim}, options); };
  AttentionPrologue::Result result = {heads(a.num_heads), heads(a.num_kv_heads), heads(a.num_kv_heads),
                                      at::empty({0}, options), at::empty({0}, options.dtype(at::kFloat))};
  if (a.selector.projected.defined()) {
    result.selector_query = at::empty_symint({tokens, kernels::kSelectorHeads, kernels::kKeyDim}, options);
    result.selector_weight =
        at::empty_symint({tokens, a.selector.mix.sym_size(0)}, options.dtype(at::kFloat));
  }
  return result;
}

SelectorPrologueAlone::Result selector_prologue(const SelectorPrologueAlone& a) {
  const SelectorPrologue& s = a.selector;
  const c10::SymInt tokens = s.projected.sym_size(0);
  return {at::empty_symint({tokens, kernels::kSelectorHeads, kernels::kKeyDim}, s.projected.options()),
          at::empty_symint({tokens, s.mix.sym_size(0) / kernels::kSelectorHeads, kernels::kSelectorHeads},
                           s.projected.options().dtype(at::kFloat))};
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<RmsNorm>(library);
  define<GatedProduct>(library);
  define<AttentionPrologue>(library);
  define<SelectorPrologueAlone>(library);
}
TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  implement<aten::rms_norm>(library);
  implement<aten::gated_product>(library);
  implement<aten::attention_prologue>(library);
  implement<aten::selector_prologue>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::rms_norm>(library);
  implement<fake::gated_product>(library);
  implement<fake::attention_prologue>(library);
  implement<fake::selector_prologue>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::rms_norm>(library);
  implement<cuda::gated_product>(library);
  implement<cuda::attention_prologue>(library);
  implement<cuda::selector_prologue>(library);
}
#endif

at::Tensor rms_norm(const RmsNorm& arguments) {
  return call(arguments);
}
at::Tensor gated_product(const GatedProduct& arguments) {
  return call(arguments);
}
AttentionPrologue::Result attention_prologue(const AttentionPrologue& arguments) {
  AttentionPrologue::Result result = call(arguments);
  if (!arguments.selector.projected.defined()) result.selector_query = result.selector_weight = at::Tensor();
  return result;
}
SelectorPrologueAlone::Result selector_prologue(const SelectorPrologueAlone& arguments) {
  return call(arguments);
}

}  // namespace spot::ops
