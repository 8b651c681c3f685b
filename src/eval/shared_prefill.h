// One dense prefill that feeds several policies, so that methods are compared after the same context at one
// cost.
#pragma once

#include <vector>

#include "attention/policy.h"

namespace spot {

// Dense attention that also lets every policy append to its own caches. `cache` and the policies outlive it.
class SharedPrefill : public AttentionBackend {
 public:
  SharedPrefill(KvCache& cache, std::vector<SelectionPolicy*> policies)
      : cache_(cache), dense_(cache), policies_(std::move(policies)) {}

  at::Tensor forward(const AttentionInputs& inputs) override {
    view_.update(cache_, inputs.batch, inputs.layer);
    at::Tensor out = dense_.forward(inputs);
    for (SelectionPolicy* policy : policies_)
      if (policy->covers(inputs.layer)) policy->append(inputs, cache_, view_);
    return out;
  }

 private:
  KvCache& cache_;
  DenseAttention dense_;
  BatchView view_;
  std::vector<SelectionPolicy*> policies_;
};

}  // namespace spot
