// The cache of a model: keys and values of its full-attention layers, recurrent states of the others.
#pragma once

#include <ATen/ATen.h>

#include <map>

#include "cache/paged_cache.h"
#include "checkpoint/config.h"

namespace spot {

// Scales of an FP8 cache: by full-attention layer, of keys and of values, [num_kv_heads] float32, powers of two.
struct KvScales {
  std::map<int64_t, at::Tensor> keys, values;
};

// Pools "keys" and "values" of every full-attention layer, [num_kv_heads, num_pages, 16, head_dim] of
// `dtype`, or with scales of float8_e4m3fn (a byte a number): a page of one head is contiguous, and a sequence
// whose pages are consecutive is a plain strided [num_kv_heads, tokens, head_dim] view. States as
// declare_states has them.
class ModelCache : public PagedCache {
 public:
  // num_sequences and num_snapshots matter to models with linear-attention layers only: how many sequences
  // can be open, and how many recurrent states are kept as prefix-cache entries.
  ModelCache(const ModelConfig& config, int64_t num_pages, at::ScalarType dtype, at::Device device,
             int64_t num_sequences = 1, int64_t num_snapshots = 0, const KvScales* scales = nullptr);
};

// States of every linear-attention layer, float32: "conv", the last conv_kernel - 1 inputs of the causal
// convolution, oldest first, [conv_kernel - 1, channels]; "recurrent", the delta rule's matrix, key by value,
// [num_value_heads, key_head_dim, value_head_dim].
void declare_states(StateSlots& states, const ModelConfig& config);

}  // namespace spot
