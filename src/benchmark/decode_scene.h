// What one decode step of a layer reads, for timing decode attention: keys and values whose attention is as
// concentrated as asked, or a model's own (benchmark/decode_record.h).
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "selector/config.h"

namespace spot {

struct DecodeShape {
  std::string name;
  int64_t num_heads, num_kv_heads, head_dim;
};
// The attention shapes of the models that bench/configs holds.
const std::vector<DecodeShape>& decode_shapes();

// Logits of query head h and token j are sigma (sqrt(shared) z_j + sqrt(1 - shared) y_hj), z and y standard
// normal: weights are lognormal, and the fewest tokens that hold mass m of a head are the share Phi(Phi^-1(m)
// - sigma) of a long context, printed as measured. `shared` of the variance is common to all heads of the
// layer. `local` of the keys' variance, in every dim, is common to a block of 16 tokens. Selector keys carry
// z with correlation `fidelity`.
struct AttentionStatistics {
  double sigma = 3.5, shared = 0.7, local = 0.7, fidelity = 0.9;
};

// Everything one decode step of a layer reads, of `batch` sequences of `length` tokens (a multiple of 16) on
// scattered pages.
struct DecodeSet {
  at::Tensor keys, values;  // [Hkv, pages, 16, head_dim]
  at::Tensor query;         // [B, num_heads, head_dim]
  at::Tensor page_table, lengths,
      slots;                   // [B, blocks] int32, [B] int32, [B] int64 (each sequence's last token)
  at::Tensor selector_query;   // [B, 4, 128]
  at::Tensor selector_weight;  // [B, 1 or Hkv, 4] float32
  // INT4 pools and the last token's keys [B, key_heads, 128]; key_heads 1 and 4. Undefined: the selector has
  // the other kind.
  at::Tensor selector_keys[2], new_keys[2];
  at::Tensor bounds, codes, ranges;  // Quest's and Twilight's (ops/baselines/baselines.h)
  // A rule with what the layer's selector was fitted to.
  std::function<SelectionRule(const SelectionRule&)> fitted = [](const SelectionRule& rule) { return rule; };

  // Fills bounds, codes and ranges from the keys, whose pages are all full.
  void summarize_keys();
};

class DecodeScene {
 public:
  // `sets` independent sets (layers, as it were).
  DecodeScene(const DecodeShape& shape, int64_t length, int64_t batch, int64_t sets,
              const AttentionStatistics& statistics, at::ScalarType dtype, at::Device device, uint64_t seed);
  // Sets of that shape from elsewhere; `tiers` has the reserved tokens, floor and cap of the selector's
  // rules.
  DecodeScene(const DecodeShape& shape, int64_t length, int64_t batch, std::vector<DecodeSet> sets,
              const SelectionRule& tiers = {});

  // Device bytes of one set and its probabilities.
  static int64_t set_bytes(const DecodeShape& shape, int64_t length, int64_t batch, at::ScalarType dtype);

  const DecodeSet& set(int64_t index) const { return sets_[static_cast<size_t>(index)]; }
  int64_t sets() const { return static_cast<int64_t>(sets_.size()); }
  const DecodeShape& shape() const { return shape_; }
  int64_t length() const { return length_; }
  int64_t batch() const { return batch_; }
  double scale() const;  // of the softmax
  bool has_selector(int64_t key_heads) const {
    return sets_.front().selector_keys[key_heads == 1 ? 0 : 1].defined();
  }
  const SelectionRule& tiers() const { return tiers_; }

  // Of a set's exact attention, means over its rows and query heads: the mass that tokens [B or none, 1 or
  // Hkv, length] bool hold;
  double covered_mass(const at::Tensor& tokens, int64_t set = 0) const;
  // the share of tokens that hold `mass` of a head when the best are taken.
  double tokens_holding(double mass, int64_t set = 0) const;

 private:
  DecodeShape shape_;
  int64_t length_, batch_;
  std::vector<DecodeSet> sets_;
  SelectionRule tiers_;
  std::vector<at::Tensor> probabilities_;  // by set, [B, num_heads, length] float32
};

}  // namespace spot
