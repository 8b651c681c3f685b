// What every attention over paged keys and values demands; `e4m3` as in check_heads (ops/checks.h).
#pragma once

#include <ATen/ATen.h>

namespace spot::ops {

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key_pool,
                     const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths,
                     bool e4m3 = false);

}  // namespace spot::ops
