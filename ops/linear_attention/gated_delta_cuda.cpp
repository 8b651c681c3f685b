// Tensors to pointers for kernels/gated_delta.h, on the current stream; what the kernels do not take goes to the ATen
// form.
#include <vector>

#include "kernels/gated_delta.h"
#include "ops/cuda/call.h"
#include "ops/linear_attention/gated_delta.h"
#include "ops/linear_attention/pieces.h"

namespace spot::ops {

namespace aten {
decltype(ops::gated_delta_decode) gated_delta_decode;
decltype(ops::gated_delta_prefill) gated_delta_prefill;
}  // namespace aten

namespace cuda {
namespace {

// The fused kernels take about 50 KiB of workspace a token at 32 value heads.
constexpr int64_t kFusedPieceTokens = 16384;

// The tensor itself where the kernels can read it in place, else a copy: [T, columns] of `dtype`, columns
// contiguous and rows four elements apart and aligned.
at::Tensor readable(const at::Tensor& t, at::ScalarType dtype, bool by_fours) {
  at::Tensor rows = t.to(dtype);
  rows = rows.dim() == 3 ? rows.flatten(1) : rows;
  const bool in_place =
      rows.stride(1) == 1 &&
      (!by_fours || (rows.stride(0) % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % (4 * rows.element_size()) == 0));
  return in_place ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

// The parameters, and what must live until the launch.
struct Call {
  at::Tensor mixed_qkv, z, b, a, conv, decay_rate, dt_bias, norm, slots, output, workspace;
  kernels::GatedDeltaParams params;

  explicit Call(const GatedDeltaLayer& layer)
      : conv(layer.weights.conv.contiguous()),
        decay_rate(layer.weights.decay_rate.contiguous()),
        dt_bias(layer.weights.dt_bias.contiguous()),
        norm(layer.weights.norm.contiguous()),
        slots(layer.state_slots.contiguous()) {
    const at::ScalarType dtype = layer.mixed_qkv.scalar_type();
    mixed_qkv = readable(layer.mixed_qkv, dtype, true);
    z = readable(layer.z, dtype, true);
    b = readable(layer.b, dtype, false);
    a = readable(layer.a, dtype, false);
    const int64_t value_heads = decay_rate.size(0);
    output = at::empty({mixed_qkv.size(0), value_heads * kernels::kDeltaDim}, layer.mixed_qkv.options());
    params.data_type = data_type(mixed_qkv);
    params.num_key_heads = static_cast<int32_t>((conv.size(1) / kernels::kDeltaDim - value_heads) / 2);
    params.num_value_heads = static_cast<int32_t>(value_heads);
    params.num_tokens = mixed_qkv.size(0);
    params.num_sequences = static_cast<int32_t>(slots.size(0));
    params.mixed_qkv = mixed_qkv.const_data_ptr();
    params.z = z.const_data_ptr();
    params.b = b.const_data_ptr();
    params.a = a.const_data_ptr();
    params.mixed_qkv_stride = mixed_qkv.stride(0);
    params.z_stride = z.stride(0);
    params.b_stride = b.stride(0);
    params.a_stride = a.stride(0);
    params.conv = conv.const_data_ptr<float>();
    params.decay_rate = decay_rate.const_data_ptr<float>();
    params.dt_bias = dt_bias.const_data_ptr<float>();
    params.norm = norm.const_data_ptr<float>();
    params.norm_epsilon = static_cast<float>(layer.weights.norm_epsilon);
    params.conv_states = layer.conv_states.mutable_data_ptr<float>();
    params.recurrent_states = layer.recurrent_states.mutable_data_ptr<float>();
    params.state_slots = slots.const_data_ptr<int64_t>();
    params.output = output.mutable_data_ptr();
  }

  template <typename Launch>
  at::Tensor run(size_t workspace_bytes, Launch launch, const char* name) {
    workspace = at::empty({static_cast<int64_t>(workspace_bytes)}, output.options().dtype(at::kByte));
    params.workspace = workspace.mutable_data_ptr();
    const cudaError_t error = launch(params, native_stream(output));
    TORCH_CHECK(error == cudaSuccess, name, ": ", launch_error(error), " (", params.num_tokens, " tokens, ",
                params.num_sequences, " sequences, ", params.num_key_heads, " key and ",
                params.num_value_heads, " value heads)");
    return output;
  }
};

// Whether the kernels take these shapes, dtypes and layouts.
bool fits(const GatedDeltaLayer& layer) {
  const at::ScalarType dtype = layer.mixed_qkv.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         layer.recurrent_states.size(2) == kernels::kDeltaDim &&
         layer.weights.norm.size(0) == kernels::kDeltaDim &&
         layer.weights.conv.size(0) == kernels::kDeltaTaps && layer.conv_states.is_contiguous() &&
         layer.recurrent_states.is_contiguous();
}

at::Tensor prefill_piece(const GatedDeltaLayer& layer, const std::vector<int64_t>& query_lengths) {
  Call call(layer);
  // query_starts | chunk_starts | chunk_sequences, in one copy to the device.
  const int64_t num_sequences = static_cast<int64_t>(query_lengths.size());
  std::vector<int32_t> query_starts = {0}, chunk_starts = {0}, table;
  std::vector<int32_t> chunk_sequences;
  for (int64_t i = 0; i < num_sequences; ++i) {
    const auto chunks =
        static_cast<int32_t>((query_lengths[i] + kernels::kDeltaChunk - 1) / kernels::kDeltaChunk);
    query_starts.push_back(query_starts.back() + static_cast<int32_t>(query_lengths[i]));
    chunk_starts.push_back(chunk_starts.back() + chunks);
    chunk_sequences.insert(chunk_sequences.end(), chunks, static_cast<int32_t>(i));
  }
  for (const auto* part : {&query_starts, &chunk_starts, &chunk_sequences})
    table.insert(table.end(), part->begin(), part->end());
  // Unpinned memory: the copy takes it up before it returns, without waiting for the device's work.
  const at::Tensor on_device =
      at::tensor(table, at::kInt).to(layer.mixed_qkv.device(), /*non_blocking=*/true);
  call.params.query_starts = on_device.const_data_ptr<int32_t>();
  call.params.chunk_starts = call.params.query_starts + num_sequences + 1;
  call.params.chunk_sequences = call.params.chunk_starts + num_sequences + 1;
  call.params.num_chunks = chunk_starts.back();
  return call.run(kernels::gated_delta_prefill_workspace(call.params), kernels::gated_delta_prefill,
                  "spot::gated_delta_prefill");
}

}  // namespace

at::Tensor gated_delta_decode(const GatedDeltaDecode& a) {
  if (!fits(a.layer)) return aten::gated_delta_decode(a);
  const c10::DeviceGuard guard(a.layer.mixed_qkv.device());
  Call call(a.layer);
  return call.run(kernels::gated_delta_decode_workspace(call.params), kernels::gated_delta_decode,
                  "spot::gated_delta_decode");
}

at::Tensor gated_delta_prefill(const GatedDeltaPrefill& a) {
  const c10::DeviceGuard guard(a.layer.mixed_qkv.device());
  if (!fits(a.layer) || !kernels::gated_delta_prefill_fits()) return aten::gated_delta_prefill(a);
  return by_pieces(a, kFusedPieceTokens, prefill_piece);
}

}  // namespace cuda
}  // namespace spot::ops
