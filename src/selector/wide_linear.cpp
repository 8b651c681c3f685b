#include "selector/wide_linear.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

namespace spot {
namespace {

constexpr int64_t kPieces = 3;  // of 8 bits each

// [kPieces, ...] bfloat16, of decreasing size; they add up to x but for its last bit.
at::Tensor pieces(const at::Tensor& x) {
  at::Tensor rest = x;
  std::vector<at::Tensor> all;
  for (int64_t i = 0; i < kPieces; ++i) {
    if (i > 0) rest = rest - all.back();
    all.push_back(rest.to(at::kBFloat16));
  }
  return at::stack(all);
}

// bfloat16 by bfloat16, added up and returned in float32.
at::Tensor product(const at::Tensor& a, const at::Tensor& b) {
  return a.is_cuda() ? at::mm(a, b, at::kFloat) : at::mm(a.to(at::kFloat), b.to(at::kFloat));
}

class WideLinear : public torch::autograd::Function<WideLinear> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& weight) {
    context->save_for_backward({x, weight});
    const int64_t rows = weight.size(0);
    return product(x, pieces(weight).view({kPieces * rows, -1}).t()).view({-1, kPieces, rows}).sum(1);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    at::Tensor x_gradient, weight_gradient;
    if (context->needs_input_grad(0)) x_gradient = at::mm(gradients[0], weight).to(x.scalar_type());
    if (context->needs_input_grad(1)) {
      const at::Tensor columns = pieces(gradients[0].t()).view({kPieces * weight.size(0), -1});
      weight_gradient = product(columns, x).view({kPieces, weight.size(0), -1}).sum(0);
    }
    return {x_gradient, weight_gradient};
  }
};

}  // namespace

at::Tensor wide_linear(const at::Tensor& x, const at::Tensor& weight) {
  return WideLinear::apply(x, weight);
}

}  // namespace spot
