#include "ops/linear/linear.h"

#include "ops/checks.h"

namespace spot::ops {

void Linear::check() const {
  const char* op = "spot::linear";
  const auto dtype = x.scalar_type();
  const bool codes = weight.scalar_type() == at::kFloat8_e4m3fn;
  TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1 &&
                  (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf),
              op, ": x is ", dtype, " ", x.sizes(),
              "; it must be float32, bfloat16 or float16 [tokens, in], rows contiguous");
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(1) &&
                  (codes || weight.scalar_type() == dtype),
              op, ": the weight is ", weight.scalar_type(), " ", weight.sizes(), "; it must be contiguous ",
              dtype, " or float8_e4m3fn [out, ", x.size(1), "]");
  TORCH_CHECK(y.dim() == 2 && y.stride(1) == 1 && y.scalar_type() == dtype && y.size(0) == x.size(0) &&
                  y.size(1) == weight.size(0),
              op, ": y is ", y.scalar_type(), " ", y.sizes(), "; it must be ", dtype, " [", x.size(0), ", ",
              weight.size(0), "], rows contiguous");
  TORCH_CHECK(codes == scales.defined(), op, ": scales come with float8_e4m3fn weights, and only with them");
  TORCH_CHECK(!codes || (scales.scalar_type() == at::kFloat && scales.is_contiguous() && scales.dim() == 2 &&
                         scales.size(0) == (weight.size(0) + 127) / 128 &&
                         scales.size(1) == (weight.size(1) + 127) / 128),
              op, ": the scales must be contiguous float32 [", (weight.size(0) + 127) / 128, ", ",
              (weight.size(1) + 127) / 128, "], one for each 128 x 128 codes");
  TORCH_CHECK(!bias.defined() || (bias.scalar_type() == dtype && bias.dim() == 1 && bias.is_contiguous() &&
                                  bias.size(0) == weight.size(0)),
              op, ": the bias must be contiguous ", dtype, " [", weight.size(0), "]");
  check_devices(op, x, {&weight, &y, &scales, &bias});
}

namespace aten {
decltype(ops::linear) linear;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::linear) linear;
}  // namespace cuda
#endif
namespace {
namespace fake {

void linear(const Linear&) {}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<Linear>(library);
}
TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  implement<aten::linear>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::linear>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::linear>(library);
}
#endif

void linear(const Linear& arguments) {
  call(arguments);
}

}  // namespace spot::ops
