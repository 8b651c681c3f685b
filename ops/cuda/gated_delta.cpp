// Tensors to pointers for kernels/gated_delta.h. Needs no CUDA build of torch to compile.
#include "ops/cuda/gated_delta.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <vector>

#include "kernels/gated_delta.h"

namespace spot::ops::cuda {
namespace {

kernels::DataType data_type(at::ScalarType dtype) {
  return dtype == at::kFloat  ? kernels::DataType::kF32
         : dtype == at::kHalf ? kernels::DataType::kF16
                              : kernels::DataType::kBf16;
}

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

  Call(const at::Tensor& mixed_qkv_, const at::Tensor& z_, const at::Tensor& b_, const at::Tensor& a_,
       const at::Tensor& conv_, const at::Tensor& decay_rate_, const at::Tensor& dt_bias_,
       const at::Tensor& norm_, double norm_epsilon, at::Tensor& conv_states, at::Tensor& recurrent_states,
       const at::Tensor& state_slots)
      : conv(conv_.contiguous()),
        decay_rate(decay_rate_.contiguous()),
        dt_bias(dt_bias_.contiguous()),
        norm(norm_.contiguous()),
        slots(state_slots.contiguous()) {
    const at::ScalarType dtype = mixed_qkv_.scalar_type();
    mixed_qkv = readable(mixed_qkv_, dtype, true);
    z = readable(z_, dtype, true);
    b = readable(b_, dtype, false);
    a = readable(a_, dtype, false);
    const int64_t value_heads = decay_rate.size(0);
    output = at::empty({mixed_qkv.size(0), value_heads * kernels::kDeltaDim}, mixed_qkv_.options());
    params.data_type = data_type(dtype);
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
    params.norm_epsilon = static_cast<float>(norm_epsilon);
    params.conv_states = conv_states.mutable_data_ptr<float>();
    params.recurrent_states = recurrent_states.mutable_data_ptr<float>();
    params.state_slots = slots.const_data_ptr<int64_t>();
    params.output = output.mutable_data_ptr();
  }

  template <typename Launch>
  at::Tensor run(size_t workspace_bytes, Launch launch, const char* name) {
    workspace = at::empty({static_cast<int64_t>(workspace_bytes)}, output.options().dtype(at::kByte));
    params.workspace = workspace.mutable_data_ptr();
    const c10::impl::VirtualGuardImpl device(output.device().type());
    const auto stream = static_cast<cudaStream_t>(device.getStream(output.device()).native_handle());
    const cudaError_t error = launch(params, stream);
    TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error), " (", params.num_tokens,
                " tokens, ", params.num_sequences, " sequences, ", params.num_key_heads, " key and ",
                params.num_value_heads, " value heads)");
    return output;
  }
};

}  // namespace

bool gated_delta_fits(const at::Tensor& mixed_qkv, int64_t key_head_dim, int64_t value_head_dim,
                      const at::Tensor& conv, const at::Tensor& conv_states,
                      const at::Tensor& recurrent_states) {
  const at::ScalarType dtype = mixed_qkv.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf) &&
         key_head_dim == kernels::kDeltaDim && value_head_dim == kernels::kDeltaDim &&
         conv.size(0) == kernels::kDeltaTaps && conv_states.is_contiguous() &&
         recurrent_states.is_contiguous();
}

at::Tensor gated_delta_decode(const at::Tensor& mixed_qkv, const at::Tensor& z, const at::Tensor& b,
                              const at::Tensor& a, const at::Tensor& conv, const at::Tensor& decay_rate,
                              const at::Tensor& dt_bias, const at::Tensor& norm, double norm_epsilon,
                              at::Tensor conv_states, at::Tensor recurrent_states,
                              const at::Tensor& state_slots) {
  const c10::DeviceGuard guard(mixed_qkv.device());
  Call call(mixed_qkv, z, b, a, conv, decay_rate, dt_bias, norm, norm_epsilon, conv_states, recurrent_states,
            state_slots);
  return call.run(kernels::gated_delta_decode_workspace(call.params), kernels::gated_delta_decode,
                  "spot::gated_delta_decode");
}

at::Tensor gated_delta_prefill(const at::Tensor& mixed_qkv, const at::Tensor& z, const at::Tensor& b,
                               const at::Tensor& a, const at::Tensor& conv, const at::Tensor& decay_rate,
                               const at::Tensor& dt_bias, const at::Tensor& norm, double norm_epsilon,
                               at::Tensor conv_states, at::Tensor recurrent_states,
                               const at::Tensor& state_slots, at::IntArrayRef query_lengths) {
  const c10::DeviceGuard guard(mixed_qkv.device());
  Call call(mixed_qkv, z, b, a, conv, decay_rate, dt_bias, norm, norm_epsilon, conv_states, recurrent_states,
            state_slots);
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
  const at::Tensor on_device = at::tensor(table, at::kInt).to(mixed_qkv.device(), /*non_blocking=*/true);
  call.params.query_starts = on_device.const_data_ptr<int32_t>();
  call.params.chunk_starts = call.params.query_starts + num_sequences + 1;
  call.params.chunk_sequences = call.params.chunk_starts + num_sequences + 1;
  call.params.num_chunks = chunk_starts.back();
  return call.run(kernels::gated_delta_prefill_workspace(call.params), kernels::gated_delta_prefill,
                  "spot::gated_delta_prefill");
}

}  // namespace spot::ops::cuda
