// How much of the teacher's mass a budget of blocks captures, chosen by the student and at best.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

namespace spot {

// Adds to covered and oracle [budgets] float64, summed over rows and groups, the share of each row's mass
// inside the blocks with the highest block score, and inside those with the most mass. mass [R, G, E] >= 0
// and scores [R, G, E] (-inf outside the active set), E a multiple of block_size; active [R, 1] int64 counts
// active tokens; budgets as in LayerLossOptions.
void add_coverage(const at::Tensor& mass, const at::Tensor& scores, const at::Tensor& active,
                  int64_t block_size, const std::vector<double>& budgets, at::Tensor& covered,
                  at::Tensor& oracle);

}  // namespace spot
