#include "ops/baselines/baselines.h"

#include "ops/attention/check.h"
#include "ops/checks.h"

namespace spot::ops {
namespace {

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

}  // namespace

void KeySummaryAppend::check() const {
  const char* op = "spot::key_summary_append";
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
  TORCH_CHECK(codes.defined() == ranges.defined(), op, ": codes and ranges must be given together");
  if (codes.defined()) {
    check_copy(op, codes, ranges, key_pool.size(0), key_pool.size(1) * 16, key_pool.size(3));
    check_devices(op, bounds, {&codes, &ranges});
  }
}

void QuestScore::check() const {
  const char* op = "spot::quest_score";
  TORCH_CHECK(bounds.dim() == 4 && bounds.size(2) == 2 && bounds.is_contiguous() &&
                  bounds.scalar_type() == query.scalar_type(),
              op, ": bounds are ", bounds.scalar_type(), " ", bounds.sizes(), "; they must be contiguous ",
              query.scalar_type(), " [heads, pages, 2, dim]");
  check_queries(op, query, bounds.size(0), bounds.size(3));
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&bounds, &page_table, &lengths});
}

void EstimateLogits::check() const {
  const char* op = "spot::estimate_logits";
  TORCH_CHECK(codes.dim() == 3, op, ": codes are ", codes.sizes(), "; they must be [heads, slots, dim / 2]");
  check_queries(op, query, codes.size(0), codes.size(2) * 2);
  check_copy(op, codes, ranges, codes.size(0), codes.size(1) / 16 * 16, query.size(2));
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&codes, &ranges, &page_table, &lengths});
  check_lists(op, query, indices, counts, codes.size(0));
}

void PruneTokens::check() const {
  const char* op = "spot::prune_tokens";
  TORCH_CHECK(logits.dim() == 3 && logits.scalar_type() == at::kFloat && indices.dim() == 3 &&
                  indices.size(1) > 0 && logits.size(1) % indices.size(1) == 0 &&
                  logits.size(2) == indices.size(2) * kPageTokens,
              op, ": logits are ", logits.scalar_type(), " ", logits.sizes(), " for indices ",
              indices.sizes(), "; they must be float32 [rows, a multiple of the groups, 16 a block]");
  check_lists(op, logits, indices, counts, indices.size(1));
  check_lengths(op, lengths, logits.size(0));
  check_devices(op, logits, {&lengths});
  TORCH_CHECK(p > 0 && p <= 1, op, ": p is ", p, "; it must be above 0 and at most 1");
  TORCH_CHECK(floor >= 0, op, ": floor is ", floor, "; it must be 0 or more tokens");
}

void TokenAttention::check() const {
  const char* op = "spot::token_attention";
  check_attention(op, query, key_pool, value_pool, page_table, lengths);
  check_lists(op, query, positions, counts, key_pool.size(0));
}

namespace cpu {
decltype(ops::key_summary_append) key_summary_append;
decltype(ops::quest_score) quest_score;
decltype(ops::estimate_logits) estimate_logits;
decltype(ops::prune_tokens) prune_tokens;
decltype(ops::token_attention) token_attention;
}  // namespace cpu
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::key_summary_append) key_summary_append;
decltype(ops::quest_score) quest_score;
decltype(ops::estimate_logits) estimate_logits;
decltype(ops::prune_tokens) prune_tokens;
decltype(ops::token_attention) token_attention;
}  // namespace cuda
#endif

namespace {
namespace fake {

void key_summary_append(const KeySummaryAppend&) {}

at::Tensor quest_score(const QuestScore& a) {
  return at::empty_symint(
      {a.query.sym_size(0), a.per_kv_head ? a.bounds.sym_size(0) : c10::SymInt(1), a.page_table.sym_size(1)},
      a.query.options().dtype(at::kFloat));
}

at::Tensor estimate_logits(const EstimateLogits& a) {
  return at::empty_symint({a.query.sym_size(0), a.query.sym_size(1), a.indices.sym_size(2) * kPageTokens},
                          a.query.options().dtype(at::kFloat));
}

PrunedTokens prune_tokens(const PruneTokens& a) {
  return {
      at::empty_symint({a.indices.sym_size(0), a.indices.sym_size(1), a.indices.sym_size(2) * kPageTokens},
                       a.indices.options()),
      at::empty_symint(a.counts.sym_sizes(), a.counts.options())};
}

at::Tensor token_attention(const TokenAttention& a) {
  return at::empty_symint(a.query.sym_sizes(), a.query.options());
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<KeySummaryAppend>(library);
  define<QuestScore>(library);
  define<EstimateLogits>(library);
  define<PruneTokens>(library);
  define<TokenAttention>(library);
}
TORCH_LIBRARY_IMPL(spot, CPU, library) {
  implement<cpu::key_summary_append>(library);
  implement<cpu::quest_score>(library);
  implement<cpu::estimate_logits>(library);
  implement<cpu::prune_tokens>(library);
  implement<cpu::token_attention>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::key_summary_append>(library);
  implement<fake::quest_score>(library);
  implement<fake::estimate_logits>(library);
  implement<fake::prune_tokens>(library);
  implement<fake::token_attention>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::key_summary_append>(library);
  implement<cuda::quest_score>(library);
  implement<cuda::estimate_logits>(library);
  implement<cuda::prune_tokens>(library);
  implement<cuda::token_attention>(library);
}
#endif

void key_summary_append(const KeySummaryAppend& arguments) {
  call(arguments);
}
at::Tensor quest_score(const QuestScore& arguments) {
  return call(arguments);
}
at::Tensor estimate_logits(const EstimateLogits& arguments) {
  return call(arguments);
}
PrunedTokens prune_tokens(const PruneTokens& arguments) {
  return call(arguments);
}
at::Tensor token_attention(const TokenAttention& arguments) {
  return call(arguments);
}

}  // namespace spot::ops
