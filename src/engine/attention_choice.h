// What attends in a run, by name, with the caches it needs.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "attention/sparse.h"
#include "model/backbone.h"
#include "model/model_cache.h"
#include "selector/selector.h"

namespace spot {

enum class AttentionKind { dense, spot, streaming, oracle, quest, twilight };

std::string to_string(AttentionKind kind);
// Throws Error naming the accepted words.
AttentionKind attention_kind_from_string(const std::string& word);

struct AttentionSpec {
  AttentionKind kind = AttentionKind::dense;
  // streaming takes rule.budget (tokens) and rule.sinks; twilight takes a top_k rule for Quest, and prunes to
  // rule.p
  SelectionRule rule;
  SparseOptions sparse;
  std::optional<KeyFormat> cache_format;  // of the selector's keys; without it the selector's own
};

// A policy, and the selector's keys that it feeds, in the pools of a cache that outlives both. `selector` is
// needed for spot only (Error without it) and must outlive the result.
struct Policy {
  std::unique_ptr<SelectorCache> keys;
  std::unique_ptr<SelectionPolicy> policy;
};
Policy make_policy(const AttentionSpec& spec, const Backbone& backbone, const Selector* selector,
                   PagePools& pools);

// KV cache, policy and backend of one run over at most `max_tokens` tokens in all (each sequence rounded up
// to whole pages).
class AttentionRun {
 public:
  AttentionRun(const AttentionSpec& spec, const Backbone& backbone, const Selector* selector,
               int64_t max_tokens, int64_t num_sequences = 1);
  PagedCache& cache() { return *cache_; }
  AttentionBackend& backend() { return *backend_; }
  // The sparse backend, for its counters; null for dense.
  SparseAttention* sparse() { return sparse_; }

 private:
  std::unique_ptr<ModelCache> cache_;
  Policy policy_;
  std::unique_ptr<AttentionBackend> backend_;
  SparseAttention* sparse_ = nullptr;
};

}  // namespace spot
