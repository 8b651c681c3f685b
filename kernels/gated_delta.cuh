// What decode and prefill of the Gated DeltaNet share: numbers, gates, and the convolution kernel.
#pragma once

#include "kernels/gated_delta.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"

namespace spot::kernels {
namespace {

constexpr int kDim = kDeltaDim, kChunk = kDeltaChunk;
constexpr int kHistory = kDeltaTaps - 1;
__host__ __device__ inline int64_t channels_of(const GatedDeltaParams& p) {
  return static_cast<int64_t>(kDim) * (2 * p.num_key_heads + p.num_value_heads);
}
// The workspace begins with the convolved, normalised q | k | v of every token, float32 [T, channels].
__device__ inline float* convolved(const GatedDeltaParams& p) {
  return static_cast<float*>(p.workspace);
}

__device__ __forceinline__ float load1(const float* p) {
  return *p;
}
__device__ __forceinline__ float load1(const __half* p) {
  return __half2float(*p);
}
__device__ __forceinline__ float load1(const __nv_bfloat16* p) {
  return __bfloat162float(*p);
}
__device__ __forceinline__ float4 load4(const float* p) {
  return *reinterpret_cast<const float4*>(p);
}
template <typename T>
__device__ __forceinline__ float4 load4(const T* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  T values[4];
  memcpy(static_cast<void*>(values), &bits, sizeof(bits));
  return make_float4(load1(values), load1(values + 1), load1(values + 2), load1(values + 3));
}
__device__ __forceinline__ void store1(float* p, float v) {
  *p = v;
}
__device__ __forceinline__ void store1(__half* p, float v) {
  *p = __float2half_rn(v);
}
__device__ __forceinline__ void store1(__nv_bfloat16* p, float v) {
  *p = __float2bfloat16_rn(v);
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float reciprocal_root(float x) {
  return 1.0f / sqrtf(x);
}
__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ __forceinline__ float silu(float x) {
  return x / (1.0f + expf(-x));
}

struct Gates {
  float log_decay, beta;
};
template <typename T>
__device__ __forceinline__ Gates gates_of(const GatedDeltaParams& p, int64_t token, int head) {
  const float x = load1(static_cast<const T*>(p.a) + token * p.a_stride + head) + p.dt_bias[head];
  const float softplus = fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
  return {-p.decay_rate[head] * softplus,
          sigmoid(load1(static_cast<const T*>(p.b) + token * p.b_stride + head))};
}

// Where a chunk lies among the tokens; in decode a chunk is the sequence's one token.
struct ChunkPlace {
  int sequence;
  int64_t begin, end;                    // its tokens
  int64_t sequence_begin, sequence_end;  // its sequence's tokens
};
template <bool kPrefill>
__device__ __forceinline__ ChunkPlace place_of(const GatedDeltaParams& p, int chunk) {
  if constexpr (!kPrefill) return {chunk, chunk, chunk + 1, chunk, chunk + 1};
  ChunkPlace place;
  place.sequence = p.chunk_sequences[chunk];
  place.sequence_begin = p.query_starts[place.sequence];
  place.sequence_end = p.query_starts[place.sequence + 1];
  place.begin = place.sequence_begin + static_cast<int64_t>(chunk - p.chunk_starts[place.sequence]) * kChunk;
  place.end = min(place.begin + kChunk, place.sequence_end);
  return place;
}

template <typename T, bool kPrefill>
__global__ void __launch_bounds__(256) convolve_kernel(const GatedDeltaParams p) {
  ptx::griddepcontrol_launch_dependents();
  const int lane = threadIdx.x % 32, num_chunks = kPrefill ? p.num_chunks : p.num_sequences;
  const int num_slices = 2 * p.num_key_heads + p.num_value_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (item >= static_cast<int64_t>(num_chunks) * num_slices) return;
  const int slice = static_cast<int>(item % num_slices);
  const ChunkPlace place = place_of<kPrefill>(p, static_cast<int>(item / num_slices));
  const int64_t channels = channels_of(p), channel = slice * kDim + lane * 4;
  const T* inputs = static_cast<const T*>(p.mixed_qkv) + channel;

  float4 past[kHistory];
  if (place.begin == place.sequence_begin) {
    // The same lane reads the old state and writes the new one, so no other block can come between.
    float* state = p.conv_states + p.state_slots[place.sequence] * kHistory * channels + channel;
    for (int n = 0; n < kHistory; ++n) past[n] = load4(state + n * channels);
    float4 last[kHistory];
    const int64_t length = place.sequence_end - place.sequence_begin;
#pragma unroll
    for (int n = 0; n < kHistory; ++n) {
      const int64_t token =
          length - kHistory + n;  // negative: among the past, where 0 is the oldest + kHistory
      if (token >= 0)
        last[n] = load4(inputs + (place.sequence_begin + token) * p.mixed_qkv_stride);
      else
        last[n] = token == -1 ? past[2] : past[1];  // token -3 would need a length of 0
    }
    for (int n = 0; n < kHistory; ++n) *reinterpret_cast<float4*>(state + n * channels) = last[n];
  } else {
    for (int n = 0; n < kHistory; ++n)
      past[n] = load4(inputs + (place.begin - kHistory + n) * p.mixed_qkv_stride);
  }
  float4 taps[kDeltaTaps];
  for (int n = 0; n < kDeltaTaps; ++n) taps[n] = load4(p.conv + n * channels + channel);

  const bool is_query = slice < p.num_key_heads, is_value = slice >= 2 * p.num_key_heads;
  const float scale = is_query ? reciprocal_root(static_cast<float>(kDim)) : 1.0f;
  float* to = convolved(p) + channel;
#pragma unroll 4
  for (int64_t token = place.begin; token < place.end; ++token) {
    const float4 x = load4(inputs + token * p.mixed_qkv_stride);
    const auto sum = [&](float w0, float w1, float w2, float w3, float x0, float x1, float x2, float x3) {
      return silu(w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3);
    };
    float4 u;
    u.x = sum(taps[0].x, taps[1].x, taps[2].x, taps[3].x, past[0].x, past[1].x, past[2].x, x.x);
    u.y = sum(taps[0].y, taps[1].y, taps[2].y, taps[3].y, past[0].y, past[1].y, past[2].y, x.y);
    u.z = sum(taps[0].z, taps[1].z, taps[2].z, taps[3].z, past[0].z, past[1].z, past[2].z, x.z);
    u.w = sum(taps[0].w, taps[1].w, taps[2].w, taps[3].w, past[0].w, past[1].w, past[2].w, x.w);
    past[0] = past[1];
    past[1] = past[2];
    past[2] = x;
    if (!is_value) {
      const float f =
          scale * reciprocal_root(warp_sum(u.x * u.x + u.y * u.y + u.z * u.z + u.w * u.w) + 1e-6f);
      u = make_float4(u.x * f, u.y * f, u.z * f, u.w * f);
    }
    *reinterpret_cast<float4*>(to + token * channels) = u;
  }
}

// ---- launches ----

inline bool aligned(const void* p, size_t bytes) {
  return p != nullptr && reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline bool valid(const GatedDeltaParams& p) {
  const size_t quad = p.data_type == DataType::kF32 ? 16 : 8;
  return p.num_key_heads > 0 && p.num_value_heads > 0 && p.num_value_heads % p.num_key_heads == 0 &&
         p.num_value_heads < 65536 && p.num_sequences > 0 && p.num_sequences < 65536 &&
         p.num_tokens < (int64_t{1} << 31) && aligned(p.mixed_qkv, quad) && aligned(p.z, quad) &&
         p.mixed_qkv_stride % 4 == 0 && p.z_stride % 4 == 0 && p.b != nullptr && p.a != nullptr &&
         aligned(p.conv, 16) && p.decay_rate != nullptr && p.dt_bias != nullptr && aligned(p.norm, 16) &&
         aligned(p.conv_states, 16) && aligned(p.recurrent_states, 16) && p.state_slots != nullptr &&
         p.output != nullptr && aligned(p.workspace, 16);
}

template <typename T, bool kPrefill>
cudaError_t convolve(const GatedDeltaParams& p, cudaStream_t stream) {
  const int64_t chunks = kPrefill ? p.num_chunks : p.num_sequences;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((chunks * (channels_of(p) / kDim) + 7) / 8));
  shape.block = dim3(256);
  return launch(convolve_kernel<T, kPrefill>, shape, stream, p);
}

}  // namespace
}  // namespace spot::kernels
