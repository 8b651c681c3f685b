// Random passes through one attention layer, with a record of every key and value to compare against.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "cache/batch_builder.h"
#include "model/attention.h"
#include "model/model_cache.h"
#include "tests/selection/support.h"
#include "tests/selector/support.h"

namespace spot::test {

// One layer's pass: random hidden, query, key and value for the batch's new tokens.
struct Pass {
  Batch batch;
  at::Tensor hidden, query, key, value;

  AttentionInputs inputs(int64_t layer, double scale) const {
    return {layer, hidden, query, key, value, scale, batch};
  }
};

// Sequences of a cache and all that was ever fed to one layer.
class LayerHistory {
 public:
  LayerHistory(const ModelConfig& model, int64_t num_pages, at::ScalarType dtype, int64_t num_sequences)
      : model_(model), cache_(model, num_pages, dtype, at::kCPU, num_sequences), dtype_(dtype) {
    // What no token was written to is NaN: reading it would show.
    for (int64_t layer : model.full_attention_layers()) {
      at::Tensor(cache_.pools().get("keys", layer)).fill_(NAN);
      at::Tensor(cache_.pools().get("values", layer)).fill_(NAN);
    }
    for (int64_t i = 0; i < num_sequences; ++i) {
      ids_.push_back(cache_.open_sequence());
      keys_.push_back(at::empty({0, model.num_kv_heads, model.head_dim}, dtype));
      values_.push_back(keys_.back());
    }
  }

  // Extends sequence i by counts[i] tokens (0: not in the batch).
  Pass next(const std::vector<int64_t>& counts) {
    Pass pass;
    std::vector<BatchEntry> entries;
    for (size_t i = 0; i < counts.size(); ++i)
      if (counts[i] > 0)
        entries.push_back({ids_[i], std::vector<int32_t>(static_cast<size_t>(counts[i]), 0)});
    pass.batch = build_batch(cache_, entries);
    const int64_t tokens = pass.batch.num_tokens();
    pass.hidden = at::randn({tokens, model_.hidden_size}).to(dtype_);
    pass.query = at::randn({tokens, model_.num_heads, model_.head_dim}).to(dtype_);
    pass.key = at::randn({tokens, model_.num_kv_heads, model_.head_dim}).to(dtype_);
    pass.value = at::randn({tokens, model_.num_kv_heads, model_.head_dim}).to(dtype_);
    int64_t row = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      keys_[i] = at::cat({keys_[i], pass.key.slice(0, row, row + counts[i])});
      values_[i] = at::cat({values_[i], pass.value.slice(0, row, row + counts[i])});
      row += counts[i];
    }
    return pass;
  }

  // Attention of row `row` of a pass (of sequence i at `position`) over chosen positions, in double.
  at::Tensor attention(const Pass& pass, int64_t row, int64_t i,
                       const std::vector<std::vector<int64_t>>& chosen) const {
    return plain_attention(pass.query[row], keys_[i].transpose(0, 1), values_[i].transpose(0, 1), chosen,
                           scale());
  }
  // The same over everything up to `position`.
  at::Tensor dense(const Pass& pass, int64_t row, int64_t i, int64_t position) const {
    std::vector<int64_t> all(position + 1);
    std::iota(all.begin(), all.end(), 0);
    return attention(pass, row, i, {all});
  }

  double scale() const { return 1 / std::sqrt(static_cast<double>(model_.head_dim)); }
  PagedCache& cache() { return cache_; }
  PagePools& pools() { return cache_.pools(); }
  int64_t id(int64_t i) const { return ids_[i]; }
  at::Tensor keys(int64_t i) const { return keys_[i]; }  // [length, Hkv, d]

 private:
  ModelConfig model_;
  ModelCache cache_;
  at::ScalarType dtype_;
  std::vector<int64_t> ids_;
  std::vector<at::Tensor> keys_, values_;
};

}  // namespace spot::test
