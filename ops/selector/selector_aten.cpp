// The selector's operators made of torch's own: the only form of selector_project, and selector_key_gather for
// devices without a kernel of ours, equal bits to the CPU's.
#include <vector>

#include "kernels/key_format.h"
#include "ops/layer/layer.h"
#include "ops/selector/selector.h"

namespace spot::ops::aten {
namespace {

using kernels::kKeyDim;
using kernels::kPageTokens;
using kernels::kSelectorHeads;

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

at::Tensor selector_key_gather(const SelectorKeyGather& a) {
  const auto& [pool, page_table, length, code, global_scale] = a;
  const int64_t blocks = (length + kPageTokens - 1) / kPageTokens, key_heads = pool.size(1);
  const at::Device device = pool.device();
  const at::Tensor pages =
      pool.index_select(0, page_table.slice(0, 0, blocks).to(at::kLong));  // [blocks, heads, bytes]
  auto finish = [&, length = length](const at::Tensor& keys) {             // [blocks, heads, 16, 128]
    return keys.transpose(1, 2)
        .reshape({blocks * kPageTokens, key_heads, kKeyDim})
        .slice(0, 0, length)
        .contiguous();
  };
  if (code == KeyFormat::f32)
    return finish(pages.view(at::kFloat).view({blocks, key_heads, kPageTokens, kKeyDim}));

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

namespace {

at::Tensor widened(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
}

at::Tensor rotated(const at::Tensor& x, const SelectorProject& a) {
  return a.cos.defined() ? rotate_heads(x, a.positions, a.cos, a.sin) : x;
}

}  // namespace

SelectorProject::Result selector_project(const SelectorProject& a) {
  const auto dtype = a.hidden.scalar_type();
  auto heads = [&](const at::Tensor& weight) {
    return at::linear(a.hidden, weight.to(dtype)).unflatten(1, {-1, kKeyDim});
  };
  at::Tensor key = heads(a.key_weight);
  if (a.norm != KeyNorm::none) {
    at::Tensor x = widened(key);
    if (a.norm == KeyNorm::layernorm) x = x - x.mean(-1, true);
    x = x * at::rsqrt(x.square().mean(-1, true) + a.norm_eps);
    if (a.norm_weight.defined()) x = x * a.norm_weight.to(x.scalar_type());
    if (a.norm_bias.defined()) x = x + a.norm_bias.to(x.scalar_type());
    key = x.to(dtype);
  }
  const at::Tensor x = widened(a.hidden);
  const at::Tensor weight = at::linear(x, a.mix_weight.to(x.scalar_type())) * a.mix_scale;
  return {rotated(heads(a.query_weight), a), weight.unflatten(1, {-1, kSelectorHeads}), rotated(key, a)};
}

}  // namespace spot::ops::aten
