// Selector key pages of any format, to and from float32, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/key_format.h"

namespace spot::ops::cpu {

// Decodes pages of one head by tables: as kernels::decode_key, bit for bit, and some twenty times faster.
class KeyPages {
 public:
  KeyPages(kernels::KeyFormat format, double global_scale);

  int64_t page_head_bytes() const { return bytes_; }
  // Writes the key x[128] of `token` (0..15).
  void encode(const float* x, int token, uint8_t* page_head) const;
  // The first `tokens` keys, [tokens, 128] float32: in place for f32, else in `buffer` (16 * 128 floats).
  const float* decode(const uint8_t* page_head, int tokens, float* buffer) const;

 private:
  bool plain_;  // f32
  kernels::KeyFormat format_;
  float global_scale_;
  int64_t bytes_;
  std::vector<float> values_;    // by stored byte: int8 [256]; 4-bit [256][2], lower then upper
  std::vector<float> scales_;    // by stored scale byte: mxfp4, nvfp4 [256]
  std::vector<uint16_t> order_;  // [16][64 or 128] offset of each code, or byte of codes, of a token
};

}  // namespace spot::ops::cpu
