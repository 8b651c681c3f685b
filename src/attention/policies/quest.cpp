#include "attention/policies/quest.h"

#include <limits>

#include "attention/methods.h"

namespace spot {

QuestPolicy::QuestPolicy(const ModelConfig& model, PagePools& pools, const SelectionRule& rule,
                         SelectorScope scope)
    : SelectionPolicy(rule), pools_(pools), num_kv_heads_(model.num_kv_heads), scope_(scope) {
  for (int64_t layer : model.full_attention_layers())
    bounds_[layer] = pools.add("quest_bounds", layer, {{num_kv_heads_}, {2, model.head_dim}},
                               pools.get("keys", layer).scalar_type());
}

void QuestPolicy::append_summaries(const AttentionInputs& inputs, const at::Tensor& codes,
                                   const at::Tensor& ranges) {
  ops::key_summary_append(
      {bounds_.at(inputs.layer), codes, ranges, pools_.get("keys", inputs.layer), inputs.batch.slots});
}

void QuestPolicy::append(const AttentionInputs& inputs) {
  append_summaries(inputs, {}, {});
}

at::Tensor QuestPolicy::score_decode(const AttentionInputs& inputs) {
  return ops::quest_score({inputs.query, bounds_.at(inputs.layer), inputs.batch.page_table,
                           inputs.batch.lengths, inputs.scale, scope_ != SelectorScope::layer});
}

at::Tensor QuestPolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const int64_t length = chunk.start + chunk.count, blocks = (length + kBlockSize - 1) / kBlockSize;
  const at::Tensor bounds = bounds_.at(inputs.layer)
                                .index_select(1, sequence_pages(inputs.batch, chunk.sequence, length))
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

AttentionMethod quest_method() {
  AttentionMethod method{.word = "quest", .summary = "Quest's bound of each page"};
  method.make = [](const MethodSpec& spec, const ModelConfig& model, const Selector*, PagePools& pools) {
    return Policy{nullptr, std::make_unique<QuestPolicy>(model, pools, spec.rule)};
  };
  method.decodes_on_device = true;
  method.reads_stored_keys = true;
  method.same_stores = [](const MethodSpec&, const MethodSpec&, const Selector*) { return true; };
  method.settings = rule_settings();
  return method;
}

}  // namespace spot
