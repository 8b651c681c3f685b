// Tensors to the pointers of the baselines' kernels, on the current stream. Launches may begin while their
// predecessor drains; nothing waits for the device.
#include <algorithm>
#include <cstdint>

#include "kernels/estimate_logits.h"
#include "kernels/key_summary_append.h"
#include "kernels/prune_tokens.h"
#include "kernels/quest_score.h"
#include "kernels/token_attention.h"
#include "ops/baselines/baselines.h"
#include "ops/cuda/attention_call.h"
#include "ops/cuda/call.h"

namespace spot::ops::cuda {
namespace {

kernels::DataType half_type(const at::Tensor& x, const char* op) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf, op, ": ", x.scalar_type(),
              " runs on the CPU only; load the model in bfloat16 or float16");
  return data_type(x);
}

}  // namespace

void key_summary_append(const KeySummaryAppend& a) {
  const auto& [bounds, codes, ranges, key_pool, slots] = a;
  const char* op = "spot::key_summary_append";
  const c10::DeviceGuard guard(bounds.device());
  const at::Tensor where = slots.contiguous();
  kernels::KeySummaryAppendParams params;
  params.type = half_type(key_pool, op);
  params.num_tokens = where.numel();
  params.num_kv_heads = narrow(key_pool.size(0));
  params.head_dim = narrow(key_pool.size(3));
  params.keys = key_pool.const_data_ptr();
  params.head_stride = key_pool.stride(0);
  params.page_stride = key_pool.stride(1);
  params.token_stride = key_pool.stride(2);
  params.slots = where.const_data_ptr<int64_t>();
  params.num_pages = key_pool.size(1);
  params.bounds = bounds.mutable_data_ptr();
  if (codes.defined()) {
    params.codes = codes.mutable_data_ptr<uint8_t>();
    params.ranges = ranges.mutable_data_ptr();
  }
  params.overlap = kernels::Overlap::kLaunch;
  check(kernels::key_summary_append(params, native_stream(bounds)), op);
}

at::Tensor quest_score(const QuestScore& a) {
  const auto& [query, bounds, page_table, lengths, scale, per_kv_head] = a;
  const bool mean = !per_kv_head;  // of each KV head's query heads, then of the KV heads
  const char* op = "spot::quest_score";
  const c10::DeviceGuard guard(query.device());
  const at::Tensor queries = query.contiguous(), table = page_table.contiguous(),
                   visible = lengths.contiguous();
  at::Tensor scores =
      at::empty({query.size(0), bounds.size(0), table.size(1)}, query.options().dtype(at::kFloat));
  kernels::QuestScoreParams params;
  params.type = half_type(query, op);
  params.batch = narrow(query.size(0));
  params.num_heads = narrow(query.size(1));
  params.num_kv_heads = narrow(bounds.size(0));
  params.head_dim = narrow(query.size(2));
  params.scale = static_cast<float>(scale);
  params.mean = mean;
  params.queries = queries.const_data_ptr();
  params.bounds = bounds.const_data_ptr();
  params.num_pages = bounds.size(1);
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.size(1);
  params.lengths = visible.const_data_ptr<int32_t>();
  params.max_blocks = narrow(table.size(1));
  params.scores = scores.mutable_data_ptr<float>();
  params.overlap = kernels::Overlap::kLaunch;
  if (scores.numel() != 0) check(kernels::quest_score(params, native_stream(query)), op);
  return mean ? scores.mean(1, true) : scores;
}

at::Tensor estimate_logits(const EstimateLogits& a) {
  const auto& [query, codes, ranges, page_table, lengths, indices, counts, scale] = a;
  const char* op = "spot::estimate_logits";
  const c10::DeviceGuard guard(query.device());
  const at::Tensor queries = query.contiguous(), table = page_table.contiguous(),
                   visible = lengths.contiguous(), blocks = indices.contiguous(),
                   number = counts.contiguous();
  at::Tensor logits = at::empty({query.size(0), query.size(1), blocks.size(2) * kernels::kPageTokens},
                                query.options().dtype(at::kFloat));
  kernels::EstimateLogitsParams params;
  params.type = half_type(query, op);
  params.batch = narrow(query.size(0));
  params.num_heads = narrow(query.size(1));
  params.num_kv_heads = narrow(codes.size(0));
  params.head_dim = narrow(query.size(2));
  params.scale = static_cast<float>(scale);
  params.queries = queries.const_data_ptr();
  params.codes = codes.const_data_ptr<uint8_t>();
  params.ranges = ranges.const_data_ptr();
  params.num_pages = codes.size(1) / kernels::kPageTokens;
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.size(1);
  params.lengths = visible.const_data_ptr<int32_t>();
  params.selected = blocks.const_data_ptr<int32_t>();
  params.counts = number.const_data_ptr<int32_t>();
  params.max_selected = narrow(blocks.size(2));
  params.logits = logits.mutable_data_ptr<float>();
  params.overlap = kernels::Overlap::kLaunch;
  if (logits.numel() != 0) check(kernels::estimate_logits(params, native_stream(query)), op);
  return logits;
}

PrunedTokens prune_tokens(const PruneTokens& a) {
  const auto& [logits, indices, counts, lengths, p, floor] = a;
  const c10::DeviceGuard guard(logits.device());
  const at::Tensor values = logits.contiguous(), blocks = indices.contiguous(), number = counts.contiguous(),
                   visible = lengths.contiguous();
  PrunedTokens pruned{
      at::empty({logits.size(0), blocks.size(1), blocks.size(2) * kernels::kPageTokens}, blocks.options()),
      at::empty_like(number)};
  kernels::PruneTokensParams params;
  params.batch = narrow(logits.size(0));
  params.num_heads = narrow(logits.size(1));
  params.num_kv_heads = narrow(blocks.size(1));
  params.p = static_cast<float>(p);
  params.floor = narrow(std::min<int64_t>(floor, INT32_MAX));
  params.lengths = visible.const_data_ptr<int32_t>();
  params.selected = blocks.const_data_ptr<int32_t>();
  params.counts = number.const_data_ptr<int32_t>();
  params.max_selected = narrow(blocks.size(2));
  params.logits = values.const_data_ptr<float>();
  params.tokens = pruned.positions.mutable_data_ptr<int32_t>();
  params.token_counts = pruned.counts.mutable_data_ptr<int32_t>();
  params.workspace_bytes =
      kernels::prune_tokens_workspace_bytes(params.batch, params.num_heads, params.max_selected);
  params.workspace = zeroed_workspace(logits, params.workspace_bytes);
  params.overlap = kernels::Overlap::kLaunch;
  if (number.numel() != 0) check(kernels::prune_tokens(params, native_stream(logits)), "spot::prune_tokens");
  return pruned;
}

at::Tensor token_attention(const TokenAttention& a) {
  const auto& [query, key_pool, value_pool, page_table, lengths, positions, counts, scale] = a;
  const c10::DeviceGuard guard(query.device());
  AttentionCall call(query, key_pool, value_pool, page_table, lengths, key_pool.size(0), scale);
  const at::Tensor tokens = positions.contiguous(), number = counts.contiguous();
  call.params.selected = tokens.const_data_ptr<int32_t>();
  call.params.counts = number.const_data_ptr<int32_t>();
  call.params.max_selected = narrow(tokens.size(2));
  if (call.output.numel() != 0)
    check(kernels::token_attention(call.params, native_stream(query)), "spot::token_attention");
  return call.output;
}

}  // namespace spot::ops::cuda
