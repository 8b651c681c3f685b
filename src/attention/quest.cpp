#include <limits>

#include "attention/policy.h"
#include "core/error.h"

namespace spot {

QuestPolicy::QuestPolicy(const ModelConfig& model, int64_t num_pages, at::Device device,
                         const SelectionRule& rule, SelectorScope scope)
    : SelectionPolicy(rule), num_kv_heads_(model.num_kv_heads), scope_(scope) {
  const auto options = at::TensorOptions(device).dtype(at::kFloat);
  for (int64_t layer : model.full_attention_layers()) {
    min_[layer] = at::zeros({num_kv_heads_, num_pages, model.head_dim}, options);
    max_[layer] = at::zeros({num_kv_heads_, num_pages, model.head_dim}, options);
  }
}

// The bounds of every page that got tokens are taken anew from the whole page, so that a page that changed
// hands keeps nothing of its former owner.
void QuestPolicy::append(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view) {
  at::Tensor& low = min_.at(inputs.layer);
  at::Tensor& high = max_.at(inputs.layer);
  if (cache.num_pages() > low.size(1))
    fail("Quest holds bounds of {} pages, the KV cache {}; they share page ids and must be of one size",
         low.size(1), cache.num_pages());
  const at::Tensor keys = cache.keys(inputs.layer);
  constexpr float infinity = std::numeric_limits<float>::infinity();
  for (const QueryChunk& chunk : query_chunks(inputs.batch)) {
    const int64_t first = chunk.start / kBlockSize, length = chunk.start + chunk.count;
    const int64_t blocks = (length + kBlockSize - 1) / kBlockSize - first;
    const at::Tensor pages = view.page_table[chunk.sequence].narrow(0, first, blocks).to(at::kLong);
    at::Tensor page_keys = keys.index_select(1, pages).to(at::kFloat);  // [Hkv, blocks, 16, d]
    at::Tensor page_low = page_keys, page_high = page_keys;
    const int64_t filled = length % kBlockSize;
    if (filled != 0) {
      page_low = page_keys.clone();
      page_low.select(1, blocks - 1).narrow(1, filled, kBlockSize - filled).fill_(infinity);
      page_high.select(1, blocks - 1).narrow(1, filled, kBlockSize - filled).fill_(-infinity);
    }
    low.index_copy_(1, pages, page_low.amin(2));
    high.index_copy_(1, pages, page_high.amax(2));
  }
}

PolicyState QuestPolicy::export_pages(const std::vector<int32_t>& pages) const {
  PolicyState state;
  for (const auto& [layer, low] : min_) {
    const at::Tensor index = page_index(pages, low.device());
    state[fmt::format("quest_min.{}", layer)] = low.index_select(1, index).transpose(0, 1).contiguous();
    state[fmt::format("quest_max.{}", layer)] =
        max_.at(layer).index_select(1, index).transpose(0, 1).contiguous();
  }
  return state;
}

void QuestPolicy::import_pages(const std::vector<int32_t>& pages, const PolicyState& state) {
  for (auto& [layer, low] : min_) {
    const at::Tensor index = page_index(pages, low.device());
    low.index_copy_(1, index, state_tensor(state, fmt::format("quest_min.{}", layer)).transpose(0, 1));
    max_.at(layer).index_copy_(1, index,
                               state_tensor(state, fmt::format("quest_max.{}", layer)).transpose(0, 1));
  }
}

at::Tensor QuestPolicy::score_chunk(const AttentionInputs& inputs, const KvCache& cache,
                                    const QueryChunk& chunk) {
  const int64_t length = chunk.start + chunk.count, blocks = (length + kBlockSize - 1) / kBlockSize;
  const at::Tensor pages =
      sequence_pages(cache, inputs.batch.sequences[chunk.sequence], blocks, inputs.query.device());
  const at::Tensor low = min_.at(inputs.layer).index_select(1, pages).transpose(1, 2);  // [Hkv, d, blocks]
  const at::Tensor high = max_.at(inputs.layer).index_select(1, pages).transpose(1, 2);
  const int64_t group = inputs.query.size(1) / num_kv_heads_, dim = inputs.query.size(2);
  const at::Tensor query = (inputs.query.narrow(0, chunk.first, chunk.count).to(at::kFloat) * inputs.scale)
                               .view({chunk.count, num_kv_heads_, group, dim})
                               .permute({1, 2, 0, 3})
                               .reshape({num_kv_heads_, group * chunk.count, dim});
  // max(q m, q M) is q M where q > 0 and q m where q < 0.
  const at::Tensor bound = (at::matmul(query.clamp_min(0), high) + at::matmul(query.clamp_max(0), low))
                               .view({num_kv_heads_, group, chunk.count, blocks});
  at::Tensor scores = scope_ == SelectorScope::layer ? bound.mean(at::IntArrayRef({0, 1})).unsqueeze(1)  // [count, 1, blocks]
                                                     : bound.amax(1).transpose(0, 1);  // [count, Hkv, blocks]
  const auto integers = inputs.batch.positions.options();
  const at::Tensor own_block = at::div(at::arange(chunk.start, length, integers), kBlockSize, "floor");
  const at::Tensor future = at::arange(blocks, integers).unsqueeze(0) > own_block.unsqueeze(1);
  return scores.masked_fill(future.unsqueeze(1), -std::numeric_limits<float>::infinity()).contiguous();
}

}  // namespace spot
