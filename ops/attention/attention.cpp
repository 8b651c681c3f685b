#include "ops/attention/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "ops/attention/check.h"
#include "ops/checks.h"

namespace spot::ops {
namespace {

void check_rule(const char* op, const SelectionRule& rule, int64_t groups, int64_t max_selected) {
  for (const auto& [name, number] : {std::pair("budget", int64_t{rule.budget}),
                                     {"sinks", int64_t{rule.sinks}},
                                     {"recency", int64_t{rule.recency}},
                                     {"floor", int64_t{rule.floor}},
                                     {"cap", int64_t{rule.cap}},
                                     {"max_selected", max_selected}})
    TORCH_CHECK(number >= 0 && number <= (int64_t{1} << 30), op, ": ", name, " is ", number,
                "; it must be 0 to 2^30");
  TORCH_CHECK(rule.budget_fraction >= 0 && rule.budget_fraction <= 1, op, ": budget_fraction is ",
              rule.budget_fraction, "; it must be 0 (unused) to 1");
  TORCH_CHECK(rule.mode != SelectionMode::top_p || (rule.p > 0 && rule.p <= 1), op, ": p is ", rule.p,
              "; it must be above 0 and at most 1");
  TORCH_CHECK(rule.mode != SelectionMode::threshold || (rule.threshold > 0 && rule.threshold <= 1), op,
              ": threshold is ", rule.threshold, "; it must be above 0 and at most 1");
  TORCH_CHECK(rule.thresholds.count == 0 || rule.thresholds.count == groups, op, ": ", rule.thresholds.count,
              " thresholds were given; they must be one a set, of ", groups, ", or none");
  for (int32_t set = 0; set < rule.thresholds.count; ++set)
    TORCH_CHECK(rule.thresholds.of[set] > 0, op, ": a threshold is ", rule.thresholds.of[set],
                "; they must be positive");
  TORCH_CHECK(rule.temperature > 0 && std::isfinite(rule.temperature), op, ": temperature is ",
              rule.temperature, "; it must be positive");
}

void check_scores(const char* op, const at::Tensor& scores) {
  TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == at::kFloat, op, ": scores are ",
              scores.scalar_type(), " ", scores.sizes(), "; they must be float32 [rows, groups, blocks]");
}

}  // namespace

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key_pool,
                     const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths,
                     bool e4m3) {
  check_heads(op, "rows", query, key_pool, value_pool, e4m3);
  check_rows(op, page_table, lengths, query.size(0));
  check_devices(op, query, {&key_pool, &value_pool, &page_table, &lengths});
}

void SelectBlocks::check() const {
  const char* op = "spot::select_blocks";
  check_scores(op, scores);
  check_lengths(op, lengths, scores.size(0));
  check_devices(op, scores, {&lengths});
  check_rule(op, rule, scores.size(1), max_selected);
}

void SparseDecodeAttention::check() const {
  const char* op = "spot::sparse_decode_attention";
  check_attention(op, query, key_pool, value_pool, page_table, lengths, /*e4m3=*/true);
  check_scales(op, key_pool, key_pool.size(0), key_scale, value_scale, /*one_for_all=*/true);
  check_devices(op, query, {&key_scale, &value_scale});
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

void SelectAndAttend::check() const {
  const char* op = "spot::select_and_attend";
  check_scores(op, scores);
  check_rule(op, rule, scores.size(1), max_selected);
  check_attention(op, query, key_pool, value_pool, page_table, lengths, /*e4m3=*/true);
  check_scales(op, key_pool, key_pool.size(0), key_scale, value_scale, /*one_for_all=*/true);
  check_devices(op, query, {&key_scale, &value_scale});
  TORCH_CHECK(scores.size(0) == query.size(0) && (scores.size(1) == 1 || scores.size(1) == key_pool.size(0)),
              op, ": scores are ", scores.sizes(), "; they must be [", query.size(0), ", 1 or ",
              key_pool.size(0), ", blocks]");
  check_devices(op, query, {&scores});
}

int64_t select_width(const SelectionRule& rule, int64_t max_selected, int64_t blocks) {
  const int64_t least = kernels::smallest_capacity(rule);
  if (max_selected > 0) {
    TORCH_CHECK(max_selected >= least, "spot::select_blocks: max_selected is ", max_selected,
                " blocks, but the rule may keep at least ", least);
    return max_selected;
  }
  int64_t most = blocks;
  if (rule.mode == SelectionMode::top_k) {
    const double tokens = rule.budget_fraction > 0
                              ? std::ceil(rule.budget_fraction * static_cast<double>(kPageTokens * blocks))
                              : static_cast<double>(rule.budget);
    most = (static_cast<int64_t>(tokens) + kPageTokens - 1) / kPageTokens;
  } else if (rule.cap > 0) {
    most = rule.cap / kPageTokens;
  }
  return std::max(least, std::min(most, blocks));
}

namespace cpu {
decltype(ops::select_blocks) select_blocks;
decltype(ops::sparse_decode_attention) sparse_decode_attention;
}  // namespace cpu
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::select_blocks) select_blocks;
decltype(ops::sparse_decode_attention) sparse_decode_attention;
decltype(ops::select_and_attend) select_and_attend;
}  // namespace cuda
#endif

namespace {

SelectAndAttend::Result select_and_attend_cpu(const SelectAndAttend& a) {
  const auto [indices, counts, mass] = cpu::select_blocks({a.scores, a.lengths, a.rule, a.max_selected});
  return {cpu::sparse_decode_attention({a.query, a.key_pool, a.value_pool, a.page_table, a.lengths, a.scale,
                                        indices, counts, a.key_scale, a.value_scale}),
          indices, counts, a.with_mass ? mass : mass.new_empty({0})};
}

namespace fake {

SelectBlocks::Result select_blocks(const SelectBlocks& a) {
  const c10::SymInt rows = a.scores.sym_size(0), groups = a.scores.sym_size(1);
  // The width is arithmetic on plain numbers: a compiler makes one graph a number of blocks.
  const int64_t width =
      select_width(a.rule, a.max_selected, a.scores.sym_size(2).guard_int(__FILE__, __LINE__));
  return {at::empty_symint({rows, groups, width}, a.lengths.options()),
          at::empty_symint({rows, groups}, a.lengths.options()),
          at::empty_symint({rows, groups}, a.scores.options())};
}

at::Tensor sparse_decode_attention(const SparseDecodeAttention& a) {
  return at::empty_symint(a.query.sym_sizes(), a.query.options());
}

SelectAndAttend::Result select_and_attend(const SelectAndAttend& a) {
  const auto [indices, counts, mass] = fake::select_blocks({a.scores, a.lengths, a.rule, a.max_selected});
  return {at::empty_symint(a.query.sym_sizes(), a.query.options()), indices, counts,
          a.with_mass ? mass : at::empty({0}, mass.options())};
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<SelectBlocks>(library);
  define<SparseDecodeAttention>(library);
  define<SelectAndAttend>(library);
}
TORCH_LIBRARY_IMPL(spot, CPU, library) {
  implement<cpu::select_blocks>(library);
  implement<cpu::sparse_decode_attention>(library);
  implement<select_and_attend_cpu>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::select_blocks>(library);
  implement<fake::sparse_decode_attention>(library);
  implement<fake::select_and_attend>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::select_blocks>(library);
  implement<cuda::sparse_decode_attention>(library);
  implement<cuda::select_and_attend>(library);
}
#endif

bool attends(const at::Tensor& query, const at::Tensor& key_pool) {
  const auto dtype = query.scalar_type();
  if (dtype != at::kBFloat16 && dtype != at::kHalf && (dtype != at::kFloat || !query.is_cpu())) return false;
  if (query.is_cpu()) return true;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("spot::sparse_decode_attention", "");
  const int64_t dim = query.size(2);
  return query.is_cuda() && op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
         (dim == 64 || dim == 128 || dim == 256) && query.size(1) <= 16 * key_pool.size(0);
}

namespace {

// On the CPU counts are at hand, and what follows need not look at padding.
at::Tensor trimmed(const at::Tensor& indices, const at::Tensor& counts, int64_t max_selected) {
  if (!indices.is_cpu() || max_selected > 0 || counts.numel() == 0) return indices;
  return indices.narrow(2, 0, counts.max().item<int32_t>()).contiguous();
}

}  // namespace

SelectBlocks::Result select_blocks(const SelectBlocks& arguments) {
  SelectBlocks::Result result = call(arguments);
  result.indices = trimmed(result.indices, result.counts, arguments.max_selected);
  return result;
}
at::Tensor sparse_decode_attention(const SparseDecodeAttention& arguments) {
  return call(arguments);
}
SelectAndAttend::Result select_and_attend(const SelectAndAttend& arguments) {
  SelectAndAttend::Result result = call(arguments);
  result.indices = trimmed(result.indices, result.counts, arguments.max_selected);
  return result;
}

}  // namespace spot::ops
