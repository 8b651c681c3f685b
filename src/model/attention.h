// The seam between a backbone and what attends: the backbone projects, normalises and rotates; an
// AttentionBackend stores keys and values and returns the attention output. Dense, sparse and distilling
// passes differ only here.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "model/batch.h"
#include "model/kv_cache.h"
#include "ops/layer/layer.h"

namespace spot {

// What a backend wants done in the kernel that makes queries, keys and values, which saves it launches of its
// own.
struct AttentionPreparation {
  // Where keys and values are written: KvCache's pools of the layer, and slots [T] int64. Undefined: nowhere.
  at::Tensor key_pool, value_pool, slots;
  // Needs slots; all but `projected`, which the backbone makes with selector_projection [rows, hidden_size]:
  // in one product with its own where that lies right below Backbone::projection in memory.
  std::optional<ops::SelectorPrologue> selector;
  at::Tensor selector_projection;
};

// query, key and value are contiguous, in the model's dtype.
struct AttentionInputs {
  int64_t layer;      // index among all layers of the model
  at::Tensor hidden;  // [T, hidden_size], the layer's input after its input norm (what a selector sees)
  at::Tensor query;   // [T, num_heads, head_dim], after QK norm and RoPE
  at::Tensor key;     // [T, num_kv_heads, head_dim], after QK norm and RoPE
  at::Tensor value;   // [T, num_kv_heads, head_dim]
  double scale;       // softmax scale, head_dim^-1/2
  const Batch& batch;
  // What the backend's prepare() had done: key and value are in the cache; [T, 4, 128] and [T, groups * 4]
  // float32 of the selector, whose key is in its own cache, or undefined.
  bool stored = false;
  at::Tensor selector_query = {}, selector_weight = {};
};

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  // Called before forward() with the same layer, hidden and batch.
  virtual AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) {
    return {};
  }
  // Called once a forward pass and full-attention layer, in layer order. Returns [T, num_heads, head_dim] in
  // the dtype of query. Query t of a sequence attends to that sequence's positions <= its own.
  virtual at::Tensor forward(const AttentionInputs& inputs) = 0;
};

}  // namespace spot
