#include <limits>

#include "attention/policy.h"
#include "core/error.h"

namespace spot {

QuestPolicy::QuestPolicy(const ModelConfig& model, int64_t num_pages, at::ScalarType dtype, at::Device device,
                         const SelectionRule& rule, SelectorScope scope)
    : SelectionPolicy(rule), num_kv_heads_(model.num_kv_heads), scope_(scope) {
  for (int64_t layer : model.full_attention_layers())
    bounds_[layer] =
        at::zeros({num_kv_heads_, num_pages, 2, model.head_dim}, at::TensorOptions(device).dtype(dtype));
}

void QuestPolicy::append_summaries(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view,
                                   const at::Tensor& codes, const at::Tensor& ranges) {
  const at::Tensor &bounds = bounds_.at(inputs.layer), &keys = cache.keys(inputs.layer);
  if (cache.num_pages() != bounds.size(1) || keys.scalar_type() != bounds.scalar_type())
    fail(
        "Quest holds bounds of {} pages in {}, the KV cache has {} in {}; they share page ids and must be alike",
        bounds.size(1), c10::toString(bounds.scalar_type()), cache.num_pages(),
        c10::toString(keys.scalar_type()));
  ops::key_summary_append({bounds, codes, ranges, keys, view.slots});
}

void QuestPolicy::append(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view) {
  append_summaries(inputs, cache, view, {}, {});
}

PolicyState QuestPolicy::export_pages(const std::vector<int32_t>& pages) const {
  PolicyState state;
  for (const auto& [layer, bounds] : bounds_)
    state[fmt::format("quest_bounds.{}", layer)] =
        bounds.index_select(1, page_index(pages, bounds.device())).transpose(0, 1).contiguous();
  return state;
}

void QuestPolicy::import_pages(const std::vector<int32_t>& pages, const PolicyState& state) {
  for (auto& [layer, bounds] : bounds_)
    bounds.index_copy_(1, page_index(pages, bounds.device()),
                       state_tensor(state, fmt::format("quest_bounds.{}", layer)).transpose(0, 1));
}

at::Tensor QuestPolicy::score_decode(const AttentionInputs& inputs, const KvCache&, const BatchView& view) {
  return ops::quest_score({inputs.query, bounds_.at(inputs.layer), view.page_table, view.lengths,
                           inputs.scale, scope_ != SelectorScope::layer});
}

at::Tensor QuestPolicy::score_chunk(const AttentionInputs& inputs, const KvCache& cache,
                                    const QueryChunk& chunk) {
  const int64_t length = chunk.start + chunk.count, blocks = (length + kBlockSize - 1) / kBlockSize;
  const at::Tensor pages =
      sequence_pages(cache, inputs.batch.sequences[chunk.sequence], blocks, inputs.query.device());
  const at::Tensor bounds = bounds_.at(inputs.layer)
                                .index_select(1, pages)
                                .to(at::kFloat)
                                .permute({2, 0, 3, 1});  // [2, Hkv, d, blocks]
  const int64_t group = inputs.query.size(1) / num_kv_heads_, dim = inputs.query.size(2);
  const at::Tensor query = (inputs.query.narrow(0, chunk.first, chunk.count).to(at::kFloat) * inputs.scale)
                               .view({chunk.count, num_kv_heads_, group, dim})
                               .permute({1, 2, 0, 3})
                               .reshape({num_kv_heads_, group * chunk.count, dim});
  // max(q m, q M) is q M where q > 0 and q m where q < 0.
  const at::Tensor bound =
      (at::matmul(query.clamp_min(0), bounds[1]) + at::matmul(query.clamp_max(0), bounds[0]))
          .view({num_kv_heads_, group, chunk.count, blocks});
  at::Tensor scores = scope_ == SelectorScope::layer
                          ? bound.mean(at::IntArrayRef({0, 1})).unsqueeze(1)  // [count, 1, blocks]
                          : bound.amax(1).transpose(0, 1);                    // [count, Hkv, blocks]
  const auto integers = inputs.batch.positions.options();
  const at::Tensor own_block = at::div(at::arange(chunk.start, length, integers), kBlockSize, "floor");
  const at::Tensor future = at::arange(blocks, integers).unsqueeze(0) > own_block.unsqueeze(1);
  return scores.masked_fill(future.unsqueeze(1), -std::numeric_limits<float>::infinity()).contiguous();
}

}  // namespace spot
