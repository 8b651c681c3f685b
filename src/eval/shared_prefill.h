// One dense prefill that feeds several policies, so that methods are compared after the same context at one
// cost.
#pragma once

#include <vector>

#include "attention/policy.h"

namespace spot {

// Dense attention that also lets every policy feed its own stores. `cache` and the policies outlive it.
class SharedPrefill : public AttentionBackend {
 public:
  SharedPrefill(const PagedCache& cache, std::vector<SelectionPolicy*> policies)
      : dense_(cache), policies_(std::move(policies)) {}

  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override {
    return dense_.prepare(layer, hidden, batch);
  }

  at::Tensor forward(const AttentionInputs& inputs) override {
    at::Tensor out = dense_.forward(inputs);
    for (SelectionPolicy* policy : policies_)
      if (policy->covers(inputs.layer)) policy->append(inputs);
    return out;
  }

 private:
  DenseAttention dense_;
  std::vector<SelectionPolicy*> policies_;
};

}  // namespace spot
