// A paged cache with the attention methods that read it: what an engine or an evaluation runs a model through.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "attention/kv_scales.h"
#include "attention/methods.h"
#include "model/backbone.h"
#include "model/model_cache.h"

namespace spot {

struct StackOptions {
  int64_t num_pages = 1;
  int64_t num_sequences = 1;  // at once, of models with recurrent states
  int64_t num_snapshots = 0;  // of those, for the prefix cache
  // An FP8 cache with these (attention/kv_scales.h); null: keys and values in the model's dtype.
  std::shared_ptr<const KvScales> kv_scales = nullptr;
};

// How a sequence of a batch attends.
struct Route {
  int64_t method = 0;    // index into AttentionStack::methods()
  bool selects = false;  // a prefill chunk each of whose queries selects for itself, as a decode row does
  int64_t context = 0;   // tokens of its prompt's context, by which prefill=auto chooses
};

// What sparse queries of some sequences attended to in a pass.
struct AttendedRows {
  int64_t first = 0;            // of the batch's sequences
  std::vector<int64_t> layers;  // that selected
  at::Tensor sums;              // [layers, sequences, 3] float64: queries, tokens attended, tokens visible
};

// Every token of every sequence goes into the stores of all methods, so that sequences of several methods can share
// the pages of a prompt that was read densely.
class AttentionStack : public AttentionBackend {
 public:
  // Backbone and selector outlive the stack. Throws Error on no method, on one that an FP8 cache does not serve, and as
  // the methods do.
  AttentionStack(const Backbone& backbone, const Selector* selector, std::vector<MethodSpec> methods,
                 const StackOptions& options);

  PagedCache& cache() { return *cache_; }
  const std::vector<MethodSpec>& methods() const { return specs_; }
  // A further method, at any time; its index. Throws Error when it keeps something of every token that no method
  // keeps since the stack was made ("quest" where there is none, another format of selector keys).
  int64_t add_method(const MethodSpec& spec);
  // Puts another in the place of a method that no sequence uses any more. Throws Error as add_method does; then
  // nothing has changed.
  void replace_method(int64_t method, const MethodSpec& spec);
  // Null for dense attention. Methods with equal stores share a policy, whose rule is that of the last one run.
  SelectionPolicy* policy(int64_t method) {
    const int64_t policy = methods_.at(static_cast<size_t>(method)).policy;
    return policy < 0 ? nullptr : policies_[static_cast<size_t>(policy)].policy.get();
  }
  // Whether a decode step of the method needs nothing of the host, so that a CUDA graph can hold it.
  bool decodes_on_device(int64_t method) const;

  // Before each forward pass: how its sequences attend. Without routes all follow the first method.
  void begin_pass(const Batch& batch, const std::vector<Route>& routes = {});
  // After it: decode rows and chunks that selected for themselves, by method. Nothing is waited for.
  std::vector<AttendedRows> attended();
  // Sees the selections of all methods from now on; {}: nobody does.
  void set_observer(const SelectionObserver& observer);

  AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) override;
  at::Tensor forward(const AttentionInputs& inputs) override;

 private:
  struct Method {
    int64_t policy = -1;                      // of policies_; -1 for dense attention
    bool shares = false;                      // the policy, with others of equal stores
    std::unique_ptr<SparseAttention> sparse;  // null for dense attention
  };
  // Neighbouring sequences that attend alike.
  struct Part {
    int64_t method = 0;
    bool sparse = false;   // else densely, whatever the method
    bool selects = false;  // of its chunks
    int64_t first = 0, first_row = 0, rows = 0;
    Batch batch;
  };
  struct Record {
    int64_t layer, first;
    bool chunk;
    Selection selection;
    at::Tensor lengths;
  };
  at::Tensor attend(const Part& part, const AttentionInputs& inputs);
  Method make_method(const MethodSpec& spec);
  int64_t policy_for(const MethodSpec& spec);

  const ModelConfig& model_;
  const Selector* selector_;
  std::unique_ptr<PagedCache> cache_;
  std::vector<MethodSpec> specs_;
  std::vector<Method> methods_;
  std::vector<Policy> policies_;
  std::vector<MethodSpec> policy_specs_;  // what each policy was made for
  bool made_ = false;                     // from then on no pools are declared
  SelectionObserver observer_;
  bool attends_on_device_ = false;

  std::vector<Part> parts_;  // of this pass
  int64_t prepared_ = -1;    // the policy whose selector the layer's prologue served
  const Part* attending_ = nullptr;
  std::vector<Record> records_;
};

}  // namespace spot
