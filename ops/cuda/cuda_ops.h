// The CUDA implementations behind ops/ops.h: tensors to the pointers of kernels/*.h, on the current stream.
// Launches may begin while their predecessor drains (programmatic dependent launch). Nothing here waits for
// the device, so all but gather_selector_keys may be captured in a CUDA graph (after one call outside it,
// which makes the workspace). Needs no CUDA build of torch to compile.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <tuple>

#include "kernels/selector_key_append.h"
#include "ops/ops.h"

namespace spot::ops::cuda {

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale);
void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format, double global_scale);
// The launch that append_projected_keys makes; all tensors are contiguous but for the keys' tokens, and
// outlive it.
kernels::SelectorKeyAppendParams append_params(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                                               const KeyPreparation& preparation, const at::Tensor& positions,
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
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_and_attend(
    const at::Tensor& scores, const at::Tensor& query, const at::Tensor& key_pool,
    const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths, double scale,
    const SelectArguments& arguments);

}  // namespace spot::ops::cuda
