// Tensors to the pointers of the selector's kernels, on the current stream. Launches may begin while their
// predecessor drains (programmatic dependent launch); nothing waits for the device.
#include "kernels/score_blocks.h"
#include "kernels/selector_key_append.h"
#include "ops/cuda/append_params.h"
#include "ops/cuda/call.h"
#include "ops/selector/selector.h"
#include "ops/settled_history.h"

namespace spot::ops::cuda {
namespace {

// float64 comes from tests only.
at::Tensor kernel_float(const at::Tensor& x) {
  return (x.scalar_type() == at::kDouble ? x.to(at::kFloat) : x).contiguous();
}

}  // namespace

kernels::SelectorKeyAppendParams append_params(const SelectorKeyAppend& a) {
  kernels::SelectorKeyAppendParams params;
  params.format = a.format;
  params.key_heads = narrow(a.keys.size(1));
  params.num_tokens = a.keys.size(0);
  params.keys = a.keys.const_data_ptr();
  params.key_type = data_type(a.keys);
  params.token_stride = a.keys.stride(0);
  const KeyPreparation& preparation = a.preparation;
  params.norm = preparation.norm;
  if (preparation.norm_weight.defined()) params.norm_weight = preparation.norm_weight.const_data_ptr<float>();
  if (preparation.norm_bias.defined()) params.norm_bias = preparation.norm_bias.const_data_ptr<float>();
  params.norm_epsilon = static_cast<float>(preparation.norm_eps);
  if (preparation.cos.defined()) {
    params.rope_cos = preparation.cos.const_data_ptr<float>();
    params.rope_sin = preparation.sin.const_data_ptr<float>();
    params.positions = preparation.positions.const_data_ptr<int64_t>();
  }
  params.slots = a.slots.const_data_ptr<int64_t>();
  params.pages = a.pool.mutable_data_ptr<uint8_t>();
  params.global_scale = static_cast<float>(a.global_scale);
  params.overlap = kernels::Overlap::kLaunch;
  return params;
}

void selector_key_append(const SelectorKeyAppend& a) {
  if (a.keys.size(0) == 0) return;
  const c10::DeviceGuard guard(a.pool.device());
  SelectorKeyAppend dense = a;
  dense.keys = kernel_float(a.keys);
  dense.slots = a.slots.contiguous();
  if (a.preparation.positions.defined()) dense.preparation.positions = a.preparation.positions.contiguous();
  check(kernels::selector_key_append(append_params(dense), native_stream(a.pool)),
        "spot::selector_key_append");
}

at::Tensor score_blocks(const ScoreBlocks& a) {
  const auto& [query, weight, pool, page_table, lengths, format, global_scale, max_blocks] = a;
  const c10::DeviceGuard guard(query.device());
  const int64_t groups = weight.size(1), width = max_blocks > 0 ? max_blocks : page_table.size(1);
  TORCH_CHECK(width <= page_table.size(1), "spot::score_blocks: max_blocks is ", width,
              ", but the page table has ", page_table.size(1), " pages");
  at::Tensor scores = at::empty({query.size(0), groups, width}, weight.options());
  if (scores.numel() == 0) return scores;
  // The kernel steps through a table by rows; an expanded one has none.
  const at::Tensor queries = kernel_float(query), table = page_table.contiguous(),
                   visible = lengths.contiguous();
  kernels::ScoreBlocksParams params;
  params.format = format;
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
  params.overlap =
      SettledHistory::holds() && in_place ? kernels::Overlap::kHistory : kernels::Overlap::kLaunch;
  const at::Tensor weights = weight.transpose(0, 1).contiguous();  // [groups, R, 4]
  for (int64_t g = 0; g < groups; ++g) {
    params.weights = weights.const_data_ptr<float>() + g * query.size(0) * kernels::kSelectorHeads;
    params.block_scores = scores.mutable_data_ptr<float>() + g * width;
    check(kernels::score_blocks(params, native_stream(query)), "spot::score_blocks");
  }
  return scores;
}

}  // namespace spot::ops::cuda
