// The seam between a backbone and what attends: the backbone projects, normalises and rotates; an
// AttentionBackend stores keys and values and returns the attention output. Dense, sparse and distilling
// passes differ only here.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cache/batch.h"
#include "ops/layer/layer.h"

namespace spot {

// What a backend wants done in the kernel that makes queries, keys and values, which saves it launches of its
// own.
struct AttentionPreparation {
  // Where keys and values are written: the cache's pools of the layer, and slots [T] int64. Undefined:
  // nowhere.
  KvPools pools;
  at::Tensor slots;
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

  // The decode rows alone, or the prefill chunks alone; `part` is batch.decodes() or batch.prefills(), and
  // outlives the result.
  AttentionInputs decode_rows(const Batch& part) const { return rows(part, 0); }
  AttentionInputs prefill_rows(const Batch& part) const { return rows(part, batch.num_decodes); }
  AttentionInputs rows(const Batch& part, int64_t first) const {
    const auto of = [&](const at::Tensor& t) {
      return t.defined() ? t.narrow(0, first, part.num_tokens()) : t;
    };
    return {layer,  of(hidden),         of(query),          of(key), of(value), scale, part,
            stored, of(selector_query), of(selector_weight)};
  }
};

class AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;
  // Called before forward() with the same layer, hidden and batch.
  virtual AttentionPreparation prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) {
    return {};
  }
  // Called once a forward pass and full-attention layer, in layer order. Decode rows and prefill chunks of
  // the batch are apart: a row's result does not depend on what shares its batch. Returns [T, num_heads,
  // head_dim] in the dtype of query. Query t of a sequence attends to that sequence's positions <= its own.
  virtual at::Tensor forward(const AttentionInputs& inputs) = 0;
};

}  // namespace spot
