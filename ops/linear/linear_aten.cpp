// By ATen's operators, on every device.
#include "ops/linear/linear.h"

namespace spot::ops {

at::Tensor decode_blocks(const at::Tensor& codes, const at::Tensor& scales, at::ScalarType dtype) {
  constexpr int64_t kBlock = 128;
  const int64_t rows = codes.size(0), width = codes.size(1);
  at::Tensor decoded = at::empty({rows, width}, codes.options().dtype(dtype));
  for (int64_t first = 0; first < rows; first += kBlock) {  // so that float32 numbers are few at a time
    const int64_t count = std::min(kBlock, rows - first);
    const at::Tensor factors = scales.select(0, first / kBlock).repeat_interleave(kBlock).narrow(0, 0, width);
    decoded.narrow(0, first, count).copy_(codes.narrow(0, first, count).to(at::kFloat).mul_(factors));
  }
  return decoded;
}

namespace aten {

// Codes are decoded in x's dtype, rounded once more than the kernel's.
void linear(const Linear& a) {
  const at::Tensor weight =
      a.scales.defined() ? decode_blocks(a.weight, a.scales, a.x.scalar_type()) : a.weight;
  at::Tensor y = a.y;
  if (a.accumulate) {
    if (a.bias.defined()) y.add_(a.bias);
    y.addmm_(a.x, weight.t());
  } else if (a.bias.defined()) {
    at::addmm_out(y, a.bias, a.x, weight.t());
  } else {
    at::mm_out(y, a.x, weight.t());
  }
}

}  // namespace aten
}  // namespace spot::ops
