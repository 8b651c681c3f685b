// Block selection on the CPU: kernels/select_reference.h over the rows.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/select_reference.h"
#include "ops/cpu/cpu_ops.h"

namespace spot::ops::cpu {

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(const at::Tensor& scores,
                                                             const at::Tensor& lengths,
                                                             const SelectArguments& arguments) {
  const int64_t rows = scores.size(0), groups = scores.size(1), blocks = scores.size(2);
  const at::Tensor dense = scores.contiguous(), visible = lengths.contiguous();
  const float* score_data = dense.const_data_ptr<float>();
  const int32_t* length_data = visible.const_data_ptr<int32_t>();
  kernels::SelectParams params;
  params.mode = arguments.top_p ? kernels::SelectMode::kTopP : kernels::SelectMode::kTopK;
  params.sink_tokens = static_cast<int32_t>(arguments.sinks);
  params.recency_tokens = static_cast<int32_t>(arguments.recency);
  params.min_tokens = static_cast<int32_t>(arguments.floor);
  params.max_tokens = static_cast<int32_t>(arguments.cap);
  params.top_p = static_cast<float>(arguments.p);
  params.temperature = static_cast<float>(arguments.temperature);
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK(length_data[row] >= 0 && length_data[row] <= blocks * kernels::kPageTokens,
                "spot::select_blocks: length ", length_data[row], " of row ", row, " does not fit ", blocks,
                " blocks");
  const int32_t capacity = arguments.max_selected > 0 ? static_cast<int32_t>(arguments.max_selected)
                                                      : std::numeric_limits<int32_t>::max();

  std::vector<std::vector<int32_t>> chosen(rows * groups);
  at::Tensor counts = at::empty({rows, groups}, lengths.options());
  at::Tensor mass = at::empty({rows, groups}, scores.options());
  int32_t* count_data = counts.mutable_data_ptr<int32_t>();
  float* mass_data = mass.mutable_data_ptr<float>();
  at::parallel_for(0, rows * groups, 1, [&](int64_t begin, int64_t end) {
    kernels::SelectParams row_params = params;
    for (int64_t set = begin; set < end; ++set) {
      const int32_t length = length_data[set / groups];
      const double budget = arguments.budget_fraction > 0 ? std::ceil(arguments.budget_fraction * length)
                                                          : static_cast<double>(arguments.budget);
      row_params.top_k_tokens = static_cast<int32_t>(std::min(budget, 2147483000.0));
      chosen[set] = kernels::select_blocks_reference(score_data + set * blocks, length, row_params,
                                                     mass_data + set, capacity);
      count_data[set] = static_cast<int32_t>(chosen[set].size());
    }
  });
  int64_t width = arguments.max_selected;
  if (width == 0)
    for (const auto& list : chosen) width = std::max<int64_t>(width, static_cast<int64_t>(list.size()));
  at::Tensor indices = at::full({rows, groups, width}, -1, lengths.options());
  int32_t* index_data = indices.mutable_data_ptr<int32_t>();
  for (int64_t set = 0; set < rows * groups; ++set) {
    TORCH_CHECK(static_cast<int64_t>(chosen[set].size()) <= width, "spot::select_blocks: max_selected is ",
                width, " blocks, but the rule keeps at least ", chosen[set].size());
    std::copy(chosen[set].begin(), chosen[set].end(), index_data + set * width);
  }
  return {indices, counts, mass};
}

}  // namespace spot::ops::cpu
