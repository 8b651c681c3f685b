// Tensors to the pointers of the selection and attention kernels, on the current stream. Launches may begin while
// their predecessor drains (programmatic dependent launch). Nothing here waits for the device, so all may be
// captured in a CUDA graph (after one call outside it, which makes the workspace).
#include "kernels/select_and_attend.h"
#include "ops/attention/attention.h"
#include "ops/cuda/attention_call.h"
#include "ops/cuda/call.h"
#include "ops/settled_history.h"

namespace spot::ops::cuda {

AttentionCall::AttentionCall(const at::Tensor& query_, const at::Tensor& key_pool,
                             const at::Tensor& value_pool, const at::Tensor& page_table,
                             const at::Tensor& lengths_, int64_t groups, double scale,
                             const at::Tensor& key_scale, const at::Tensor& value_scale)
    : query(query_.contiguous()),
      table(page_table.contiguous()),  // the kernels step by rows; an expanded one has none
      lengths(lengths_.contiguous()),
      output(at::empty_like(query)) {
  TORCH_CHECK(
      query.scalar_type() != at::kFloat,
      "spot::sparse_decode_attention: float32 runs on the CPU only; load the model in bfloat16 or float16");
  params.type = data_type(query);
  params.batch = narrow(query.size(0));
  params.num_heads = narrow(query.size(1));
  params.num_kv_heads = narrow(key_pool.size(0));
  params.head_dim = narrow(query.size(2));
  params.scale = static_cast<float>(scale);
  params.queries = query.const_data_ptr();
  params.keys = key_pool.const_data_ptr();
  params.values = value_pool.const_data_ptr();
  params.e4m3 = key_pool.scalar_type() == at::kFloat8_e4m3fn;
  const auto set_scale = [](const at::Tensor& scale, const float*& numbers, int64_t& stride) {
    if (!scale.defined()) return;
    numbers = scale.const_data_ptr<float>();
    stride = scale.numel() > 1 ? scale.stride(0) : 0;
  };
  set_scale(key_scale, params.key_scales, params.key_scale_stride);
  set_scale(value_scale, params.value_scales, params.value_scale_stride);
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

namespace {

SelectBlocks::Result empty_choice(const at::Tensor& scores, const at::Tensor& lengths, int64_t width) {
  return {at::empty({scores.size(0), scores.size(1), width}, lengths.options()),
          at::empty({scores.size(0), scores.size(1)}, lengths.options()),
          at::empty({scores.size(0), scores.size(1)}, scores.options())};
}

}  // namespace

SelectBlocks::Result select_blocks(const SelectBlocks& a) {
  const auto& [scores, lengths, rule, max_selected] = a;
  const c10::DeviceGuard guard(scores.device());
  const at::Tensor dense = scores.contiguous(), visible = lengths.contiguous();
  const int64_t rows = scores.size(0), groups = scores.size(1), blocks = scores.size(2);
  kernels::SelectBlocksParams params;
  params.rules = rule;
  const int64_t width = select_width(rule, max_selected, blocks);
  SelectBlocks::Result chosen = empty_choice(dense, visible, width);
  if (rows * groups == 0) return chosen;
  params.rows_per_sequence = narrow(groups);
  params.score_stride = blocks;
  params.max_selected = narrow(width);
  params.overlap = kernels::Overlap::kLaunch;
  params.rows = narrow(rows * groups);
  params.scores = dense.const_data_ptr<float>();
  params.lengths = visible.const_data_ptr<int32_t>();
  params.selected = chosen.indices.mutable_data_ptr<int32_t>();
  params.counts = chosen.counts.mutable_data_ptr<int32_t>();
  params.covered_share = chosen.predicted_mass.mutable_data_ptr<float>();
  check(kernels::select_blocks(params, native_stream(scores)), "spot::select_blocks");
  return chosen;
}

at::Tensor sparse_decode_attention(const SparseDecodeAttention& a) {
  const auto& [query, key_pool, value_pool, page_table, lengths, scale, indices, counts, key_scale,
               value_scale] = a;
  const c10::DeviceGuard guard(query.device());
  AttentionCall call(query, key_pool, value_pool, page_table, lengths, counts.defined() ? counts.size(1) : 1,
                     scale, key_scale, value_scale);
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

SelectAndAttend::Result select_and_attend(const SelectAndAttend& a) {
  const auto& [scores, query, key_pool, value_pool, page_table, lengths, scale, rule, max_selected, with_mass,
               key_scale, value_scale] = a;
  const c10::DeviceGuard guard(query.device());
  const at::Tensor dense = scores.contiguous();
  AttentionCall call(query, key_pool, value_pool, page_table, lengths, scores.size(1), scale, key_scale,
                     value_scale);
  kernels::SelectAndAttendParams params;
  params.rules = rule;
  const int64_t width = select_width(rule, max_selected, scores.size(2));
  SelectBlocks::Result chosen = empty_choice(dense, call.lengths, width);
  params.scores = dense.const_data_ptr<float>();
  params.score_stride = dense.size(2);
  params.max_blocks = narrow(dense.size(2));
  params.selected = chosen.indices.mutable_data_ptr<int32_t>();
  params.max_selected = narrow(width);
  params.counts = chosen.counts.mutable_data_ptr<int32_t>();
  if (!with_mass) chosen.predicted_mass = chosen.predicted_mass.new_empty({0});
  params.covered_share = with_mass ? chosen.predicted_mass.mutable_data_ptr<float>() : nullptr;
  params.attention = call.params;
  // A copy made here is no history.
  const bool in_place =
      call.query.is_same(query) && call.table.is_same(page_table) && call.lengths.is_same(lengths);
  params.overlap =
      SettledHistory::holds() && in_place ? kernels::Overlap::kHistory : kernels::Overlap::kLaunch;
  if (call.output.numel() != 0)
    check(kernels::select_and_attend(params, native_stream(query)), "spot::select_and_attend");
  return {call.output, chosen.indices, chosen.counts, chosen.predicted_mass};
}

}  // namespace spot::ops::cuda
