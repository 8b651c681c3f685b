// The Kullback-Leibler divergence of one tile of the distillation loss, and its derivative.
#pragma once

#include <ATen/ATen.h>

#include <limits>

namespace spot {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What a sum of masses is held above before something is divided by it.
inline double smallest_mass(at::ScalarType type) {
  return type == at::kDouble ? 1e-300 : 1e-37;
}

// KL over the entries of one tile, restricted to the k highest scores of each row (all, for k >= E), with or
// without a rest bucket; see LayerLossOptions. scores [R, G, E] with -inf outside the active set, mass [R, G,
// E] >= 0 with 0 there. Adds each row's KL to `loss` and returns its derivative with respect to scores,
// before any mean.
at::Tensor divergence(const at::Tensor& scores, const at::Tensor& mass, int64_t k, bool rest_bucket,
                      at::Tensor& loss);

}  // namespace spot
