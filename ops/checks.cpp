#include "ops/checks.h"

#include <utility>

#include "ops/words.h"

namespace spot::ops {

void check_devices(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* other : others)
    TORCH_CHECK(!other->defined() || other->device() == first.device(), op, ": tensors are on ",
                first.device(), " and on ", other->device(), "; they must share a device");
}

void check_lengths(const char* op, const at::Tensor& lengths, int64_t rows) {
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == rows && lengths.scalar_type() == at::kInt, op,
              ": lengths is ", lengths.scalar_type(), " ", lengths.sizes(), "; it must be int32 [", rows,
              "]");
}

void check_rows(const char* op, const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows) {
  TORCH_CHECK(page_table.dim() == 2 && page_table.size(0) == rows && page_table.scalar_type() == at::kInt, op,
              ": page_table is ", page_table.scalar_type(), " ", page_table.sizes(), "; it must be int32 [",
              rows, ", pages]");
  check_lengths(op, lengths, rows);
}

void check_slots(const char* op, const at::Tensor& slots, int64_t tokens) {
  TORCH_CHECK(slots.dim() == 1 && slots.size(0) == tokens && slots.scalar_type() == at::kLong, op,
              ": slots are ", slots.scalar_type(), " ", slots.sizes(), "; they must be int64 [", tokens, "]");
}

void check_key_pool(const char* op, const at::Tensor& pool, kernels::KeyFormat format) {
  const int64_t bytes = kernels::page_head_bytes(format);
  TORCH_CHECK(pool.scalar_type() == at::kByte && pool.dim() == 3 && pool.size(2) == bytes &&
                  pool.is_contiguous() && (pool.size(1) == 1 || pool.size(1) == kernels::kSelectorHeads),
              op, ": the pool is ", pool.scalar_type(), " ", pool.sizes(), "; a ", word_of(format),
              " pool is contiguous uint8 [pages, 1 or ", kernels::kSelectorHeads, ", ", bytes, "]");
  TORCH_CHECK(format != kernels::KeyFormat::f32 || !pool.is_cuda(), op,
              ": selector key format f32 exists on the CPU only; use bf16, int8, int4, mxfp4 or nvfp4");
}

void check_pool(const char* op, const char* name, const at::Tensor& pool, int64_t num_kv_heads,
                int64_t head_dim, at::ScalarType dtype) {
  TORCH_CHECK(pool.dim() == 4 && pool.size(0) == num_kv_heads && pool.size(2) == kPageTokens &&
                  pool.size(3) == head_dim && pool.scalar_type() == dtype && pool.stride(3) == 1,
              op, ": ", name, " is ", pool.scalar_type(), " ", pool.sizes(), " with strides ", pool.strides(),
              "; it must be ", dtype, " [", num_kv_heads, ", pages, ", kPageTokens, ", ", head_dim,
              "] with contiguous dims");
}

void check_heads(const char* op, const char* rows, const at::Tensor& query, const at::Tensor& key_pool,
                 const at::Tensor& value_pool, bool e4m3) {
  const auto dtype = query.scalar_type();
  TORCH_CHECK(query.dim() == 3 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf), op,
              ": query is ", dtype, " ", query.sizes(), "; it must be float32, bfloat16 or float16 [", rows,
              ", num_heads, head_dim]");
  TORCH_CHECK(key_pool.dim() == 4 && key_pool.size(0) > 0 && query.size(1) % key_pool.size(0) == 0, op,
              ": key_pool is ", key_pool.sizes(), "; for this query its first size must be a divisor of ",
              query.size(1));
  const auto stored = key_pool.scalar_type();
  TORCH_CHECK(!e4m3 || stored == dtype || stored == at::kFloat8_e4m3fn, op, ": key_pool is ", stored,
              "; for this query it must be ", dtype, " or Float8_e4m3fn");
  for (const auto& [name, pool] : {std::pair("key_pool", key_pool), {"value_pool", value_pool}})
    check_pool(op, name, pool, key_pool.size(0), query.size(2), e4m3 ? stored : dtype);
  TORCH_CHECK(value_pool.size(1) == key_pool.size(1) && value_pool.strides() == key_pool.strides(), op,
              ": value_pool is ", value_pool.sizes(), " with strides ", value_pool.strides(),
              "; it must match key_pool, ", key_pool.sizes(), " with strides ", key_pool.strides());
}

void check_scales(const char* op, const at::Tensor& pool, int64_t num_kv_heads, const at::Tensor& key_scale,
                  const at::Tensor& value_scale, bool one_for_all) {
  for (const auto& [name, scale] : {std::pair("key_scale", key_scale), {"value_scale", value_scale}}) {
    if (!scale.defined()) continue;
    TORCH_CHECK(pool.defined(), op, ": ", name, " was given without pools; leave it out");
    TORCH_CHECK(pool.scalar_type() == at::kFloat8_e4m3fn, op, ": ", name, " was given for pools of ",
                pool.scalar_type(), "; scales are for float8_e4m3fn, leave it out");
    const bool each = scale.dim() == 1 && scale.size(0) == num_kv_heads;
    TORCH_CHECK(scale.scalar_type() == at::kFloat &&
                    (one_for_all ? each || scale.numel() == 1 : each && scale.is_contiguous()),
                op, ": ", name, " is ", scale.scalar_type(), " ", scale.sizes(), "; it must be ",
                one_for_all ? "float32 of one number or [" : "contiguous float32 [", num_kv_heads, "]");
  }
}

}  // namespace spot::ops
