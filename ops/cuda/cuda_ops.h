// The CUDA implementations behind ops/ops.h: tensors to the pointers of kernels/*.h, on the current stream.
// Launches may begin while their predecessor drains (programmatic dependent launch). Nothing here waits for
// the device, so all but gather_selector_keys may be captured in a CUDA graph (after one call outside it,
// which makes the workspace). Needs no CUDA build of torch to compile.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <tuple>

#include "kernels/selector_key_append.h"
#include "kernels/sparse_decode_attention.h"
#include "ops/ops.h"

namespace spot::ops::cuda {

// Scratch on `like`'s device, one a device and current stream, zeroed once. Kernels that use it keep their
// counters in its
// first kCounterBytes (kernels/types.h) and leave those zeroed; the rest holds anything.
void* zeroed_workspace(const at::Tensor& like, size_t bytes);

// The arguments of an attention launch over all blocks, and the tensors they point to.
struct AttentionCall {
  at::Tensor query, table, lengths, output;
  kernels::SparseDecodeAttentionParams params;
  // `groups` is the number of lists a row.
  AttentionCall(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                const at::Tensor& page_table, const at::Tensor& lengths, int64_t groups, double scale);
};

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale);
void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format, double global_scale);
// The launch that append_projected_keys makes; all tensors are contiguous but for the keys' tokens, and
// outlive it.
kernels::SelectorKeyAppendParams append_params(at::Tensor pool, const at::Tensor& slots,
                                               const at::Tensor& keys, const KeyPreparation& preparation,
                                               const at::Tensor& positions, const std::string& format,
                                               double global_scale);
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
    const SelectArguments& arguments, bool with_mass, bool history_settled);

}  // namespace spot::ops::cuda
