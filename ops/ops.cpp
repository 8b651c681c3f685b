// Registration with torch's dispatcher. The C++ functions of ops.h lie in this file too and go through the
// dispatcher, so that whoever uses one links the registrations as well.
#include "ops/ops.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/cpu/cpu_ops.h"
#ifdef SPOT_CUDA
#include "ops/cuda/cuda_ops.h"
#endif

namespace spot::ops {
namespace {

// One device's implementations under the schemas below.
template <auto Append>
void append_boundary(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys, std::string format,
                     double global_scale) {
  check_append(pool, slots, keys, format);
  Append(pool, slots, keys, format, global_scale);
}

template <auto Score>
at::Tensor score_boundary(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                          const at::Tensor& page_table, const at::Tensor& lengths, std::string format,
                          double global_scale, int64_t max_blocks) {
  check_score(query, weight, pool, page_table, lengths, format);
  return Score(query, weight, pool, page_table, lengths, format, global_scale, max_blocks);
}

template <auto Select>
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_boundary(const at::Tensor& scores,
                                                               const at::Tensor& lengths, std::string mode,
                                                               double p, int64_t budget,
                                                               double budget_fraction, int64_t sinks,
                                                               int64_t recency, int64_t floor, int64_t cap,
                                                               double temperature, int64_t max_selected) {
  TORCH_CHECK(mode == "top_p" || mode == "top_k", "spot::select_blocks: mode is \"", mode,
              "\"; it must be top_p or top_k");
  check_select(scores, lengths, mode == "top_p", p, temperature);
  for (int64_t tokens : {budget, sinks, recency, floor, cap, max_selected})
    TORCH_CHECK(tokens >= 0 && tokens <= (int64_t{1} << 30), "spot::select_blocks: a budget of ", tokens,
                " tokens; budgets must be 0 to 2^30");
  TORCH_CHECK(budget_fraction >= 0 && budget_fraction <= 1, "spot::select_blocks: budget_fraction is ",
              budget_fraction, "; it must be 0 (unused) to 1");
  return Select(
      scores, lengths,
      {mode == "top_p", p, budget, budget_fraction, sinks, recency, floor, cap, temperature, max_selected});
}

template <auto Attend>
at::Tensor attention_boundary(const at::Tensor& query, const at::Tensor& key_pool,
                              const at::Tensor& value_pool, const at::Tensor& page_table,
                              const at::Tensor& lengths, const at::Tensor& indices, const at::Tensor& counts,
                              double scale) {
  check_attention(query, key_pool, value_pool, page_table, lengths, indices, counts);
  return Attend(query, key_pool, value_pool, page_table, lengths, indices, counts, scale);
}

}  // namespace

TORCH_LIBRARY(spot, library) {
  library.def(
      "append_selector_keys(Tensor(a!) pool, Tensor slots, Tensor keys, str format, float global_scale=1.0) "
      "-> ()");
  library.def(
      "gather_selector_keys(Tensor pool, Tensor page_table, int length, str format, float global_scale=1.0) "
      "-> Tensor");
  library.def(
      "score_blocks(Tensor query, Tensor weight, Tensor pool, Tensor page_table, Tensor lengths, str format, "
      "float global_scale=1.0, int max_blocks=0) -> Tensor");
  library.def(
      "select_blocks(Tensor scores, Tensor lengths, str mode='top_p', float p=0.9, int budget=0, "
      "float budget_fraction=0.0, int sinks=128, int recency=256, int floor=512, int cap=0, float "
      "temperature=1.0, "
      "int max_selected=0) -> (Tensor indices, Tensor counts, Tensor predicted_mass)");
  library.def(
      "sparse_decode_attention(Tensor query, Tensor key_pool, Tensor value_pool, Tensor page_table, Tensor "
      "lengths, "
      "Tensor indices, Tensor counts, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(spot, CPU, library) {
  library.impl("append_selector_keys", append_boundary<cpu::append_selector_keys>);
  library.impl("gather_selector_keys", [](const at::Tensor& pool, const at::Tensor& page_table,
                                          int64_t length, std::string format, double global_scale) {
    check_gather(pool, page_table, length, format);
    return cpu::gather_selector_keys(pool, page_table, length, format, global_scale);
  });
  library.impl("score_blocks", score_boundary<cpu::score_blocks>);
  library.impl("select_blocks", select_boundary<cpu::select_blocks>);
  library.impl("sparse_decode_attention", attention_boundary<cpu::sparse_decode_attention>);
}

namespace {

template <typename Signature>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale) {
  static const auto op = handle<void(at::Tensor, const at::Tensor&, const at::Tensor&, std::string, double)>(
      "spot::append_selector_keys");
  op.call(pool, slots, keys, format, global_scale);
}

at::Tensor gather_selector_keys(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                                const std::string& format, double global_scale) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, std::string, double)>(
          "spot::gather_selector_keys");
  return op.call(pool, page_table, length, format, global_scale);
}

at::Tensor score_blocks(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                        const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format,
                        double global_scale, int64_t max_blocks) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, std::string, double, int64_t)>("spot::score_blocks");
  return op.call(query, weight, pool, page_table, lengths, format, global_scale, max_blocks);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(const at::Tensor& scores,
                                                             const at::Tensor& lengths,
                                                             const SelectArguments& a) {
  static const auto op = handle<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, std::string, double, int64_t, double, int64_t, int64_t, int64_t,
      int64_t, double, int64_t)>("spot::select_blocks");
  return op.call(scores, lengths, a.top_p ? "top_p" : "top_k", a.p, a.budget, a.budget_fraction, a.sinks,
                 a.recency, a.floor, a.cap, a.temperature, a.max_selected);
}

at::Tensor sparse_decode_attention(const at::Tensor& query, const at::Tensor& key_pool,
                                   const at::Tensor& value_pool, const at::Tensor& page_table,
                                   const at::Tensor& lengths, const at::Tensor& indices,
                                   const at::Tensor& counts, double scale) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
          "spot::sparse_decode_attention");
  return op.call(query, key_pool, value_pool, page_table, lengths, indices, counts, scale);
}

}  // namespace spot::ops
