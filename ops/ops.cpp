// Registration with torch's dispatcher. The C++ functions of ops.h lie in this file too and go through the
// dispatcher, so that whoever uses one links the registrations as well.
#include "ops/ops.h"

#include <torch/library.h>

#include "ops/checks.h"
#include "ops/cpu/cpu_ops.h"
#include "ops/gather_keys.h"
#ifdef SPOT_CUDA
#include "ops/cuda/cuda_ops.h"
#endif

namespace spot::ops {
namespace {

SelectArguments select_arguments(const at::Tensor& scores, const at::Tensor& lengths, const std::string& mode,
                                 double p, int64_t budget, double budget_fraction, int64_t sinks,
                                 int64_t recency, int64_t floor, int64_t cap, double temperature,
                                 int64_t max_selected) {
  TORCH_CHECK(mode == "top_p" || mode == "top_k", "spot::select_blocks: mode is \"", mode,
              "\"; it must be top_p or top_k");
  check_select(scores, lengths, mode == "top_p", p, temperature);
  for (int64_t tokens : {budget, sinks, recency, floor, cap, max_selected})
    TORCH_CHECK(tokens >= 0 && tokens <= (int64_t{1} << 30), "spot::select_blocks: a budget of ", tokens,
                " tokens; budgets must be 0 to 2^30");
  TORCH_CHECK(budget_fraction >= 0 && budget_fraction <= 1, "spot::select_blocks: budget_fraction is ",
              budget_fraction, "; it must be 0 (unused) to 1");
  return {mode == "top_p", p, budget, budget_fraction, sinks, recency, floor, cap, temperature, max_selected};
}

using MaybeTensor = std::optional<at::Tensor>;

// One device's implementations under the schemas below.
template <auto Append>
void append_boundary(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys, std::string format,
                     double global_scale) {
  check_append(pool, slots, keys, format);
  Append(pool, slots, keys, format, global_scale);
}

template <auto Append>
void append_projected_boundary(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                               std::string norm, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias,
                               double norm_eps, const MaybeTensor& cos, const MaybeTensor& sin,
                               const MaybeTensor& positions, std::string format, double global_scale) {
  check_append(pool, slots, keys, format);
  KeyPreparation preparation;
  preparation.norm = parse_key_norm(norm);
  preparation.norm_weight = norm_weight.value_or(at::Tensor());
  preparation.norm_bias = norm_bias.value_or(at::Tensor());
  preparation.norm_eps = norm_eps;
  preparation.cos = cos.value_or(at::Tensor());
  preparation.sin = sin.value_or(at::Tensor());
  preparation.positions = positions.value_or(at::Tensor());
  check_preparation(keys, preparation);
  Append(pool, slots, keys, preparation, format, global_scale);
}

template <auto Gather>
at::Tensor gather_boundary(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                           std::string format, double global_scale) {
  check_gather(pool, page_table, length, format);
  return Gather(pool, page_table, length, format, global_scale);
}

template <auto Score>
at::Tensor score_boundary(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                          const at::Tensor& page_table, const at::Tensor& lengths, std::string format,
                          double global_scale, int64_t max_blocks, bool history_settled) {
  check_score(query, weight, pool, page_table, lengths, format);
  return Score(query, weight, pool, page_table, lengths, format, global_scale, max_blocks, history_settled);
}

template <auto Select>
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_boundary(const at::Tensor& scores,
                                                               const at::Tensor& lengths, std::string mode,
                                                               double p, int64_t budget,
                                                               double budget_fraction, int64_t sinks,
                                                               int64_t recency, int64_t floor, int64_t cap,
                                                               double temperature, int64_t max_selected) {
  return Select(scores, lengths,
                select_arguments(scores, lengths, mode, p, budget, budget_fraction, sinks, recency, floor,
                                 cap, temperature, max_selected));
}

template <auto Attend>
at::Tensor attention_boundary(const at::Tensor& query, const at::Tensor& key_pool,
                              const at::Tensor& value_pool, const at::Tensor& page_table,
                              const at::Tensor& lengths, const MaybeTensor& indices,
                              const MaybeTensor& counts, double scale) {
  const at::Tensor blocks = indices.value_or(at::Tensor()), number = counts.value_or(at::Tensor());
  check_attention(query, key_pool, value_pool, page_table, lengths, blocks, number);
  return Attend(query, key_pool, value_pool, page_table, lengths, blocks, number, scale);
}

template <auto Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_and_attend_boundary(
    const at::Tensor& scores, const at::Tensor& query, const at::Tensor& key_pool,
    const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths, double scale,
    std::string mode, double p, int64_t budget, double budget_fraction, int64_t sinks, int64_t recency,
    int64_t floor, int64_t cap, double temperature, int64_t max_selected, bool with_mass,
    bool history_settled) {
  const SelectArguments arguments = select_arguments(scores, lengths, mode, p, budget, budget_fraction, sinks,
                                                     recency, floor, cap, temperature, max_selected);
  check_attention(query, key_pool, value_pool, page_table, lengths, at::Tensor(), at::Tensor());
  TORCH_CHECK(scores.size(1) == 1 || scores.size(1) == key_pool.size(0),
              "spot::select_and_attend: scores have ", scores.size(1), " groups; they must have 1 or ",
              key_pool.size(0));
  return Run(scores, query, key_pool, value_pool, page_table, lengths, scale, arguments, with_mass,
             history_settled);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_and_attend_cpu(
    const at::Tensor& scores, const at::Tensor& query, const at::Tensor& key_pool,
    const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths, double scale,
    const SelectArguments& arguments, bool with_mass, bool) {
  const auto [indices, counts, mass] = cpu::select_blocks(scores, lengths, arguments);
  return {
      cpu::sparse_decode_attention(query, key_pool, value_pool, page_table, lengths, indices, counts, scale),
      indices, counts, with_mass ? mass : mass.new_empty({0})};
}

}  // namespace

TORCH_LIBRARY(spot, library) {
  const std::string rule =
      "str mode='top_p', float p=0.9, int budget=0, float budget_fraction=0.0, int sinks=128, int "
      "recency=256, int floor=512, int cap=0, float temperature=1.0, int max_selected=0";
  const std::string pools = "Tensor key_pool, Tensor value_pool, Tensor page_table, Tensor lengths";
  library.def(
      "append_selector_keys(Tensor(a!) pool, Tensor slots, Tensor keys, str format, float global_scale=1.0) "
      "-> ()");
  library.def(
      "append_projected_keys(Tensor(a!) pool, Tensor slots, Tensor keys, str norm, Tensor? norm_weight, "
      "Tensor? norm_bias, float norm_eps, Tensor? cos, Tensor? sin, Tensor? positions, str format, "
      "float global_scale=1.0) -> ()");
  library.def(
      "gather_selector_keys(Tensor pool, Tensor page_table, int length, str format, float global_scale=1.0) "
      "-> Tensor");
  library.def(
      "score_blocks(Tensor query, Tensor weight, Tensor pool, Tensor page_table, Tensor lengths, str format, "
      "float global_scale=1.0, int max_blocks=0, bool history_settled=False) -> Tensor");
  library.def(("select_blocks(Tensor scores, Tensor lengths, " + rule +
               ") -> (Tensor indices, Tensor counts, Tensor predicted_mass)")
                  .c_str());
  library.def(("sparse_decode_attention(Tensor query, " + pools +
               ", Tensor? indices, Tensor? counts, float scale) -> Tensor")
                  .c_str());
  library.def(
      ("select_and_attend(Tensor scores, Tensor query, " + pools + ", float scale, " + rule +
       ", bool with_mass=True, bool history_settled=False) -> (Tensor output, Tensor indices, Tensor counts, Tensor predicted_mass)")
          .c_str());
}

TORCH_LIBRARY_IMPL(spot, CPU, library) {
  library.impl("append_selector_keys", append_boundary<cpu::append_selector_keys>);
  library.impl("append_projected_keys", append_projected_boundary<cpu::append_projected_keys>);
  library.impl("gather_selector_keys", gather_boundary<cpu::gather_selector_keys>);
  library.impl("score_blocks", score_boundary<cpu::score_blocks>);
  library.impl("select_blocks", select_boundary<cpu::select_blocks>);
  library.impl("sparse_decode_attention", attention_boundary<cpu::sparse_decode_attention>);
  library.impl("select_and_attend", select_and_attend_boundary<select_and_attend_cpu>);
}

#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  library.impl("append_selector_keys", append_boundary<cuda::append_selector_keys>);
  library.impl("append_projected_keys", append_projected_boundary<cuda::append_projected_keys>);
  library.impl("gather_selector_keys", gather_boundary<gather_selector_keys_by_tensors>);
  library.impl("score_blocks", score_boundary<cuda::score_blocks>);
  library.impl("select_blocks", select_boundary<cuda::select_blocks>);
  library.impl("sparse_decode_attention", attention_boundary<cuda::sparse_decode_attention>);
  library.impl("select_and_attend", select_and_attend_boundary<cuda::select_and_attend>);
}
#endif

namespace {

template <typename Signature>
auto handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

bool attends(const at::Tensor& query, const at::Tensor& key_pool) {
  const auto dtype = query.scalar_type();
  if (dtype != at::kBFloat16 && dtype != at::kHalf && (dtype != at::kFloat || !query.is_cpu())) return false;
  if (query.is_cpu()) return true;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("spot::sparse_decode_attention", "");
  const int64_t dim = query.size(2);
  return query.is_cuda() && op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) &&
         (dim == 64 || dim == 128 || dim == 256) && query.size(1) <= 16 * key_pool.size(0);
}

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale) {
  static const auto op = handle<void(at::Tensor, const at::Tensor&, const at::Tensor&, std::string, double)>(
      "spot::append_selector_keys");
  op.call(pool, slots, keys, format, global_scale);
}

void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format,
                           double global_scale) {
  static const auto op =
      handle<void(at::Tensor, const at::Tensor&, const at::Tensor&, std::string, const MaybeTensor&,
                  const MaybeTensor&, double, const MaybeTensor&, const MaybeTensor&, const MaybeTensor&,
                  std::string, double)>("spot::append_projected_keys");
  auto maybe = [](const at::Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; };
  op.call(pool, slots, keys, key_norm_name(preparation.norm), maybe(preparation.norm_weight),
          maybe(preparation.norm_bias), preparation.norm_eps, maybe(preparation.cos), maybe(preparation.sin),
          maybe(preparation.positions), format, global_scale);
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
                        double global_scale, int64_t max_blocks, bool history_settled) {
  static const auto op =
      handle<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                        const at::Tensor&, std::string, double, int64_t, bool)>("spot::score_blocks");
  return op.call(query, weight, pool, page_table, lengths, format, global_scale, max_blocks, history_settled);
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
                        const at::Tensor&, const MaybeTensor&, const MaybeTensor&, double)>(
          "spot::sparse_decode_attention");
  auto maybe = [](const at::Tensor& x) { return x.defined() ? MaybeTensor(x) : std::nullopt; };
  return op.call(query, key_pool, value_pool, page_table, lengths, maybe(indices), maybe(counts), scale);
}

SelectedAttention select_and_attend(const at::Tensor& scores, const at::Tensor& query,
                                    const at::Tensor& key_pool, const at::Tensor& value_pool,
                                    const at::Tensor& page_table, const at::Tensor& lengths, double scale,
                                    const SelectArguments& a, bool with_mass, bool history_settled) {
  static const auto op = handle<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const at::Tensor&, double, std::string, double, int64_t, double, int64_t, int64_t, int64_t, int64_t,
      double, int64_t, bool, bool)>("spot::select_and_attend");
  auto [output, indices, counts, mass] =
      op.call(scores, query, key_pool, value_pool, page_table, lengths, scale, a.top_p ? "top_p" : "top_k",
              a.p, a.budget, a.budget_fraction, a.sinks, a.recency, a.floor, a.cap, a.temperature,
              a.max_selected, with_mass, history_settled);
  return {output, indices, counts, mass};
}

}  // namespace spot::ops
