// One layer's caches full of keys and values whose attention is as concentrated as asked, for timing decode attention.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <vector>

namespace spot {

struct DecodeShape {
  std::string name;
  int64_t num_heads, num_kv_heads, head_dim;
};
// The attention shapes of the models that bench/configs holds.
const std::vector<DecodeShape>& decode_shapes();

// Logits of query head h and token j are sigma (sqrt(shared) z_j + sqrt(1 - shared) y_hj), z and y standard normal: weights are
// lognormal, and the fewest tokens that hold mass m of a head are the share Phi(Phi^-1(m) - sigma) of a long context,
// printed as measured. `shared` of the variance is common to all heads of the layer. `local` of the keys' variance, in
// every dim, is common to a block of 16 tokens. Selector keys carry z with correlation `fidelity`.
struct AttentionStatistics {
  double sigma = 3.5, shared = 0.7, local = 0.7, fidelity = 0.9;
};

// Everything one decode step of a layer reads, of `batch` sequences of `length` tokens (a multiple of 16) on scattered pages.
struct DecodeSet {
  at::Tensor keys, values;                  // [Hkv, pages, 16, head_dim]
  at::Tensor query;                         // [B, num_heads, head_dim]
  at::Tensor page_table, lengths, slots;    // [B, blocks] int32, [B] int32, [B] int64 (each sequence's last token)
  at::Tensor selector_query;                // [B, 4, 128]
  at::Tensor selector_weight;               // [B, 1, 4] float32
  at::Tensor selector_keys[2], new_keys[2];  // INT4 pools and the last token's keys [B, key_heads, 128]; key_heads 1 and 4
  at::Tensor bounds, codes, ranges;         // Quest's and Twilight's (ops/baseline_ops.h)
};

class DecodeScene {
 public:
  // `sets` independent sets (layers, as it were).
  DecodeScene(const DecodeShape& shape, int64_t length, int64_t batch, int64_t sets, const AttentionStatistics& statistics,
              at::ScalarType dtype, at::Device device, uint64_t seed);

  // Device bytes of one set.
  static int64_t set_bytes(const DecodeShape& shape, int64_t length, int64_t batch, at::ScalarType dtype);

  const DecodeSet& set(int64_t index) const { return sets_[static_cast<size_t>(index)]; }
  int64_t sets() const { return static_cast<int64_t>(sets_.size()); }
  const DecodeShape& shape() const { return shape_; }
  int64_t length() const { return length_; }
  int64_t batch() const { return batch_; }
  double scale() const;  // of the softmax

  // Attention probabilities of set 0's first row, [num_heads, length] float32.
  const at::Tensor& probabilities() const { return probabilities_; }
  // The mass that tokens [1 or Hkv, length] bool hold, the mean over query heads.
  double covered_mass(const at::Tensor& tokens) const;
  // The share of tokens that hold `mass` of a head's attention when the best are taken, the mean over heads.
  double tokens_holding(double mass) const;

 private:
  DecodeShape shape_;
  int64_t length_, batch_;
  std::vector<DecodeSet> sets_;
  at::Tensor probabilities_;
};

}  // namespace spot
