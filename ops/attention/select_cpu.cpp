// Block selection on the CPU: the rule of kernels/select_rules.h, as kernels/select_reference.h applies
// them, with each mass computed once and integers sorted in place of pairs: prefill selects for thousands of
// queries.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/attention/attention.h"

namespace spot::ops::cpu {

namespace {

// Equal to kernels::select_blocks_reference, index for index and bit for bit.
class RowSelector {
 public:
  // `chosen` receives the blocks, ascending; returns their share of the residual mass.
  float select(const float* scores, int32_t length, const SelectionRule& rule, int32_t capacity, int32_t set,
               std::vector<int32_t>& chosen) {
    const kernels::SelectRow row = kernels::select_row(rule, length, capacity);
    chosen.clear();
    if (row.take_all != 0) {
      for (int32_t b = 0; b < row.num_blocks; ++b) chosen.push_back(b);
      return 1.0f;
    }
    const int32_t first = row.residual_begin, residual = row.residual_end - first;
    order_.resize(residual);
    masses_.resize(residual);
    uint32_t top = 0;
    for (int32_t i = 0; i < residual; ++i) {
      const uint32_t key = kernels::order_key(kernels::canonical_score(scores[first + i]));
      top = std::max(top, key);
      // Ascending in this number is descending in score, then ascending in index.
      order_[i] = static_cast<uint64_t>(~key) << 32 | static_cast<uint32_t>(i);
    }
    const float largest = kernels::score_of_key(top), scale = kernels::mass_scale(rule);
    const bool any_mass = largest != -std::numeric_limits<float>::infinity();
    uint64_t total = 0;
    for (int32_t i = 0; i < residual; ++i) {
      masses_[i] =
          any_mass ? kernels::mass_of(kernels::canonical_score(scores[first + i]), largest, scale) : 0;
      total += masses_[i];
    }
    auto mass_of_rank = [&](int32_t rank) { return masses_[static_cast<uint32_t>(order_[rank])]; };
    int32_t count = row.min_residual;
    if (rule.mode == SelectionMode::top_p) {
      std::sort(order_.begin(), order_.end());
      const uint64_t target = kernels::mass_target(kernels::fixed_probability(rule), total);
      int32_t nucleus = 0;
      for (uint64_t sum = 0; sum < target; ++nucleus) sum += mass_of_rank(nucleus);
      count = std::min(std::max(nucleus, row.min_residual), row.max_residual);
    } else if (rule.mode == SelectionMode::threshold) {
      const uint64_t least = kernels::mass_threshold(kernels::threshold_of(rule, set), total);
      const auto heavy = [&](uint64_t entry) { return masses_[static_cast<uint32_t>(entry)] >= least; };
      count = static_cast<int32_t>(std::count_if(order_.begin(), order_.end(), heavy));
      if (count >= row.min_residual && count <= row.max_residual) {
        std::partition(order_.begin(), order_.end(), heavy);
      } else {
        count = std::min(std::max(count, row.min_residual), row.max_residual);
        std::nth_element(order_.begin(), order_.begin() + count, order_.end());
      }
    } else if (count < residual) {
      std::nth_element(order_.begin(), order_.begin() + count, order_.end());
    }
    uint64_t covered = 0;
    for (int32_t b = 0; b < first; ++b) chosen.push_back(b);
    for (int32_t rank = 0; rank < count; ++rank) {
      covered += mass_of_rank(rank);
      chosen.push_back(first + static_cast<int32_t>(static_cast<uint32_t>(order_[rank])));
    }
    std::sort(chosen.begin() + first, chosen.end());
    for (int32_t b = row.residual_end; b < row.num_blocks; ++b) chosen.push_back(b);
    return total == 0 ? 1.0f : static_cast<float>(static_cast<double>(covered) / static_cast<double>(total));
  }

 private:
  std::vector<uint64_t> order_;
  std::vector<uint32_t> masses_;
};

}  // namespace

SelectBlocks::Result select_blocks(const SelectBlocks& a) {
  const auto& [scores, lengths, rule, max_selected] = a;
  const int64_t rows = scores.size(0), groups = scores.size(1), blocks = scores.size(2);
  const int64_t width = select_width(rule, max_selected, blocks);
  const at::Tensor dense = scores.contiguous(), visible = lengths.contiguous();
  const float* score_data = dense.const_data_ptr<float>();
  const int32_t* length_data = visible.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK(length_data[row] >= 0 && length_data[row] <= blocks * kernels::kPageTokens,
                "spot::select_blocks: length ", length_data[row], " of row ", row, " does not fit ", blocks,
                " blocks");
  at::Tensor indices = at::empty({rows, groups, width}, lengths.options());
  at::Tensor counts = at::empty({rows, groups}, lengths.options());
  at::Tensor mass = at::empty({rows, groups}, scores.options());
  int32_t* index_data = indices.mutable_data_ptr<int32_t>();
  int32_t* count_data = counts.mutable_data_ptr<int32_t>();
  float* mass_data = mass.mutable_data_ptr<float>();
  at::parallel_for(0, rows * groups, 1, [&](int64_t begin, int64_t end) {
    RowSelector selector;
    std::vector<int32_t> chosen;
    for (int64_t set = begin; set < end; ++set) {
      mass_data[set] =
          selector.select(score_data + set * blocks, length_data[set / groups], a.rule,
                          static_cast<int32_t>(width), static_cast<int32_t>(set % groups), chosen);
      count_data[set] = static_cast<int32_t>(chosen.size());
      int32_t* row = std::copy(chosen.begin(), chosen.end(), index_data + set * width);
      std::fill(row, index_data + (set + 1) * width, -1);
    }
  });
  return {indices, counts, mass};
}

}  // namespace spot::ops::cpu
