// Tensors to the pointers of the layer's kernels, on the current stream; what they do not take goes to the ATen form.
// Launches may begin while their predecessor drains; nothing waits for the device.
#include <tuple>
#include <utility>

#include "kernels/attention_prologue.h"
#include "kernels/gated_product.h"
#include "kernels/rms_norm.h"
#include "kernels/rotate_heads.h"
#include "ops/cuda/append_params.h"
#include "ops/cuda/call.h"
#include "ops/cuda/rotate_heads.h"
#include "ops/layer/layer.h"

namespace spot::ops {

namespace aten {
decltype(ops::rms_norm) rms_norm;
decltype(ops::gated_product) gated_product;
decltype(ops::attention_prologue) attention_prologue;
decltype(ops::selector_prologue) selector_prologue;
}  // namespace aten

namespace cuda {
namespace {

bool has_kernels(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

}  // namespace

at::Tensor rms_norm(const RmsNorm& a) {
  const auto& [x, factor, epsilon] = a;
  if (!has_kernels(x)) return aten::rms_norm(a);
  const c10::DeviceGuard guard(x.device());
  const at::Tensor rows = x.dim() == 2 && x.stride(1) == 1 ? x : x.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  kernels::RmsNormParams params;
  params.type = data_type(x);
  params.num_rows = x.numel() / x.size(-1);
  params.width = narrow(x.size(-1));
  params.x = rows.const_data_ptr();
  params.x_stride = rows.dim() == 2 ? rows.stride(0) : x.size(-1);
  params.factor = factor.const_data_ptr();
  params.factor_type = data_type(factor);
  params.epsilon = static_cast<float>(epsilon);
  params.y = y.mutable_data_ptr();
  params.overlap = kernels::Overlap::kLaunch;
  check(kernels::rms_norm(params, native_stream(x)), "spot::rms_norm");
  return y;
}

bool rotation_fits(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                   const at::Tensor& sin) {
  const auto in_fours = [](const at::Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (4 * t.element_size()) == 0;
  };
  return has_kernels(x) && x.stride(2) == 1 && x.stride(0) % 4 == 0 && x.stride(1) % 4 == 0 &&
         x.size(1) >= 1 && x.size(2) % 4 == 0 && cos.size(1) % 4 == 0 && cos.size(1) >= 4 &&
         2 * cos.size(1) <= x.size(2) && in_fours(x) && in_fours(cos) && in_fours(sin) &&
         cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat && cos.is_contiguous() &&
         sin.is_contiguous() && cos.device() == x.device() && sin.device() == x.device() &&
         positions.device() == x.device() && positions.scalar_type() == at::kLong &&
         positions.is_contiguous() && positions.numel() == x.size(0);
}

at::Tensor rotate_heads(const at::Tensor& x, const at::Tensor& positions, const at::Tensor& cos,
                        const at::Tensor& sin, bool backwards) {
  const c10::DeviceGuard guard(x.device());
  at::Tensor y = at::empty(x.sizes(), x.options());
  kernels::RotateHeadsParams params;
  params.type = data_type(x);
  params.num_tokens = x.size(0);
  params.num_heads = narrow(x.size(1));
  params.dim = narrow(x.size(2));
  params.half = narrow(cos.size(1));
  params.x = x.const_data_ptr();
  params.x_token_stride = x.stride(0);
  params.x_head_stride = x.stride(1);
  params.positions = positions.const_data_ptr<int64_t>();
  params.cos = cos.const_data_ptr<float>();
  params.sin = sin.const_data_ptr<float>();
  params.backwards = backwards;
  params.y = y.mutable_data_ptr();
  check(kernels::rotate_heads(params, native_stream(x)), "rotate_heads");
  return y;
}

at::Tensor gated_product(const GatedProduct& a) {
  const auto& [gate, x, activation] = a;
  if (!has_kernels(x)) return aten::gated_product(a);
  const c10::DeviceGuard guard(x.device());
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const bool heads = x.dim() == 3;
  kernels::GatedProductParams params;
  params.type = data_type(x);
  params.activation = activation == "silu" ? kernels::Activation::kSilu : kernels::Activation::kSigmoid;
  params.num_rows = x.size(0);
  params.num_heads = heads ? narrow(x.size(1)) : 1;
  params.width = narrow(x.size(-1));
  params.gate = gate.const_data_ptr();
  params.x = x.const_data_ptr();
  params.gate_row_stride = gate.stride(0);
  params.gate_head_stride = heads ? gate.stride(1) : 0;
  params.x_row_stride = x.stride(0);
  params.x_head_stride = heads ? x.stride(1) : 0;
  params.y = y.mutable_data_ptr();
  params.overlap = kernels::Overlap::kLaunch;
  check(kernels::gated_product(params, native_stream(x)), "spot::gated_product");
  return y;
}

namespace {

// A selector's share of the kernel's work; what it fills, [T, 4, 128] and [T, groups * 4]. `append` has dense tensors.
std::pair<at::Tensor, at::Tensor> add_selector(kernels::AttentionPrologueParams& params,
                                               const SelectorPrologue& s, const SelectorKeyAppend& append) {
  const int64_t tokens = s.projected.size(0);
  const auto options = s.projected.options();
  at::Tensor query = at::empty({tokens, kernels::kSelectorHeads, kernels::kKeyDim}, options);
  at::Tensor weight = at::empty({tokens, s.mix.size(0)}, options.dtype(at::kFloat));
  params.selector_queries = s.projected.const_data_ptr();
  params.selector_token_stride = s.projected.stride(0);
  params.selector_query = query.mutable_data_ptr();
  params.selector_keys = append_params(append);
  params.hidden = s.hidden.const_data_ptr();
  params.hidden_stride = s.hidden.stride(0);
  params.hidden_size = narrow(s.hidden.size(1));
  params.mix = s.mix.const_data_ptr<float>();
  params.mix_rows = narrow(s.mix.size(0));
  params.mix_scale = static_cast<float>(s.mix_scale);
  params.selector_weight = weight.mutable_data_ptr<float>();
  return {query, weight};
}

}  // namespace

SelectorPrologueAlone::Result selector_prologue(const SelectorPrologueAlone& a) {
  const SelectorPrologue& s = a.selector;
  if (!has_kernels(s.projected) || s.projected.stride(0) % 2 != 0 || s.hidden.stride(0) % 2 != 0 ||
      s.hidden.size(1) % 2 != 0)
    return aten::selector_prologue(a);
  const c10::DeviceGuard guard(s.projected.device());
  const at::Tensor slots = a.slots.contiguous();
  at::Tensor positions = s.preparation.positions;
  if (positions.defined()) positions = positions.contiguous();
  kernels::AttentionPrologueParams params;
  params.type = data_type(s.projected);
  params.num_tokens = s.projected.size(0);
  const auto [query, weight] = add_selector(params, s, selector_append(s, slots, positions));
  params.overlap = kernels::Overlap::kLaunch;
  if (params.num_tokens > 0)
    check(kernels::attention_prologue(params, native_stream(s.projected)), "spot::selector_prologue");
  return {query, weight.unflatten(1, {-1, kernels::kSelectorHeads})};
}

AttentionPrologue::Result attention_prologue(const AttentionPrologue& a) {
  const bool even_pools =
      !a.key_pool.defined() ||
      (a.key_pool.stride(0) % 2 == 0 && a.key_pool.stride(1) % 2 == 0 && a.key_pool.stride(2) % 2 == 0);
  if (!has_kernels(a.projected) || a.head_dim % 2 != 0 || a.head_dim > kernels::kMaxHeadDim ||
      a.projected.stride(0) % 2 != 0 || !even_pools)
    return aten::attention_prologue(a);
  const c10::DeviceGuard guard(a.projected.device());
  const int64_t tokens = a.projected.size(0), dim = a.head_dim;
  const auto options = a.projected.options();
  AttentionPrologue::Result out;
  out.query = at::empty({tokens, a.num_heads, dim}, options);
  out.key = at::empty({tokens, a.num_kv_heads, dim}, options);
  out.value = at::empty_like(out.key);
  AttentionPrologue dense = a;
  dense.positions = a.positions.contiguous();
  if (a.slots.defined()) dense.slots = a.slots.contiguous();
  kernels::AttentionPrologueParams params;
  params.type = data_type(a.projected);
  params.num_tokens = tokens;
  params.num_heads = narrow(a.num_heads);
  params.num_kv_heads = narrow(a.num_kv_heads);
  params.head_dim = narrow(dim);
  params.projected = a.projected.const_data_ptr();
  params.token_stride = a.projected.stride(0);
  params.query_head_stride = (a.output_gate ? 2 : 1) * dim;
  params.key_offset = a.num_heads * params.query_head_stride;
  params.value_offset = params.key_offset + a.num_kv_heads * dim;
  if (a.qk_norm.defined()) params.qk_norm = a.qk_norm.const_data_ptr<float>();
  params.norm_epsilon = static_cast<float>(a.norm_eps);
  params.rope_cos = a.cos.const_data_ptr<float>();
  params.rope_sin = a.sin.const_data_ptr<float>();
  params.rotary_pairs = narrow(a.cos.size(1));
  params.positions = dense.positions.const_data_ptr<int64_t>();
  params.query = out.query.mutable_data_ptr();
  params.key = out.key.mutable_data_ptr();
  params.value = out.value.mutable_data_ptr();
  if (a.key_pool.defined()) {
    params.key_pool = a.key_pool.mutable_data_ptr();
    params.value_pool = a.value_pool.mutable_data_ptr();
    params.e4m3 = a.key_pool.scalar_type() == at::kFloat8_e4m3fn;
    if (a.key_scale.defined()) params.key_scales = a.key_scale.const_data_ptr<float>();
    if (a.value_scale.defined()) params.value_scales = a.value_scale.const_data_ptr<float>();
    params.pool_head_stride = a.key_pool.stride(0);
    params.pool_page_stride = a.key_pool.stride(1);
    params.pool_token_stride = a.key_pool.stride(2);
    params.slots = dense.slots.const_data_ptr<int64_t>();
  }
  const SelectorPrologue& s = a.selector;
  out.selector_query = at::empty({0}, options);
  out.selector_weight = at::empty({0}, options.dtype(at::kFloat));
  if (s.projected.defined())
    std::tie(out.selector_query, out.selector_weight) =
        add_selector(params, s, selector_append(s, dense.slots, dense.positions));
  params.overlap = kernels::Overlap::kLaunch;
  if (tokens > 0)
    check(kernels::attention_prologue(params, native_stream(a.projected)), "spot::attention_prologue");
  return out;
}

}  // namespace cuda
}  // namespace spot::ops
