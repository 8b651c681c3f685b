#include "ops/checks.h"

#include <cmath>

namespace spot::ops {

void check_rows(const char* op, const at::Tensor& page_table, const at::Tensor& lengths, int64_t rows) {
  TORCH_CHECK(page_table.dim() == 2 && page_table.size(0) == rows && page_table.scalar_type() == at::kInt, op,
              ": page_table is ", page_table.scalar_type(), " ", page_table.sizes(), "; it must be int32 [",
              rows, ", pages]");
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == rows && lengths.scalar_type() == at::kInt, op,
              ": lengths is ", lengths.scalar_type(), " ", lengths.sizes(), "; it must be int32 [", rows,
              "]");
}

void check_devices(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  for (const at::Tensor* other : others)
    TORCH_CHECK(other->device() == first.device(), op, ": tensors are on ", first.device(), " and on ",
                other->device(), "; they must share a device");
}

namespace {

void check_pool(const char* op, const at::Tensor& pool, const std::string& format) {
  const int64_t bytes = page_head_bytes(format);
  TORCH_CHECK(pool.scalar_type() == at::kByte && pool.dim() == 3 && pool.size(2) == bytes &&
                  pool.is_contiguous() && (pool.size(1) == 1 || pool.size(1) == 4),
              op, ": the pool is ", pool.scalar_type(), " ", pool.sizes(), "; a ", format,
              " pool is contiguous uint8 [pages, 1 or 4, ", bytes, "]");
}

}  // namespace

const char* key_norm_name(KeyPreparation::Norm norm) {
  const char* names[] = {"none", "layernorm", "rmsnorm"};
  return names[norm];
}

KeyPreparation::Norm parse_key_norm(const std::string& word) {
  for (const auto norm : {KeyPreparation::kNone, KeyPreparation::kLayerNorm, KeyPreparation::kRmsNorm})
    if (word == key_norm_name(norm)) return norm;
  TORCH_CHECK(false, "spot: a key norm is \"", word, "\"; it must be none, layernorm or rmsnorm");
}

void check_append(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& keys,
                  const std::string& format) {
  const char* op = "spot::append_selector_keys";
  check_pool(op, pool, format);
  TORCH_CHECK(
      keys.dim() == 3 && keys.size(1) == pool.size(1) && keys.size(2) == 128 && keys.is_floating_point(), op,
      ": keys are ", keys.scalar_type(), " ", keys.sizes(), "; they must be floating point [tokens, ",
      pool.size(1), ", 128]");
  TORCH_CHECK(slots.dim() == 1 && slots.size(0) == keys.size(0) && slots.scalar_type() == at::kLong, op,
              ": slots are ", slots.scalar_type(), " ", slots.sizes(), "; they must be int64 [", keys.size(0),
              "]");
  check_devices(op, pool, {&slots, &keys});
}

void check_preparation(const at::Tensor& keys, const KeyPreparation& preparation) {
  const char* op = "spot::append_projected_keys";
  for (const at::Tensor* x : {&preparation.norm_weight, &preparation.norm_bias}) {
    if (!x->defined()) continue;
    TORCH_CHECK(x->scalar_type() == at::kFloat && x->numel() == 128 && x->is_contiguous(), op,
                ": a norm weight or bias is ", x->scalar_type(), " ", x->sizes(),
                "; it must be contiguous float32 [128]");
    check_devices(op, keys, {x});
  }
  TORCH_CHECK(preparation.cos.defined() == preparation.sin.defined(), op,
              ": cos and sin must be given together");
  if (!preparation.cos.defined()) return;
  for (const at::Tensor* x : {&preparation.cos, &preparation.sin})
    TORCH_CHECK(x->scalar_type() == at::kFloat && x->dim() == 2 && x->size(1) == 32 && x->is_contiguous(), op,
                ": a rotary table is ", x->scalar_type(), " ", x->sizes(),
                "; it must be contiguous float32 [positions, 32]");
  const at::Tensor& positions = preparation.positions;
  TORCH_CHECK(positions.defined() && positions.dim() == 1 && positions.size(0) == keys.size(0) &&
                  positions.scalar_type() == at::kLong,
              op, ": rotation needs positions, int64 [", keys.size(0), "]");
  check_devices(op, keys, {&preparation.cos, &preparation.sin, &positions});
}

void check_gather(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                  const std::string& format) {
  const char* op = "spot::gather_selector_keys";
  check_pool(op, pool, format);
  TORCH_CHECK(page_table.dim() == 1 && page_table.scalar_type() == at::kInt && length >= 0 &&
                  length <= page_table.size(0) * 16,
              op, ": page_table is ", page_table.scalar_type(), " ", page_table.sizes(),
              "; it must be int32 [pages] and hold all of ", length, " tokens");
  check_devices(op, pool, {&page_table});
}

void check_score(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                 const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format) {
  const char* op = "spot::score_blocks";
  check_pool(op, pool, format);
  TORCH_CHECK(query.dim() == 3 && query.size(1) == 4 && query.size(2) == 128 && query.is_floating_point(), op,
              ": query is ", query.scalar_type(), " ", query.sizes(),
              "; it must be floating point [rows, 4, 128]");
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == query.size(0) && weight.size(1) >= 1 &&
                  weight.size(2) == 4 && weight.scalar_type() == at::kFloat,
              op, ": weight is ", weight.scalar_type(), " ", weight.sizes(), "; it must be float32 [",
              query.size(0), ", groups, 4]");
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&weight, &pool, &page_table, &lengths});
}

void check_select(const at::Tensor& scores, const at::Tensor& lengths, bool top_p, double p,
                  double temperature) {
  const char* op = "spot::select_blocks";
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat, op, ": scores are ",
              scores.scalar_type(), " ", scores.sizes(), "; they must be float32 [rows, groups, blocks]");
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == scores.size(0) && lengths.scalar_type() == at::kInt,
              op, ": lengths is ", lengths.scalar_type(), " ", lengths.sizes(), "; it must be int32 [",
              scores.size(0), "]");
  TORCH_CHECK(!top_p || (p > 0 && p <= 1), op, ": p is ", p, "; it must be above 0 and at most 1");
  TORCH_CHECK(temperature > 0 && std::isfinite(temperature), op, ": temperature is ", temperature,
              "; it must be positive");
  check_devices(op, scores, {&lengths});
}

void check_attention(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                     const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                     const at::Tensor& counts) {
  const char* op = "spot::sparse_decode_attention";
  const auto dtype = query.scalar_type();
  TORCH_CHECK(query.dim() == 3 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf), op,
              ": query is ", dtype, " ", query.sizes(),
              "; it must be float32, bfloat16 or float16 [rows, num_heads, head_dim]");
  TORCH_CHECK(
      key_pool.dim() == 4 && key_pool.size(2) == 16 && key_pool.size(3) == query.size(2) &&
          key_pool.size(0) > 0 && query.size(1) % key_pool.size(0) == 0 && key_pool.scalar_type() == dtype,
      op, ": key_pool is ", key_pool.scalar_type(), " ", key_pool.sizes(), "; for this query it must be ",
      dtype, " [a divisor of ", query.size(1), ", pages, 16, ", query.size(2), "]");
  TORCH_CHECK(value_pool.sizes() == key_pool.sizes() && value_pool.scalar_type() == dtype, op,
              ": value_pool is ", value_pool.scalar_type(), " ", value_pool.sizes(),
              "; it must match key_pool, ", dtype, " ", key_pool.sizes());
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&key_pool, &value_pool, &page_table, &lengths});
  TORCH_CHECK(indices.defined() == counts.defined(), op, ": indices and counts must be given together");
  if (!counts.defined()) return;
  TORCH_CHECK(counts.dim() == 2 && counts.size(0) == query.size(0) && counts.scalar_type() == at::kInt &&
                  (counts.size(1) == 1 || counts.size(1) == key_pool.size(0)),
              op, ": counts are ", counts.scalar_type(), " ", counts.sizes(), "; they must be int32 [",
              query.size(0), ", 1 or ", key_pool.size(0), "]");
  TORCH_CHECK(indices.dim() == 3 && indices.size(0) == counts.size(0) && indices.size(1) == counts.size(1) &&
                  indices.scalar_type() == at::kInt,
              op, ": indices are ", indices.scalar_type(), " ", indices.sizes(), "; they must be int32 [",
              counts.size(0), ", ", counts.size(1), ", blocks]");
  check_devices(op, query, {&indices, &counts});
}

}  // namespace spot::ops
