#include "ops/baseline_ops.h"

#include <torch/library.h>

#include <tuple>

#include "ops/checks.h"
#include "ops/cpu/baselines.h"
#ifdef SPOT_CUDA
#include "ops/cuda/baseline_ops.h"
#endif

namespace spot::ops {
namespace {

using MaybeTensor = std::optional<at::Tensor>;
using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

bool contiguous_like(const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes) {
  return x.scalar_type() == dtype && x.sizes() == sizes && x.is_contiguous();
}

void check_copy(const char* op, const at::Tensor& codes, const at::Tensor& ranges, int64_t kv_heads,
                int64_t slots, int64_t dim) {
  TORCH_CHECK(dim % 2 == 0 && contiguous_like(codes, at::kByte, {kv_heads, slots, dim / 2}) &&
                  contiguous_like(ranges, at::kHalf, {kv_heads, slots, 2}),
              op, ": codes are ", codes.scalar_type(), " ", codes.sizes(), ", ranges ", ranges.scalar_type(),
              " ", ranges.sizes(), "; they must be contiguous, uint8 [", kv_heads, ", ", slots, ", ", dim,
              " / 2] and float16 [", kv_heads, ", ", slots, ", 2], and head_dim even");
}

// Lists of blocks or tokens, one a row and KV head.
void check_lists(const char* op, const at::Tensor& query, const at::Tensor& indices, const at::Tensor& counts,
                 int64_t kv_heads) {
  const int64_t rows = query.size(0);
  TORCH_CHECK(counts.scalar_type() == at::kInt && counts.sizes() == at::IntArrayRef({rows, kv_heads}) &&
                  indices.scalar_type() == at::kInt && indices.dim() == 3 && indices.size(0) == rows &&
                  indices.size(1) == kv_heads,
              op, ": indices are ", indices.scalar_type(), " ", indices.sizes(), ", counts ",
              counts.scalar_type(), " ", counts.sizes(), "; they must be int32 [", rows, ", ", kv_heads,
              ", any] and [", rows, ", ", kv_heads, "]");
  check_devices(op, query, {&indices, &counts});
}

void check_queries(const char* op, const at::Tensor& query, int64_t kv_heads, int64_t dim) {
  TORCH_CHECK(query.dim() == 3 && query.is_floating_point() && kv_heads > 0 &&
                  query.size(1) % kv_heads == 0 && query.size(2) == dim,
              op, ": query is ", query.scalar_type(), " ", query.sizes(),
              "; it must be floating point [rows, heads, ", dim, "] with a multiple of ", kv_heads, " heads");
}

template <auto Append>
void append_boundary(at::Tensor bounds, MaybeTensor codes, MaybeTensor ranges, const at::Tensor& key_pool,
                     const at::Tensor& slots) {
  const char* op = "spot::append_key_summaries";
  TORCH_CHECK(key_pool.dim() == 4 && key_pool.size(2) == 16 && key_pool.is_floating_point(), op,
              ": key_pool is ", key_pool.scalar_type(), " ", key_pool.sizes(),
              "; it must be floating point [heads, pages, 16, dim]");
  TORCH_CHECK(contiguous_like(bounds, key_pool.scalar_type(),
                              {key_pool.size(0), key_pool.size(1), 2, key_pool.size(3)}),
              op, ": bounds are ", bounds.scalar_type(), " ", bounds.sizes(), "; for keys ",
              key_pool.scalar_type(), " ", key_pool.sizes(),
              " they must be contiguous, of the same dtype, [heads, pages, 2, dim]");
  TORCH_CHECK(slots.dim() == 1 && slots.scalar_type() == at::kLong, op, ": slots are ", slots.scalar_type(),
              " ", slots.sizes(), "; they must be int64 [tokens]");
  check_devices(op, bounds, {&key_pool, &slots});
  TORCH_CHECK(codes.has_value() == ranges.has_value(), op, ": codes and ranges must be given together");
  if (codes) {
    check_copy(op, *codes, *ranges, key_pool.size(0), key_pool.size(1) * 16, key_pool.size(3));
    check_devices(op, bounds, {&*codes, &*ranges});
  }
  Append(bounds, codes.value_or(at::Tensor()), ranges.value_or(at::Tensor()), key_pool, slots);
}

template <auto Score>
at::Tensor scores_boundary(const at::Tensor& query, const at::Tensor& bounds, const at::Tensor& page_table,
                           const at::Tensor& lengths, double scale, bool per_kv_head) {
  const char* op = "spot::quest_scores";
  TORCH_CHECK(bounds.dim() == 4 && bounds.size(2) == 2 && bounds.is_contiguous() &&
                  bounds.scalar_type() == query.scalar_type(),
              op, ": bounds are ", bounds.scalar_type(), " ", bounds.sizes(), "; they must be contiguous ",
              query.scalar_type(), " [heads, pages, 2, dim]");
  check_queries(op, query, bounds.size(0), bounds.size(3));
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&bounds, &page_table, &lengths});
  const at::Tensor scores = Score(query, bounds, page_table, lengths, scale, !per_kv_head);
  return per_kv_head ? scores : scores.mean(1, true);
}

template <auto Estimate>
at::Tensor estimate_boundary(const at::Tensor& query, const at::Tensor& codes, const at::Tensor& ranges,
                             const at::Tensor& page_table, const at::Tensor& lengths,
                             const at::Tensor& indices, const at::Tensor& counts, double scale) {
  const char* op = "spot::estimate_logits";
  TORCH_CHECK(codes.dim() == 3, op, ": codes are ", codes.sizes(), "; they must be [heads, slots, dim / 2]");
  check_queries(op, query, codes.size(0), codes.size(2) * 2);
  check_copy(op, codes, ranges, codes.size(0), codes.size(1) / 16 * 16, query.size(2));
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&codes, &ranges, &page_table, &lengths});
  check_lists(op, query, indices, counts, codes.size(0));
  return Estimate(query, codes, ranges, page_table, lengths, indices, counts, scale);
}

template <auto Prune>
TwoTensors prune_boundary(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& counts,
                          const at::Tensor& lengths, double p, int64_t floor) {
  const char* op = "spot::prune_tokens";
  TORCH_CHECK(logits.dim() == 3 && logits.scalar_type() == at::kFloat && indices.dim() == 3 &&
                  indices.size(1) > 0 && logits.size(1) % indices.size(1) == 0 &&
                  logits.size(2) == indices.size(2) * 16,
              op, ": logits are ", logits.scalar_type(), " ", logits.sizes(), " for indices ",
              indices.sizes(), "; they must be float32 [rows, a multiple of the groups, 16 a block]");
  check_lists(op, logits, indices, counts, indices.size(1));
  TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == logits.size(0) && lengths.scalar_type() == at::kInt,
              op, ": lengths is ", lengths.scalar_type(), " ", lengths.sizes(), "; it must be int32 [",
              logits.size(0), "]");
  check_devices(op, logits, {&lengths});
  TORCH_CHECK(p > 0 && p <= 1, op, ": p is ", p, "; it must be above 0 and at most 1");
  const PrunedTokens pruned = Prune(logits, indices, counts, lengths, p, floor);
  return {pruned.positions, pruned.counts};
}

template <auto Attend>
at::Tensor attention_boundary(const at::Tensor& query, const at::Tensor& key_pool,
                              const at::Tensor& value_pool, const at::Tensor& page_table,
                              const at::Tensor& lengths, const at::Tensor& positions,
                              const at::Tensor& counts, double scale) {
  check_attention(query, key_pool, value_pool, page_table, lengths, at::Tensor(), at::Tensor());
  check_lists("spot::token_attention", query, positions, counts, key_pool.size(0));
  return Attend(query, key_pool, value_pool, page_table, lengths, positions, counts, scale);
}

template <typename Signature>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  library.def(
      "append_key_summaries(Tensor(a!) bounds, Tensor(b!)? codes, Tensor(c!)? ranges, Tensor key_pool, Tensor slots) "
      "-> ()");
  library.def(
      "quest_scores(Tensor query, Tensor bounds, Tensor page_table, Tensor lengths, float scale, bool per_kv_head=True) "
      "-> Tensor");
  library.def(
      "estimate_logits(Tensor query, Tensor codes, Tensor ranges, Tensor page_table, Tensor lengths, Tensor indices, "
      "Tensor counts, float scale) -> Tensor");
  library.def(
      "prune_tokens(Tensor logits, Tensor indices, Tensor counts, Tensor lengths, float p, int floor=0) -> (Tensor "
      "positions, Tensor counts)");
  library.def(
      "token_attention(Tensor query, Tensor key_pool, Tensor value_pool, Tensor page_table, Tensor lengths, Tensor "
      "positions, Tensor counts, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(spot, CPU, library) {
  library.impl("append_key_summaries", append_boundary<cpu::append_key_summaries>);
  library.impl("quest_scores", scores_boundary<cpu::quest_scores>);
  library.impl("estimate_logits", estimate_boundary<cpu::estimate_logits>);
  library.impl("prune_tokens", prune_boundary<cpu::prune_tokens>);
  library.impl("token_attention", attention_boundary<cpu::token_attention>);
}

#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  library.impl("append_key_summaries", append_boundary<cuda::append_key_summaries>);
  library.impl("quest_scores", scores_boundary<cuda::quest_scores>);
  library.impl("estimate_logits", estimate_boundary<cuda::estimate_logits>);
  library.impl("prune_tokens", prune_boundary<cuda::prune_tokens>);
  library.impl("token_attention", attention_boundary<cuda::token_attention>);
}
#endif

void append_key_summaries(at::Tensor bounds, at::Tensor codes, at::Tensor ranges, const at::Tensor& key_pool,
                          const at::Tensor& slots) {
  static const auto op =
      handle<void(at::Tensor, MaybeTensor, MaybeTensor, const at::Tensor&, const at::Tensor&)>(
          "spot::append_key_summaries");
  auto maybe = [](const at::Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; };
  op.call(bounds, maybe(codes), maybe(ranges), key_pool, slots);
}

at::Tensor quest_scores(const at::Tensor& query, const at::Tensor& bounds, const at::Tensor& page_table,
                        const at::Tensor& lengths, double scale, bool per_kv_head) {
  static const auto op = handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           const at::Tensor&, double, bool)>("spot::quest_scores");
  return op.call(query, bounds, page_table, lengths, scale, per_kv_head);
}

at::Tensor estimate_logits(const at::Tensor& query, const at::Tensor& codes, const at::Tensor& ranges,
                           const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                           const at::Tensor& counts, double scale) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
          "spot::estimate_logits");
  return op.call(query, codes, ranges, page_table, lengths, indices, counts, scale);
}

PrunedTokens prune_tokens(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& counts,
                          const at::Tensor& lengths, double p, int64_t floor) {
  static const auto op = handle<TwoTensors(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           const at::Tensor&, double, int64_t)>("spot::prune_tokens");
  auto [positions, kept] = op.call(logits, indices, counts, lengths, p, floor);
  return {positions, kept};
}

at::Tensor token_attention(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
                           const at::Tensor& page_table, const at::Tensor& lengths,
                           const at::Tensor& positions, const at::Tensor& counts, double scale) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
          "spot::token_attention");
  return op.call(query, key_pool, value_pool, page_table, lengths, positions, counts, scale);
}

}  // namespace spot::ops
