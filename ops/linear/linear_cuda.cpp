// Tensors to the pointers of the linear kernels; what they do not take goes to the ATen form.
#include "kernels/decode_blocks.h"
#include "kernels/narrow_linear.h"
#include "ops/cuda/call.h"
#include "ops/linear/linear.h"

namespace spot::ops {

namespace aten {
decltype(ops::linear) linear;
}  // namespace aten

namespace cuda {
namespace {

bool aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

bool has_kernels(const Linear& a) {
  return (a.x.scalar_type() == at::kBFloat16 || a.x.scalar_type() == at::kHalf) && a.weight.numel() > 0 &&
         a.x.size(1) % (a.scales.defined() ? 16 : 8) == 0 && aligned(a.weight);
}

at::Tensor decoded(const Linear& a) {
  at::Tensor weight = at::empty(a.weight.sizes(), a.x.options());
  kernels::DecodeBlocksParams params;
  params.type = data_type(a.x);
  params.rows = a.weight.size(0);
  params.width = a.weight.size(1);
  params.codes = a.weight.const_data_ptr();
  params.scales = a.scales.const_data_ptr<float>();
  params.y = weight.mutable_data_ptr();
  params.overlap = kernels::Overlap::kLaunch;
  check(kernels::decode_blocks(params, native_stream(a.x)), "spot::linear");
  return weight;
}

}  // namespace

void linear(const Linear& a) {
  if (!has_kernels(a)) return aten::linear(a);
  const c10::DeviceGuard guard(a.x.device());
  if (a.x.size(0) > kernels::kNarrowRows || a.x.stride(0) % 8 != 0 || !aligned(a.x)) {
    Linear plain = a;
    if (a.scales.defined()) plain.weight = decoded(a), plain.scales = at::Tensor();
    return aten::linear(plain);
  }
  kernels::NarrowLinearParams params;
  params.type = data_type(a.x);
  params.e4m3 = a.scales.defined();
  params.num_rows = narrow(a.x.size(0));
  params.width = narrow(a.x.size(1));
  params.out = narrow(a.weight.size(0));
  params.x = a.x.const_data_ptr();
  params.x_stride = a.x.stride(0);
  params.weight = a.weight.const_data_ptr();
  params.scales = a.scales.defined() ? a.scales.const_data_ptr<float>() : nullptr;
  params.bias = a.bias.defined() ? a.bias.const_data_ptr() : nullptr;
  params.y = a.y.mutable_data_ptr();
  params.y_stride = a.y.stride(0);
  params.accumulate = a.accumulate;
  // Weights are never written while steps run.
  params.overlap = kernels::Overlap::kHistory;
  check(kernels::narrow_linear(params, native_stream(a.x)), "spot::linear");
}

}  // namespace cuda
}  // namespace spot::ops
