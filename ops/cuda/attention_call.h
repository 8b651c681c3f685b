// What launches of the attention kernels share.
#pragma once

#include <ATen/ATen.h>

#include "kernels/sparse_decode_attention.h"

namespace spot::ops::cuda {

// The arguments of a launch over all blocks, and the tensors they point to.
struct AttentionCall {
  at::Tensor query, table, lengths, output;
  kernels::SparseDecodeAttentionParams params;
  // `groups` is the number of lists a row.
  AttentionCall(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                const at::Tensor& page_table, const at::Tensor& lengths, int64_t groups, double scale,
                const at::Tensor& key_scale = {}, const at::Tensor& value_scale = {});
};

}  // namespace spot::ops::cuda
