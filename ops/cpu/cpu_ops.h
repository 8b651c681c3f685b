// The CPU implementations behind ops/ops.h; same arguments, already checked for shape and dtype by the
// callers in ops.cpp.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <tuple>

#include "ops/ops.h"

namespace spot::ops::cpu {

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale);
void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format, double global_scale);
at::Tensor gather_selector_keys(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                                const std::string& format, double global_scale);
at::Tensor score_blocks(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                        const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format,
                        double global_scale, int64_t max_blocks, bool history_settled);
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(const at::Tensor& scores,
                                                             const at::Tensor& lengths,
                                                             const SelectArguments& arguments);
at::Tensor sparse_decode_attention(const at::Tensor& query, const at::Tensor& key_pool,
                                   const at::Tensor& value_pool, const at::Tensor& page_table,
                                   const at::Tensor& lengths, const at::Tensor& indices,
                                   const at::Tensor& counts, double scale);

}  // namespace spot::ops::cpu
