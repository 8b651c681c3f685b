#include "attention/policies/spot.h"

#include <algorithm>
#include <limits>

#include "attention/methods.h"
#include "core/error.h"
#include "ops/selector/selector.h"
#include "ops/settled_history.h"

namespace spot {

SpotPolicy::SpotPolicy(const Selector& selector, SelectorCache& cache, const SelectionRule& rule)
    : SelectionPolicy(rule), selector_(selector), keys_(cache) {
  if (cache.key_heads() != selector.config().key_heads)
    fail("the selector cache has {} key heads, the selector {}; make the cache from the selector's config",
         cache.key_heads(), selector.config().key_heads);
  for (int64_t layer : selector.layers()) cache.pool(layer);
}

SelectionRule SpotPolicy::rule(int64_t layer) const {
  return selector_.fitted(layer, rule_);
}

AttentionPreparation SpotPolicy::prepare(int64_t layer, const at::Tensor& hidden,
                                         const at::Tensor& positions) {
  return selector_.prologue(layer, hidden, positions, keys_);
}

void SpotPolicy::append(const AttentionInputs& inputs) {
  if (inputs.selector_query.defined()) return;  // prepare() has had it done
  selector_.append_keys(inputs.layer, inputs.hidden, inputs.batch.positions, inputs.batch.slots, keys_);
}

at::Tensor SpotPolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const at::Tensor hidden = chunk_rows(inputs.hidden, chunk),
                   positions = chunk_rows(inputs.batch.positions, chunk);
  const at::Tensor query = selector_.project_query(inputs.layer, hidden, positions).to(at::kFloat);
  const at::Tensor weight = selector_.project_weight(inputs.layer, hidden);
  const int64_t length = chunk.start + chunk.count, blocks = (length + kBlockSize - 1) / kBlockSize;
  const at::Tensor key =
      keys_.gather(inputs.layer, sequence_pages(inputs.batch, chunk.sequence, length), length);
  at::Tensor scores = at::empty({chunk.count, groups(), blocks}, weight.options());
  // In parts, so that the [4, queries, tokens] products stay small.
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 24) / (4 * length));
  for (int64_t done = 0; done < chunk.count; done += step) {
    const int64_t count = std::min(step, chunk.count - done);
    at::Tensor tokens = token_scores(query.narrow(0, done, count), weight.narrow(0, done, count), key);
    const at::Tensor position =
        at::arange(chunk.start + done, chunk.start + done + count, positions.options());
    tokens.masked_fill_(at::arange(length, positions.options()).unsqueeze(0) > position.unsqueeze(1),
                        -std::numeric_limits<double>::infinity());
    scores.narrow(0, done, count).copy_(block_max(tokens).transpose(0, 1));
  }
  return scores;
}

bool SpotPolicy::score_tiles(const AttentionInputs& inputs, TilePrefill& prefill) const {
  const int64_t dim = inputs.query.size(2);
  const auto dtype = inputs.query.scalar_type();
  if (!inputs.query.is_cuda() || (dtype != at::kBFloat16 && dtype != at::kHalf) ||
      (dim != 64 && dim != 128 && dim != 256))
    return false;
  prefill.selector_query = selector_.project_query(inputs.layer, inputs.hidden, inputs.batch.positions);
  prefill.selector_weight = selector_.project_weight(inputs.layer, inputs.hidden);
  prefill.selector_pool = keys_.pool(inputs.layer);
  prefill.format = keys_.format();
  prefill.global_scale = keys_.global_scale();
  prefill.rule = rule(inputs.layer);
  return true;
}

at::Tensor SpotPolicy::score_decode(const AttentionInputs& inputs) {
  const bool prepared = inputs.selector_query.defined();
  // The kernel before has written nothing but the step's query, weight and newest key.
  const ops::SettledHistory settled(prepared);
  return ops::score_blocks(
      {prepared ? inputs.selector_query
                : selector_.project_query(inputs.layer, inputs.hidden, inputs.batch.positions),
       prepared ? inputs.selector_weight.view({-1, groups(), inputs.selector_query.size(1)})
                : selector_.project_weight(inputs.layer, inputs.hidden),
       keys_.pool(inputs.layer), inputs.batch.page_table, inputs.batch.lengths, keys_.format(),
       keys_.global_scale()});
}

namespace {

Policy make_spot(const MethodSpec& spec, const ModelConfig&, const Selector* selector, PagePools& pools) {
  Policy made;
  made.keys = std::make_unique<SelectorCache>(selector->config(), selector->layers(), pools,
                                              spec.cache_format.value_or(selector->config().cache_format));
  made.policy = std::make_unique<SpotPolicy>(*selector, *made.keys, spec.rule);
  return made;
}

}  // namespace

AttentionMethod spot_method() {
  AttentionMethod method{.word = "spot", .summary = "the trained selector", .make = make_spot};
  method.needs_selector = true;
  method.decodes_on_device = true;
  method.same_stores = [](const MethodSpec& a, const MethodSpec& b, const Selector* selector) {
    const KeyFormat own = selector->config().cache_format;
    return a.cache_format.value_or(own) == b.cache_format.value_or(own);
  };
  method.settings = rule_settings();
  method.settings.insert({"m", "cache"});
  return method;
}

}  // namespace spot
