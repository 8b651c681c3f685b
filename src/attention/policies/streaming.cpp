#include "attention/policies/streaming.h"

#include "attention/methods.h"
#include "core/error.h"

namespace spot {
namespace {

SelectionRule window_rule(int64_t budget, int64_t sinks) {
  if (sinks < 0 || budget <= sinks)
    fail("a streaming window of {} tokens cannot hold {} sink tokens and a recent one; raise the budget",
         budget, sinks);
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = 0;  // the reserved blocks and no other
  rule.sinks = sinks;
  rule.recency = budget - sinks;
  rule.floor = budget;
  return rule;
}

}  // namespace

StreamingPolicy::StreamingPolicy(int64_t budget, int64_t sinks)
    : SelectionPolicy(window_rule(budget, sinks)) {}

at::Tensor StreamingPolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const int64_t blocks = (chunk.start + chunk.count + kBlockSize - 1) / kBlockSize;
  return at::zeros({chunk.count, 1, blocks}, inputs.query.options().dtype(at::kFloat));
}

AttentionMethod streaming_method() {
  AttentionMethod method{.word = "streaming", .summary = "the first tokens and a window of the latest"};
  method.make = [](const MethodSpec& spec, const ModelConfig&, const Selector*, PagePools&) {
    return Policy{nullptr, std::make_unique<StreamingPolicy>(spec.rule.budget, spec.rule.sinks)};
  };
  method.describe = [](const MethodSpec&) { return std::string(); };
  method.settings = {"k", "sinks", "dense", "prefill", "tile"};
  return method;
}

}  // namespace spot
