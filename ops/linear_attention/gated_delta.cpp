#include "ops/linear_attention/gated_delta.h"

#include "ops/linear_attention/gated_delta_check.h"

namespace spot::ops {

void GatedDeltaDecode::check() const {
  const at::Tensor& x = layer.mixed_qkv;
  expect_layer(layer, x.dim() > 0 ? x.size(0) : 0);
}

void GatedDeltaPrefill::check() const {
  expect_layer(layer, static_cast<int64_t>(query_lengths.size()));
  expect_lengths(query_lengths, layer.mixed_qkv.size(0));
}

namespace aten {
decltype(ops::gated_delta_decode) gated_delta_decode;
decltype(ops::gated_delta_prefill) gated_delta_prefill;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::gated_delta_decode) gated_delta_decode;
decltype(ops::gated_delta_prefill) gated_delta_prefill;
}  // namespace cuda
#endif

namespace {
namespace fake {

at::Tensor layer(const GatedDeltaLayer& layer) {
  return at::empty_symint(
      {layer.mixed_qkv.sym_size(0), layer.weights.decay_rate.sym_size(0) * layer.weights.norm.sym_size(0)},
      layer.mixed_qkv.options());
}
at::Tensor gated_delta_decode(const GatedDeltaDecode& a) {
  return layer(a.layer);
}
at::Tensor gated_delta_prefill(const GatedDeltaPrefill& a) {
  return layer(a.layer);
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<GatedDeltaDecode>(library);
  define<GatedDeltaPrefill>(library);
}
TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  implement<aten::gated_delta_decode>(library);
  implement<aten::gated_delta_prefill>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::gated_delta_decode>(library);
  implement<fake::gated_delta_prefill>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::gated_delta_decode>(library);
  implement<cuda::gated_delta_prefill>(library);
}
#endif

at::Tensor gated_delta_decode(const GatedDeltaDecode& arguments) {
  return call(arguments);
}
at::Tensor gated_delta_prefill(const GatedDeltaPrefill& arguments) {
  return call(arguments);
}

at::Tensor gated_delta_layer(const GatedDeltaLayer& layer, const std::vector<int64_t>& query_lengths) {
  if (!all_ones(query_lengths)) return gated_delta_prefill({layer, query_lengths});
  expect_lengths(query_lengths, layer.mixed_qkv.size(0));
  return gated_delta_decode({layer});
}

}  // namespace spot::ops
