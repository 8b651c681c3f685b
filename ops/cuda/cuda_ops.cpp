#include "ops/cuda/cuda_ops.h"

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/score_blocks.h"
#include "kernels/select_and_attend.h"
#include "kernels/selector_key_append.h"
#include "ops/cpu/key_pages.h"
#include "ops/cuda/call.h"

namespace spot::ops::cuda {
namespace {

// float64 comes from tests only.
at::Tensor kernel_float(const at::Tensor& x) {
  return (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
}

// The kernels step through a table by rows; an expanded one has none.
at::Tensor table_rows(const at::Tensor& page_table) {
  return page_table.contiguous();
}

kernels::SelectParams rules_of(const SelectArguments& arguments) {
  kernels::SelectParams rules;
  rules.mode = arguments.top_p ? kernels::SelectMode::kTopP : kernels::SelectMode::kTopK;
  rules.sink_tokens = narrow(arguments.sinks);
  rules.recency_tokens = narrow(arguments.recency);
  rules.min_tokens = narrow(arguments.floor);
  rules.max_tokens = narrow(arguments.cap);
  rules.top_k_tokens = narrow(arguments.budget);
  rules.top_k_share = arguments.budget_fraction;
  rules.top_p = static_cast<float>(arguments.p);
  rules.temperature = static_cast<float>(arguments.temperature);
  return rules;
}

// Blocks that no row's choice can exceed, since the counts stay on the device.
int64_t selection_width(const SelectArguments& arguments, const kernels::SelectParams& rules,
                        int64_t blocks) {
  const int64_t least = kernels::smallest_capacity(rules);
  if (arguments.max_selected > 0) {
    TORCH_CHECK(arguments.max_selected >= least, "spot::select_blocks: max_selected is ",
                arguments.max_selected, " blocks, but the rule may keep at least ", least);
    return arguments.max_selected;
  }
  int64_t most = blocks;
  if (!arguments.top_p) {
    const double tokens = arguments.budget_fraction > 0
                              ? std::ceil(arguments.budget_fraction * static_cast<double>(16 * blocks))
                              : static_cast<double>(arguments.budget);
    most = (static_cast<int64_t>(tokens) + 15) / 16;
  }
  if (arguments.top_p && arguments.cap > 0) most = arguments.cap / 16;
  return std::max(least, std::min(most, blocks));
}

struct Chosen {
  at::Tensor indices, counts, mass;
  Chosen(const at::Tensor& scores, const at::Tensor& lengths, int64_t width)
      : indices(at::empty({scores.size(0), scores.size(1), width}, lengths.options())),
        counts(at::empty({scores.size(0), scores.size(1)}, lengths.options())),
        mass(at::empty({scores.size(0), scores.size(1)}, scores.options())) {}
};

}  // namespace

// A larger one is added beside a smaller one, which captured graphs may still point to.
void* zeroed_workspace(const at::Tensor& like, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<c10::DeviceIndex, c10::StreamId>, std::vector<at::Tensor>> workspaces;
  const c10::Stream stream = current_stream(like);
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<at::Tensor>& grown = workspaces[{stream.device_index(), stream.id()}];
  if (grown.empty() || grown.back().nbytes() < bytes)
    grown.push_back(at::zeros({static_cast<int64_t>(bytes * 2)}, like.options().dtype(at::kByte)));
  return grown.back().mutable_data_ptr();
}

AttentionCall::AttentionCall(const at::Tensor& query_, const at::Tensor& key_pool,
                             const at::Tensor& value_pool, const at::Tensor& page_table,
                             const at::Tensor& lengths_, int64_t groups, double scale)
    : query(query_.contiguous()),
      table(table_rows(page_table)),
      lengths(lengths_.contiguous()),
      output(at::empty_like(query)) {
  TORCH_CHECK(
      query.scalar_type() != at::kFloat,
      "spot::sparse_decode_attention: float32 runs on the CPU only; load the model in bfloat16 or float16");
  TORCH_CHECK(key_pool.stride(3) == 1 && key_pool.strides() == value_pool.strides(),
              "spot::sparse_decode_attention: the pools' strides are ", key_pool.strides(), " and ",
              value_pool.strides(), "; they must be equal, with contiguous dims");
  params.type = data_type(query);
  params.batch = narrow(query.size(0));
  params.num_heads = narrow(query.size(1));
  params.num_kv_heads = narrow(key_pool.size(0));
  params.head_dim = narrow(query.size(2));
  params.scale = static_cast<float>(scale);
  params.queries = query.const_data_ptr();
  params.keys = key_pool.const_data_ptr();
  params.values = value_pool.const_data_ptr();
  params.head_stride = key_pool.stride(0);
  params.page_stride = key_pool.stride(1);
  params.token_stride = key_pool.stride(2);
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.stride(0);
  params.lengths = lengths.const_data_ptr<int32_t>();
  params.rows_per_sequence = narrow(groups);
  params.overlap = kernels::Overlap::kLaunch;
  params.out = output.mutable_data_ptr();
  params.workspace_bytes = kernels::sparse_decode_workspace_bytes(params.batch, params.num_heads,
                                                                  params.num_kv_heads, params.head_dim);
  params.workspace = zeroed_workspace(query, params.workspace_bytes);
}

kernels::SelectorKeyAppendParams append_params(at::Tensor pool, const at::Tensor& slots,
                                               const at::Tensor& keys, const KeyPreparation& preparation,
                                               const at::Tensor& positions, const std::string& format,
                                               double global_scale) {
  kernels::SelectorKeyAppendParams params;
  params.format = cpu::parse_key_format(format);
  params.key_heads = narrow(keys.size(1));
  params.num_tokens = keys.size(0);
  params.keys = keys.const_data_ptr();
  params.key_type = data_type(keys);
  params.token_stride = keys.stride(0);
  params.norm = static_cast<kernels::KeyNorm>(preparation.norm);
  if (preparation.norm_weight.defined()) params.norm_weight = preparation.norm_weight.const_data_ptr<float>();
  if (preparation.norm_bias.defined()) params.norm_bias = preparation.norm_bias.const_data_ptr<float>();
  params.norm_epsilon = static_cast<float>(preparation.norm_eps);
  if (preparation.cos.defined()) {
    params.rope_cos = preparation.cos.const_data_ptr<float>();
    params.rope_sin = preparation.sin.const_data_ptr<float>();
    params.positions = positions.const_data_ptr<int64_t>();
  }
  params.slots = slots.const_data_ptr<int64_t>();
  params.pages = pool.mutable_data_ptr<uint8_t>();
  params.global_scale = static_cast<float>(global_scale);
  params.overlap = kernels::Overlap::kLaunch;
  return params;
}

void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format,
                           double global_scale) {
  if (keys.size(0) == 0) return;
  const c10::DeviceGuard guard(pool.device());
  const at::Tensor values = kernel_float(keys), where = slots.contiguous(),
                   positions =
                       preparation.positions.defined() ? preparation.positions.contiguous() : at::Tensor();
  check(kernels::selector_key_append(
            append_params(pool, where, values, preparation, positions, format, global_scale),
            native_stream(pool)),
        "spot::append_projected_keys");
}

void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale) {
  cuda::append_projected_keys(pool, slots, keys, KeyPreparation{}, format, global_scale);
}

at::Tensor score_blocks(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                        const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format,
                        double global_scale, int64_t max_blocks, bool history_settled) {
  const c10::DeviceGuard guard(query.device());
  const int64_t groups = weight.size(1), width = max_blocks > 0 ? max_blocks : page_table.size(1);
  TORCH_CHECK(width <= page_table.size(1), "spot::score_blocks: max_blocks is ", width,
              ", but the page table has ", page_table.size(1), " pages");
  at::Tensor scores = at::empty({query.size(0), groups, width}, weight.options());
  if (scores.numel() == 0) return scores;
  const at::Tensor queries = kernel_float(query), table = table_rows(page_table),
                   visible = lengths.contiguous();
  kernels::ScoreBlocksParams params;
  params.format = cpu::parse_key_format(format);
  params.key_heads = narrow(pool.size(1));
  params.batch = narrow(query.size(0));
  params.max_blocks = narrow(width);
  params.queries = queries.const_data_ptr();
  params.query_type = data_type(queries);
  params.pages = pool.const_data_ptr<uint8_t>();
  params.global_scale = static_cast<float>(global_scale);
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.stride(0);
  params.lengths = visible.const_data_ptr<int32_t>();
  params.score_stride = groups * width;
  // A copy made here is no history.
  const bool in_place = table.is_same(page_table) && visible.is_same(lengths);
  params.overlap = history_settled && in_place ? kernels::Overlap::kHistory : kernels::Overlap::kLaunch;
  const at::Tensor weights = weight.transpose(0, 1).contiguous();  // [G, R, 4]
  for (int64_t g = 0; g < groups; ++g) {
    params.weights = weights.const_data_ptr<float>() + g * query.size(0) * 4;
    params.block_scores = scores.mutable_data_ptr<float>() + g * width;
    check(kernels::score_blocks(params, native_stream(query)), "spot::score_blocks");
  }
  return scores;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(const at::Tensor& scores,
                                                             const at::Tensor& lengths,
                                                             const SelectArguments& arguments) {
  const c10::DeviceGuard guard(scores.device());
  const at::Tensor dense = scores.contiguous(), visible = lengths.contiguous();
  const int64_t rows = scores.size(0), groups = scores.size(1), blocks = scores.size(2);
  kernels::SelectBlocksParams params;
  params.rules = rules_of(arguments);
  const int64_t width = selection_width(arguments, params.rules, blocks);
  Chosen chosen(dense, visible, width);
  if (rows * groups == 0) return {chosen.indices, chosen.counts, chosen.mass};
  params.rows_per_sequence = narrow(groups);
  params.score_stride = blocks;
  params.max_selected = narrow(width);
  params.overlap = kernels::Overlap::kLaunch;
  params.rows = narrow(rows * groups);
  params.scores = dense.const_data_ptr<float>();
  params.lengths = visible.const_data_ptr<int32_t>();
  params.selected = chosen.indices.mutable_data_ptr<int32_t>();
  params.counts = chosen.counts.mutable_data_ptr<int32_t>();
  params.covered_share = chosen.mass.mutable_data_ptr<float>();
  check(kernels::select_blocks(params, native_stream(scores)), "spot::select_blocks");
  return {chosen.indices, chosen.counts, chosen.mass};
}

at::Tensor sparse_decode_attention(const at::Tensor& query, const at::Tensor& key_pool,
                                   const at::Tensor& value_pool, const at::Tensor& page_table,
                                   const at::Tensor& lengths, const at::Tensor& indices,
                                   const at::Tensor& counts, double scale) {
  const c10::DeviceGuard guard(query.device());
  AttentionCall call(query, key_pool, value_pool, page_table, lengths, counts.defined() ? counts.size(1) : 1,
                     scale);
  at::Tensor blocks, number;
  if (indices.defined()) {
    blocks = indices.contiguous();
    number = counts.contiguous();
    call.params.selected = blocks.const_data_ptr<int32_t>();
    call.params.counts = number.const_data_ptr<int32_t>();
    call.params.max_selected = narrow(blocks.size(2));
  }
  if (call.output.numel() != 0)
    check(kernels::sparse_decode_attention(call.params, native_stream(query)),
          "spot::sparse_decode_attention");
  return call.output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_and_attend(
    const at::Tensor& scores, const at::Tensor& query, const at::Tensor& key_pool,
    const at::Tensor& value_pool, const at::Tensor& page_table, const at::Tensor& lengths, double scale,
    const SelectArguments& arguments, bool with_mass, bool history_settled) {
  const c10::DeviceGuard guard(query.device());
  const at::Tensor dense = scores.contiguous();
  AttentionCall call(query, key_pool, value_pool, page_table, lengths, scores.size(1), scale);
  kernels::SelectAndAttendParams params;
  params.rules = rules_of(arguments);
  const int64_t width = selection_width(arguments, params.rules, scores.size(2));
  Chosen chosen(dense, call.lengths, width);
  params.scores = dense.const_data_ptr<float>();
  params.score_stride = dense.size(2);
  params.max_blocks = narrow(dense.size(2));
  params.selected = chosen.indices.mutable_data_ptr<int32_t>();
  params.max_selected = narrow(width);
  params.counts = chosen.counts.mutable_data_ptr<int32_t>();
  if (!with_mass) chosen.mass = chosen.mass.new_empty({0});
  params.covered_share = with_mass ? chosen.mass.mutable_data_ptr<float>() : nullptr;
  params.attention = call.params;
  // A copy made here is no history.
  const bool in_place =
      call.query.is_same(query) && call.table.is_same(page_table) && call.lengths.is_same(lengths);
  params.overlap = history_settled && in_place ? kernels::Overlap::kHistory : kernels::Overlap::kLaunch;
  if (call.output.numel() != 0)
    check(kernels::select_and_attend(params, native_stream(query)), "spot::select_and_attend");
  return {call.output, chosen.indices, chosen.counts, chosen.mass};
}

}  // namespace spot::ops::cuda
