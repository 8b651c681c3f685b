#include "distill/coverage.h"

#include "distill/divergence.h"

namespace spot {

void add_coverage(const at::Tensor& mass, const at::Tensor& scores, const at::Tensor& active,
                  int64_t block_size, const std::vector<double>& budgets, at::Tensor& covered,
                  at::Tensor& oracle) {
  const int64_t rows = mass.size(0), groups = mass.size(1), blocks = mass.size(2) / block_size;
  const at::Tensor total = mass.sum(-1, true).clamp_min(smallest_mass(mass.scalar_type()));  // [R, G, 1]
  const at::Tensor block_mass = mass.view({rows, groups, blocks, block_size}).sum(-1) / total;
  const at::Tensor block_score = scores.view({rows, groups, blocks, block_size}).amax(-1);
  const auto cumulative = [&](const at::Tensor& rank_by) {
    const at::Tensor order = std::get<1>(at::sort(rank_by, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
    return at::cumsum(block_mass.gather(-1, order), -1);
  };
  const at::Tensor student = cumulative(block_score), best = cumulative(block_mass);
  const at::Tensor tokens = active.to(at::kDouble);
  std::vector<at::Tensor> wanted;  // [R, 1] each
  for (double budget : budgets)
    wanted.push_back(budget < 1.0 ? tokens * budget : at::full_like(tokens, budget));
  const at::Tensor last = at::cat(wanted, -1)
                              .div_(static_cast<double>(block_size))
                              .ceil_()
                              .clamp_(1.0, static_cast<double>(blocks))
                              .sub_(1.0)
                              .to(at::kLong)
                              .unsqueeze(1)
                              .expand({-1, groups, -1});  // [R, G, budgets]
  covered += student.gather(-1, last).sum(at::IntArrayRef{0, 1}, false, at::kDouble);
  oracle += best.gather(-1, last).sum(at::IntArrayRef{0, 1}, false, at::kDouble);
}

}  // namespace spot
