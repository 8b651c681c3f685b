#include "attention/policies/oracle.h"

#include "attention/methods.h"

namespace spot {

at::Tensor OraclePolicy::score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) {
  const at::Tensor key = sequence_tokens(pools_.tokens("keys", inputs.layer), inputs.batch, chunk.sequence,
                                         chunk.start + chunk.count);
  return attention_mass(chunk_rows(inputs.query, chunk), key, inputs.scale, chunk.start, groups_, reduction_)
      .to(at::kFloat)
      .log();
}

AttentionMethod oracle_method() {
  AttentionMethod method{.word = "oracle", .summary = "the true attention under the same rule"};
  method.make = [](const MethodSpec& spec, const ModelConfig& model, const Selector*, PagePools& pools) {
    const int64_t groups = spec.scope == SelectorScope::kv_group ? model.num_kv_heads : 1;
    return Policy{nullptr, std::make_unique<OraclePolicy>(pools, spec.rule, groups)};
  };
  method.settings = rule_settings();
  method.settings.insert("per");
  return method;
}

}  // namespace spot
