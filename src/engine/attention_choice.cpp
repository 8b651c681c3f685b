#include "engine/attention_choice.h"

#include <array>
#include <utility>

#include "core/error.h"

namespace spot {
namespace {

constexpr std::array<std::pair<AttentionKind, const char*>, 6> kKinds = {
    {{AttentionKind::dense, "dense"},
     {AttentionKind::spot, "spot"},
     {AttentionKind::streaming, "streaming"},
     {AttentionKind::oracle, "oracle"},
     {AttentionKind::quest, "quest"},
     {AttentionKind::twilight, "twilight"}}};

}  // namespace

std::string to_string(AttentionKind kind) {
  for (const auto& [value, word] : kKinds)
    if (value == kind) return word;
  fail("attention kind {} has no name", static_cast<int>(kind));
}

AttentionKind attention_kind_from_string(const std::string& word) {
  for (const auto& [value, name] : kKinds)
    if (word == name) return value;
  fail("attention '{}' is unknown; choose dense, spot, streaming, oracle, quest or twilight", word);
}

Policy make_policy(const AttentionSpec& spec, const Backbone& backbone, const Selector* selector,
                   PagePools& pools) {
  Policy made;
  switch (spec.kind) {
    case AttentionKind::dense:
      fail("dense attention selects nothing and has no policy");
    case AttentionKind::spot: {
      if (!selector)
        fail(
            "attention 'spot' needs a selector; name one with --selector, or distil one with `spot distill`");
      made.keys =
          std::make_unique<SelectorCache>(selector->config(), selector->layers(), pools,
                                          spec.cache_format.value_or(selector->config().cache_format));
      made.policy = std::make_unique<SpotPolicy>(*selector, *made.keys, spec.rule);
      break;
    }
    case AttentionKind::streaming:
      made.policy = std::make_unique<StreamingPolicy>(spec.rule.budget, spec.rule.sinks);
      break;
    case AttentionKind::oracle:
      made.policy = std::make_unique<OraclePolicy>(pools, spec.rule);
      break;
    case AttentionKind::quest:
      made.policy = std::make_unique<QuestPolicy>(backbone.config(), pools, spec.rule);
      break;
    case AttentionKind::twilight:
      made.policy = std::make_unique<TwilightPolicy>(backbone.config(), pools, spec.rule, spec.rule.p);
      break;
  }
  return made;
}

AttentionRun::AttentionRun(const AttentionSpec& spec, const Backbone& backbone, const Selector* selector,
                           int64_t max_tokens, int64_t num_sequences) {
  const int64_t num_pages = (max_tokens + kBlockSize - 1) / kBlockSize + num_sequences;
  cache_ = std::make_unique<ModelCache>(backbone.config(), num_pages, backbone.dtype(), backbone.device(),
                                        num_sequences);
  if (spec.kind == AttentionKind::dense) {
    backend_ = std::make_unique<DenseAttention>(*cache_);
    return;
  }
  policy_ = make_policy(spec, backbone, selector, cache_->pools());
  auto sparse = std::make_unique<SparseAttention>(*cache_, *policy_.policy, spec.sparse);
  sparse_ = sparse.get();
  backend_ = std::move(sparse);
}

}  // namespace spot
