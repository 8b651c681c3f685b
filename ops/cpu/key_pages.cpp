#include "ops/cpu/key_pages.h"

#include <c10/util/Exception.h>

#include <cstring>

#include "ops/ops.h"

namespace spot::ops {
using kernels::KeyFormat;

kernels::KeyFormat cpu::parse_key_format(const std::string& format) {
  if (format == "bf16") return KeyFormat::kBf16;
  if (format == "int8") return KeyFormat::kInt8;
  if (format == "int4") return KeyFormat::kInt4;
  if (format == "mxfp4") return KeyFormat::kMxfp4;
  if (format == "nvfp4") return KeyFormat::kNvfp4;
  TORCH_CHECK(format != "f32",
              "selector key format f32 exists on the CPU only; use bf16, int8, int4, mxfp4 or nvfp4");
  TORCH_CHECK(false, "selector key format \"", format,
              "\" is unknown; use f32, bf16, int8, int4, mxfp4 or nvfp4");
}

int64_t page_head_bytes(const std::string& format) {
  if (format == "f32")
    return int64_t{kernels::kPageTokens} * kernels::kKeyDim * static_cast<int64_t>(sizeof(float));
  return kernels::page_head_bytes(cpu::parse_key_format(format));
}

namespace cpu {

using kernels::kKeyDim;
using kernels::kPageTokens;

KeyPages::KeyPages(const std::string& format, double global_scale)
    : global_scale_(static_cast<float>(global_scale)), bytes_(ops::page_head_bytes(format)) {
  plain_ = format == "f32";
  if (plain_) return;
  format_ = parse_key_format(format);
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

}  // namespace cpu
}  // namespace spot::ops
