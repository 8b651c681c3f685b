#include "benchmark/decode_record.h"

#include <algorithm>
#include <optional>

#include "attention/policies/spot.h"
#include "attention/sparse.h"
#include "cache/batch_builder.h"
#include "core/error.h"
#include "core/memory.h"
#include "core/progress.h"
#include "model/model_cache.h"

namespace spot {

void check_recording(const ModelConfig& model, int64_t text_tokens, int64_t length, int64_t batch) {
  if (length < kBlockSize || length % kBlockSize != 0)
    fail("a recording of {} tokens a sequence: give a positive multiple of {}", length, kBlockSize);
  if (length > model.max_position_embeddings)
    fail("a recording of {} tokens a sequence passes the model's limit of {} positions; give shorter lengths",
         length, model.max_position_embeddings);
  if (batch * length > text_tokens)
    fail(
        "the text has {} tokens, {} sequences of {} need {}; give a longer text, or smaller lengths or batches",
        text_tokens, batch, length, batch * length);
}

DecodeScene record_decode(const Backbone& backbone, const Selector& selector,
                          const std::vector<int32_t>& text, int64_t length, int64_t batch, int64_t chunk) {
  const ModelConfig& model = backbone.config();
  check_recording(model, static_cast<int64_t>(text.size()), length, batch);
  std::optional<ModelCache> room;
  std::optional<SelectorCache> stored;
  within_memory({.what = fmt::format("a recording of {} sequences of {} tokens", batch, length),
                 .remedy = "give shorter lengths or smaller batches"},
                [&] {
                  room.emplace(model, batch * length / kBlockSize, backbone.dtype(), backbone.device(),
                               batch);
                  stored.emplace(selector.config(), selector.layers(), room->pools(), KeyFormat::int4);
                });
  ModelCache& cache = *room;
  SelectorCache& keys = *stored;
  SelectionRule all;  // every block, so that each layer's inputs are the dense model's
  all.mode = SelectionMode::top_k;
  all.budget_fraction = 1;
  SpotPolicy policy(selector, keys, all);

  const int kind = selector.config().key_heads == 1 ? 0 : 1;
  std::vector<DecodeSet> sets;
  SparseOptions options;
  options.count = false;
  options.observer = [&](const SelectionEvent& event) {
    const AttentionInputs& inputs = event.inputs;
    const at::Tensor& positions = inputs.batch.positions;
    const bool prepared = inputs.selector_query.defined();
    DecodeSet& set = sets.emplace_back();
    set.keys = event.keys.stored;
    set.values = cache.pools().get("values", event.layer);
    set.query = inputs.query.clone();
    set.page_table = inputs.batch.page_table.clone();
    set.lengths = inputs.batch.lengths.clone();
    set.slots = inputs.batch.slots.clone();
    set.selector_query = prepared ? inputs.selector_query.clone()
                                  : selector.project_query(event.layer, inputs.hidden, positions);
    set.selector_weight =
        (prepared ? inputs.selector_weight.clone() : selector.project_weight(event.layer, inputs.hidden))
            .view({batch, selector.groups(), selector.config().num_heads});
    set.selector_keys[kind] = keys.pool(event.layer);
    set.new_keys[kind] = selector.project_key(event.layer, inputs.hidden, positions);
    set.fitted = [&selector, layer = event.layer](const SelectionRule& rule) {
      return selector.fitted(layer, rule);
    };
    set.summarize_keys();
  };
  SparseAttention attention(cache, policy, options);

  std::vector<int64_t> sequences;
  std::vector<std::vector<int32_t>> last;
  Progress progress(fmt::format("record {} tokens", length), batch * length);
  for (int64_t i = 0; i < batch; ++i) {
    sequences.push_back(cache.open_sequence());
    const auto begin = text.begin() + i * length;
    for (int64_t done = 0; done < length - 1;) {
      const int64_t count = std::min(chunk, length - 1 - done);
      backbone.forward(
          build_batch(
              cache,
              {{.sequence = sequences[i], .tokens = {begin + done, begin + done + count}, .decode = false}}),
          attention, cache.states());
      done += count;
      progress.update(i * length + done);
    }
    last.push_back({begin[length - 1]});
  }
  backbone.forward(make_batch(cache, sequences, last), attention, cache.states());

  const SelectionRule tiers = selector.config().selection.rule;
  return {{model.architecture, model.num_heads, model.num_kv_heads, model.head_dim},
          length,
          batch,
          std::move(sets),
          tiers};
}

}  // namespace spot
