#include "ops/selector/key_pages.h"

#include <cstring>

namespace spot::ops::cpu {

using kernels::KeyFormat;
using kernels::kKeyDim;
using kernels::kPageTokens;

KeyPages::KeyPages(KeyFormat format, double global_scale)
    : plain_(format == KeyFormat::f32),
      format_(format),
      global_scale_(static_cast<float>(global_scale)),
      bytes_(kernels::page_head_bytes(format)) {
  if (plain_) return;
  const int bits = kernels::code_bits(format_);
  for (uint32_t byte = 0; byte < 256 && bits < 16; ++byte) {
    if (bits == 8) {
      values_.push_back(kernels::decode_value(format_, byte));
    } else {
      values_.push_back(kernels::decode_value(format_, kernels::unpack_lower(format_, byte)));
      values_.push_back(kernels::decode_value(format_, kernels::unpack_upper(format_, byte)));
    }
    if (kernels::scale_bytes(format_) == 1)
      scales_.push_back(kernels::decode_scale(format_, byte, global_scale_));
  }
  // Dims in ascending order; of a 4-bit pair (d, d + 8) the lower one stands for both.
  for (int token = 0; token < kPageTokens; ++token)
    for (int dim = 0; dim < kKeyDim; ++dim)
      if (bits != 4 || dim % 16 < 8)
        order_.push_back(static_cast<uint16_t>(kernels::code_offset(format_, token, dim)));
}

void KeyPages::encode(const float* x, int token, uint8_t* page_head) const {
  if (plain_)
    std::memcpy(page_head + token * kKeyDim * sizeof(float), x, kKeyDim * sizeof(float));
  else
    kernels::encode_key(format_, x, token, page_head, global_scale_);
}

const float* KeyPages::decode(const uint8_t* page_head, int tokens, float* buffer) const {
  if (plain_) return reinterpret_cast<const float*>(page_head);
  const int bits = kernels::code_bits(format_), group_size = kernels::group_size(format_);
  const int groups = kernels::num_groups(format_);
  for (int token = 0; token < tokens; ++token) {
    float* x = buffer + token * kKeyDim;
    const uint16_t* order = order_.data() + token * (bits == 4 ? kKeyDim / 2 : kKeyDim);
    if (bits == 16) {
      for (int dim = 0; dim < kKeyDim; ++dim) {
        uint16_t code;
        std::memcpy(&code, page_head + order[dim], 2);
        x[dim] = kernels::bf16_to_float(code);
      }
      continue;
    }
    float scale[kKeyDim / 16];
    for (int g = 0; g < groups; ++g) {
      const uint8_t* at = page_head + kernels::scale_offset(format_, token, g);
      scale[g] =
          kernels::scale_bytes(format_) == 1
              ? scales_[*at]
              : kernels::bf16_to_float(static_cast<uint32_t>(at[0]) | static_cast<uint32_t>(at[1]) << 8);
    }
    if (bits == 8) {
      for (int dim = 0; dim < kKeyDim; ++dim)
        x[dim] = values_[page_head[order[dim]]] * scale[dim / group_size];
    } else {
      for (int step = 0; step < kKeyDim / 16; ++step) {
        const float s = scale[step * 16 / group_size];
        for (int i = 0; i < 8; ++i) {
          const float* pair = values_.data() + 2 * page_head[order[step * 8 + i]];
          x[step * 16 + i] = pair[0] * s;
          x[step * 16 + i + 8] = pair[1] * s;
        }
      }
    }
  }
  return buffer;
}

}  // namespace spot::ops::cpu
