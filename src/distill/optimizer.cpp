#include "distill/optimizer.h"

#include <ATen/core/grad_mode.h>
#include <torch/optim/adamw.h>

#include <cmath>

#include "checkpoint/safetensors.h"
#include "core/error.h"

namespace spot {

struct SelectorOptimizer::Implementation {
  explicit Implementation(std::vector<torch::optim::OptimizerParamGroup> groups,
                          const torch::optim::AdamWOptions& options)
      : adamw(std::move(groups), options) {}

  torch::optim::AdamWParamState& state(const at::Tensor& parameter) {
    return static_cast<torch::optim::AdamWParamState&>(*adamw.state().at(parameter.unsafeGetTensorImpl()));
  }
  bool has_state(const at::Tensor& parameter) {
    return adamw.state().count(parameter.unsafeGetTensorImpl()) > 0;
  }

  torch::optim::AdamW adamw;
};

SelectorOptimizer::SelectorOptimizer(Selector& selector, const TrainConfig& config)
    : parameters_(selector.named_parameters()), clip_norm_(config.clip_norm) {
  std::vector<at::Tensor> matrices, vectors;
  for (auto& [name, parameter] : parameters_) {
    if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kDouble)
      fail("distillation: selector weight {} is {}, it must be float32 to be trained", name,
           c10::toString(parameter.scalar_type()));
    parameter.requires_grad_(true);
    parameter.mutable_grad() = at::zeros_like(parameter);
    (parameter.dim() > 1 ? matrices : vectors).push_back(parameter);
  }
  const auto options =
      torch::optim::AdamWOptions(config.peak_lr).betas({config.beta1, config.beta2}).eps(config.epsilon);
  const auto group = [&](const std::vector<at::Tensor>& list, double weight_decay) {
    auto own = std::make_unique<torch::optim::AdamWOptions>(options);
    own->weight_decay(weight_decay);
    return torch::optim::OptimizerParamGroup(list, std::move(own));
  };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.push_back(group(matrices, config.weight_decay));
  if (!vectors.empty()) groups.push_back(group(vectors, 0.0));
  implementation_ = std::make_unique<Implementation>(std::move(groups), options);
}

SelectorOptimizer::~SelectorOptimizer() {
  for (auto& [name, parameter] : parameters_) {
    parameter.requires_grad_(false);
    parameter.mutable_grad().reset();
  }
}

std::vector<at::Tensor> SelectorOptimizer::gradients() const {
  std::vector<at::Tensor> list;
  for (const auto& [name, parameter] : parameters_) list.push_back(parameter.grad());
  return list;
}

void SelectorOptimizer::zero_gradients() {
  for (auto& [name, parameter] : parameters_) parameter.mutable_grad().zero_();
}

double SelectorOptimizer::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> squares;
  for (const auto& [name, parameter] : parameters_)
    squares.push_back(parameter.grad().square().sum(at::kDouble));
  const at::Tensor each = at::stack(squares).cpu();
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const double square = each[static_cast<int64_t>(i)].item<double>();
    if (!std::isfinite(square))
      fail("the gradient of {} is not finite; lower the learning rate or train in float32",
           parameters_[i].first);
  }
  const double norm = std::sqrt(each.sum().item<double>());
  if (clip_norm_ > 0.0 && norm > clip_norm_)
    for (auto& [name, parameter] : parameters_) parameter.mutable_grad().mul_(clip_norm_ / norm);
  for (auto& group : implementation_->adamw.param_groups()) group.options().set_lr(learning_rate);
  implementation_->adamw.step();
  return norm;
}

void SelectorOptimizer::save(const std::filesystem::path& path) const {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, parameter] : parameters_) {
    if (!implementation_->has_state(parameter)) continue;  // no step was taken yet
    auto& state = implementation_->state(parameter);
    tensors.emplace_back(name + ".step", at::scalar_tensor(static_cast<int64_t>(state.step()), at::kLong));
    tensors.emplace_back(name + ".exp_avg", state.exp_avg());
    tensors.emplace_back(name + ".exp_avg_sq", state.exp_avg_sq());
  }
  write_safetensors(path, tensors, {{"format", "spotattention-optimizer"}});
}

void SelectorOptimizer::load(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  auto& states = implementation_->adamw.state();
  states.clear();
  if (file.names().empty()) return;
  for (const auto& [name, parameter] : parameters_) {
    const auto take = [&, &name = name, &parameter = parameter](const char* part) {
      const at::Tensor tensor = file.tensor(name + part);
      if (tensor.sizes() != parameter.sizes() || tensor.scalar_type() != parameter.scalar_type())
        fail("{}: {}{} does not fit the selector; the checkpoint belongs to another run", path.string(), name,
             part);
      return tensor.to(parameter.device(), parameter.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
    };
    auto state = std::make_unique<torch::optim::AdamWParamState>();
    state->step(file.tensor(name + ".step").item<int64_t>());
    state->exp_avg(take(".exp_avg"));
    state->exp_avg_sq(take(".exp_avg_sq"));
    states[parameter.unsafeGetTensorImpl()] = std::move(state);
  }
}

}  // namespace spot
