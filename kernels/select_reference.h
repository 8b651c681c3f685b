// Block selection on the host, by sorting: the reference of select_blocks.h and what CPU code calls. The
// rules are in select_rules.h; the device gives exactly this result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/select_rules.h"

namespace spot::kernels {

// Selects blocks of one row. scores [ceil(length / block_size)] float32; length in tokens, >= 0. Returns the
// selected block indices, ascending. `capacity` as in select_row (default: no cap). If `covered_share` is
// given it receives the selected blocks' share of the residual mass; 1 when every block is selected or the
// residual mass is zero. `set` is the row's among those of its sequence.
inline std::vector<int32_t> select_blocks_reference(const float* scores, int32_t length,
                                                    const SelectionRule& rule, float* covered_share = nullptr,
                                                    int32_t capacity = std::numeric_limits<int32_t>::max(),
                                                    int32_t set = 0) {
  const SelectRow row = select_row(rule, length, capacity);
  std::vector<int32_t> selected;
  if (covered_share != nullptr) *covered_share = 1.0f;
  if (row.take_all != 0) {
    for (int32_t b = 0; b < row.num_blocks; ++b) selected.push_back(b);
    return selected;
  }
  struct Entry {
    uint32_t key;
    int32_t block;
  };
  std::vector<Entry> entries;
  for (int32_t b = row.residual_begin; b < row.residual_end; ++b)
    entries.push_back({order_key(canonical_score(scores[b])), b});
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.key != b.key ? a.key > b.key : a.block < b.block;
  });

  const float scale = mass_scale(rule), largest = score_of_key(entries.front().key);
  const bool any_mass = entries.front().key != order_key(bits_float(0xff800000u));
  const auto mass = [&](const Entry& e) -> uint64_t {
    return any_mass ? mass_of(score_of_key(e.key), largest, scale) : 0;
  };
  uint64_t total = 0;
  for (const Entry& e : entries) total += mass(e);

  int32_t count = row.min_residual;
  if (rule.mode == SelectionMode::top_p) {
    const uint64_t target = mass_target(fixed_probability(rule), total);
    int32_t nucleus = 0;
    for (uint64_t sum = 0; sum < target; ++nucleus) sum += mass(entries[nucleus]);
    count = std::min(std::max(nucleus, row.min_residual), row.max_residual);
  } else if (rule.mode == SelectionMode::threshold) {
    // Rounding may give a block a little more mass than one of higher score: first what reaches the threshold.
    const uint64_t least = mass_threshold(threshold_of(rule, set), total);
    std::vector<Entry> heavy;
    for (const Entry& e : entries)
      if (mass(e) >= least) heavy.push_back(e);
    count = static_cast<int32_t>(heavy.size());
    if (count >= row.min_residual && count <= row.max_residual)
      entries = heavy;
    else
      count = std::min(std::max(count, row.min_residual), row.max_residual);
  }
  uint64_t covered = 0;
  for (int32_t b = 0; b < row.residual_begin; ++b) selected.push_back(b);
  for (int32_t i = 0; i < count; ++i) {
    selected.push_back(entries[i].block);
    covered += mass(entries[i]);
  }
  for (int32_t b = row.residual_end; b < row.num_blocks; ++b) selected.push_back(b);
  std::sort(selected.begin(), selected.end());
  if (covered_share != nullptr && total != 0)
    *covered_share = static_cast<float>(static_cast<double>(covered) / static_cast<double>(total));
  return selected;
}

}  // namespace spot::kernels
