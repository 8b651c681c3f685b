#include "ops/gather_keys.h"

#include <vector>

#include "kernels/key_format.h"
#include "ops/cpu/key_pages.h"
#include "ops/ops.h"

namespace spot::ops {
namespace {

using kernels::KeyFormat;
using kernels::kKeyDim;
using kernels::kPageTokens;

at::Tensor on(const std::vector<float>& values, at::Device device) {
  return at::tensor(values, at::kFloat).to(device);
}
at::Tensor on(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(values, at::kLong).to(device);
}

// table[bytes], any shape.
at::Tensor look_up(const at::Tensor& table, const at::Tensor& bytes) {
  return table.index_select(0, bytes.flatten().to(at::kInt)).view(bytes.sizes());
}

}  // namespace

at::Tensor gather_selector_keys_by_tensors(const at::Tensor& pool, const at::Tensor& page_table,
                                           int64_t length, const std::string& format, double global_scale) {
  const int64_t blocks = (length + kPageTokens - 1) / kPageTokens, key_heads = pool.size(1);
  const at::Device device = pool.device();
  const at::Tensor pages =
      pool.index_select(0, page_table.slice(0, 0, blocks).to(at::kLong));  // [blocks, heads, bytes]
  auto finish = [&](const at::Tensor& keys) {                              // [blocks, heads, 16, 128]
    return keys.transpose(1, 2)
        .reshape({blocks * kPageTokens, key_heads, kKeyDim})
        .slice(0, 0, length)
        .contiguous();
  };
  if (format == "f32") return finish(pages.view(at::kFloat).view({blocks, key_heads, kPageTokens, kKeyDim}));

  const KeyFormat code = cpu::parse_key_format(format);
  const int bits = kernels::code_bits(code), groups = kernels::num_groups(code);
  std::vector<int64_t> code_at, scale_at;
  for (int token = 0; token < kPageTokens; ++token)
    for (int dim = 0; dim < kKeyDim; ++dim) code_at.push_back(kernels::code_offset(code, token, dim));
  if (bits == 16) {
    for (int64_t& offset : code_at) offset /= 2;
    return finish(pages.view(at::kBFloat16)
                      .index_select(2, on(code_at, device))
                      .to(at::kFloat)
                      .view({blocks, key_heads, kPageTokens, kKeyDim}));
  }
  for (int token = 0; token < kPageTokens; ++token)
    for (int group = 0; group < groups; ++group)
      for (int byte = 0; byte < kernels::scale_bytes(code); ++byte)
        scale_at.push_back(kernels::scale_offset(code, token, group) + byte);
  std::vector<float> lower, upper, scale_value;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    lower.push_back(kernels::decode_value(code, bits == 8 ? byte : kernels::unpack_lower(code, byte)));
    upper.push_back(bits == 8 ? lower.back()
                              : kernels::decode_value(code, kernels::unpack_upper(code, byte)));
    if (kernels::scale_bytes(code) == 1)
      scale_value.push_back(kernels::decode_scale(code, byte, static_cast<float>(global_scale)));
  }
  const at::Tensor codes =
      pages.index_select(2, on(code_at, device)).view({blocks, key_heads, kPageTokens, kKeyDim / 16, 2, 8});
  // The second eight dims of every sixteen lie in the upper half of the byte that the first eight share.
  at::Tensor keys = at::stack(
      {look_up(on(lower, device), codes.select(4, 0)), look_up(on(upper, device), codes.select(4, 1))}, 4);
  const at::Tensor scale_bytes = pages.index_select(2, on(scale_at, device));
  const at::Tensor scales = kernels::scale_bytes(code) == 1 ? look_up(on(scale_value, device), scale_bytes)
                                                            : scale_bytes.view(at::kBFloat16).to(at::kFloat);
  keys = keys.reshape({blocks, key_heads, kPageTokens, groups, kKeyDim / groups}) *
         scales.view({blocks, key_heads, kPageTokens, groups, 1});
  return finish(keys.view({blocks, key_heads, kPageTokens, kKeyDim}));
}

}  // namespace spot::ops
