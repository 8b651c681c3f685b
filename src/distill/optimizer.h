// AdamW over a selector's weights, with gradient clipping and a state that can be stored.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <memory>
#include <string>

#include "distill/train_config.h"
#include "selector/selector.h"

namespace spot {

class SelectorOptimizer {
 public:
  // Makes the selector's weights require gradients and gives them zero ones. Throws Error unless they are
  // float32 or float64: updates of 1e-3 vanish in bfloat16 weights.
  SelectorOptimizer(Selector& selector, const TrainConfig& config);
  ~SelectorOptimizer();

  // In the order of Selector::named_parameters().
  std::vector<at::Tensor> gradients() const;
  void zero_gradients();

  // Clips and applies the gradients. Returns their norm before clipping. Throws Error, changing nothing, when
  // a gradient is not finite.
  double step(double learning_rate);

  void save(const std::filesystem::path& path) const;
  // Throws Error when the file's tensors do not fit the selector.
  void load(const std::filesystem::path& path);

 private:
  struct Implementation;
  std::unique_ptr<Implementation> implementation_;
  std::vector<std::pair<std::string, at::Tensor>> parameters_;
  double clip_norm_;
};

}  // namespace spot
