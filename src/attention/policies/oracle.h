#pragma once

#include "attention/mass.h"
#include "attention/policy.h"
#include "cache/page_pools.h"

namespace spot {

// The exact teacher under the same rule: block score = log of the block's head-averaged probability (sum over
// its tokens, or their max). Reads every key: the ceiling of what one set per group can capture, not a fast
// method.
class OraclePolicy : public SelectionPolicy {
 public:
  // Reads the pools "keys", which outlive the policy.
  OraclePolicy(const PagePools& pools, const SelectionRule& rule, int64_t groups = 1,
               BlockReduction reduction = BlockReduction::sum)
      : SelectionPolicy(rule), pools_(pools), groups_(groups), reduction_(reduction) {}
  std::string name() const override { return "oracle"; }
  int64_t groups() const override { return groups_; }
  at::Tensor score_chunk(const AttentionInputs& inputs, const QueryChunk& chunk) override;

 private:
  const PagePools& pools_;
  int64_t groups_;
  BlockReduction reduction_;
};

}  // namespace spot
