// Paged store of the selector's keys, in the pools that hold keys and values too.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <vector>

#include "cache/page_pools.h"
#include "ops/selector/selector.h"
#include "selector/config.h"

namespace spot {

// A pool "selector_keys" per selector layer, [num_pages, key_heads, bytes] uint8; kernels/key_format.h says
// how a page of 16 tokens lies in it. Pages need no clearing when they change hands: only positions below a
// sequence's length are ever read.
class SelectorCache {
 public:
  // Declares them in `pools`. Throws Error for the format f32 elsewhere than on the CPU.
  SelectorCache(const SelectorConfig& config, const std::vector<int64_t>& layers, PagePools& pools,
                KeyFormat format);

  // Writes key [T, key_heads, head_dim] at slots [T] int64 (page * 16 + offset).
  void append(int64_t layer, const at::Tensor& slots, const at::Tensor& key);
  // The same of keys that still lack norm and RoPE, in one kernel.
  void append(int64_t layer, const at::Tensor& slots, const at::Tensor& projected,
              const ops::KeyPreparation& preparation);
  // The first `length` tokens of a sequence, dequantised: [length, key_heads, head_dim] float32. page_table
  // [pages] int32 is the sequence's row of Batch::page_table.
  at::Tensor gather(int64_t layer, const at::Tensor& page_table, int64_t length) const;

  at::Tensor pool(int64_t layer) const;
  // The float32 that multiplies every nvfp4 block scale. A constant, since keys arrive one at a time: with it
  // blocks whose largest number lies between 0.006 and 168 have a normal E4M3 scale, far around what
  // normalised keys reach.
  double global_scale() const { return format_ == KeyFormat::nvfp4 ? 0.0625 : 1.0; }
  KeyFormat format() const { return format_; }
  int64_t key_heads() const { return key_heads_; }
  // Bytes of one token in one layer, scales included.
  double bytes_per_token() const;

 private:
  KeyFormat format_;
  int64_t key_heads_, page_bytes_;
  std::map<int64_t, at::Tensor> pools_;
};

}  // namespace spot
