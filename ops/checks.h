// Checks that several operators share. Each throws c10::Error in one sentence that begins with the operator.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>

#include "kernels/key_format.h"

namespace spot::ops {

using kernels::kPageTokens;

// Every defined tensor lies on the device of the first.
void check_devices(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others);
// lengths [rows] int32.
void check_lengths(const char* op, const at::Tensor& lengths, int64_t rows);
// page_table [rows, pages] int32 and lengths [rows] int32.
void check_rows(const char* op, const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows);
// slots [tokens] int64.
void check_slots(const char* op, const at::Tensor& slots, int64_t tokens);
// A pool of selector keys: contiguous uint8 [pages, 1 or 4, page_head_bytes(format)].
void check_key_pool(const char* op, const at::Tensor& pool, kernels::KeyFormat format);
// A pool of keys or values: [num_kv_heads, pages, 16, head_dim] of a dtype, any strides but contiguous dims.
void check_pool(const char* op, const char* name, const at::Tensor& pool, int64_t num_kv_heads,
                int64_t head_dim, at::ScalarType dtype);

// query [`rows`, num_heads, head_dim] and its pools of keys and values, which are laid out alike; a KV head serves as many
// query heads as any other. The pools have the query's dtype, or with `e4m3` that may be float8_e4m3fn.
void check_heads(const char* op, const char* rows, const at::Tensor& query, const at::Tensor& key_pool,
                 const at::Tensor& value_pool, bool e4m3 = false);

// What the codes of float8_e4m3fn pools are multiplied by, undefined: 1; else contiguous float32 [num_kv_heads], or with
// `one_for_all` any float32 of one number or [num_kv_heads]. Without a pool there are none.
void check_scales(const char* op, const at::Tensor& pool, int64_t num_kv_heads, const at::Tensor& key_scale,
                  const at::Tensor& value_scale, bool one_for_all);

}  // namespace spot::ops
