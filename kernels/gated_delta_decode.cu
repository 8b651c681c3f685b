// Decode of the Gated DeltaNet; contract: gated_delta.h. All arithmetic is float32. Two kernels:
//
// convolve: a warp a (sequence, 128 channels): convolution, SiLU, L2 norm, convolution state. Kilobytes.
//
// step: a cluster of 4 blocks a (sequence, value head); a block holds 32 value columns of the state in
// registers. The state is loaded before the wait for `convolve` (programmatic dependent launch), which so
// costs little more than its launch. Key and query read the old state in one pass:
// S'^T q = e^g S^T q + (k.q) d. The blocks exchange what the output norm needs, one sum of squares each.
//
// Floor: the states, read and written, 2 * 64 KiB * H_v a sequence: 1.4 us at H_v = 32 and 3 TB/s. One
// sequence (128 blocks) is bound by latency, sixteen (22 us) by memory.
//
// Grid: convolve ceil(sequences * channels / 1024) blocks of 8 warps; step [4 H_v, sequences] of 4 warps.
//
// Share of the floor: bench/gated_delta.py prints it; docs/performance.md has it, with card and date.
#include "kernels/gated_delta.cuh"

namespace spot::kernels {
namespace {

constexpr int kStepColumns = 32, kStepThreads = 128, kStepRanks = kDim / kStepColumns;

struct StepShared {
  float keys[kDim], queries[kDim], values[kStepColumns];
  float reads[4][2][kStepColumns];  // by warp: its rows' share of S^T k and S^T q
  float key_dot_query[4];
  float squares[kStepRanks];  // by block of the cluster
};

template <typename T>
__global__ void __launch_bounds__(kStepThreads) step_kernel(const GatedDeltaParams p) {
  StepShared& shared = *reinterpret_cast<StepShared*>(ptx::dynamic_shared());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int rank = static_cast<int>(ptx::cluster_block_rank());
  const int head = blockIdx.x / kStepRanks, key_head = head / (p.num_value_heads / p.num_key_heads);
  const int64_t sequence = blockIdx.y, channels = channels_of(p);
  const int column = rank * kStepColumns + (thread % 8) * 4, row = thread / 8;  // rows row, row + 16, ...
  ptx::cluster_arrive();

  float* state = p.recurrent_states + (p.state_slots[sequence] * p.num_value_heads + head) * kDim * kDim;
  float4 s[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) s[i] = load4(state + (row + 16 * i) * kDim + column);
  const Gates gates = gates_of<T>(p, sequence, head);
  const float decay = expf(gates.log_decay);
  float gate = 0.0f, weight = 0.0f;
  if (warp == 0) {
    const int own = rank * kStepColumns + lane;
    gate = silu(load1(static_cast<const T*>(p.z) + sequence * p.z_stride + head * kDim + own));
    weight = p.norm[own];
  }

  ptx::griddepcontrol_wait();
  const float* u = convolved(p) + sequence * channels;
  const float query = u[key_head * kDim + thread];
  const float key = u[(p.num_key_heads + key_head) * kDim + thread];
  shared.queries[thread] = query;
  shared.keys[thread] = key;
  if (warp == 0)
    shared.values[lane] =
        u[(2 * p.num_key_heads + head) * static_cast<int64_t>(kDim) + rank * kStepColumns + lane];
  const float dot = warp_sum(key * query);
  if (lane == 0) shared.key_dot_query[warp] = dot;
  __syncthreads();

  float by_key[4] = {}, by_query[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float k = shared.keys[row + 16 * i], q = shared.queries[row + 16 * i];
    const float e[4] = {s[i].x, s[i].y, s[i].z, s[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      by_key[j] += k * e[j];
      by_query[j] += q * e[j];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {  // over the 4 rows of a warp
    for (int offset = 8; offset < 32; offset *= 2) {
      by_key[j] += __shfl_xor_sync(0xffffffffu, by_key[j], offset);
      by_query[j] += __shfl_xor_sync(0xffffffffu, by_query[j], offset);
    }
    if (lane < 8) {
      shared.reads[warp][0][lane * 4 + j] = by_key[j];
      shared.reads[warp][1][lane * 4 + j] = by_query[j];
    }
  }
  __syncthreads();

  const auto read = [&](int which, int c) {
    return decay * (shared.reads[0][which][c] + shared.reads[1][which][c] + shared.reads[2][which][c] +
                    shared.reads[3][which][c]);
  };
  float o = 0.0f;
  ptx::cluster_wait();  // every block of the cluster runs: its shared memory may be written
  if (warp == 0) {
    const float d = gates.beta * (shared.values[lane] - read(0, lane));
    o = read(1, lane) + d * (shared.key_dot_query[0] + shared.key_dot_query[1] + shared.key_dot_query[2] +
                             shared.key_dot_query[3]);
    const float square = warp_sum(o * o);
    if (lane < kStepRanks) ptx::store_cluster(ptx::shared_address(&shared.squares[rank]), lane, square);
    __syncwarp();
  }
  ptx::cluster_arrive();
  float d[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int c = (thread % 8) * 4 + j;
    d[j] = gates.beta * (shared.values[c] - read(0, c));
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float k = shared.keys[row + 16 * i];
    *reinterpret_cast<float4*>(state + (row + 16 * i) * kDim + column) =
        make_float4(decay * s[i].x + k * d[0], decay * s[i].y + k * d[1], decay * s[i].z + k * d[2],
                    decay * s[i].w + k * d[3]);
  }
  ptx::cluster_wait();
  if (warp == 0) {
    const float mean = (shared.squares[0] + shared.squares[1] + shared.squares[2] + shared.squares[3]) / kDim;
    store1(
        static_cast<T*>(p.output) + (sequence * p.num_value_heads + head) * kDim + rank * kStepColumns + lane,
        o * reciprocal_root(mean + p.norm_epsilon) * weight * gate);
  }
}

template <typename T>
cudaError_t decode(const GatedDeltaParams& p, cudaStream_t stream) {
  cudaError_t error = convolve<T, false>(p, stream);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid =
      dim3(static_cast<unsigned>(kStepRanks * p.num_value_heads), static_cast<unsigned>(p.num_sequences));
  shape.block = dim3(kStepThreads);
  shape.shared_bytes = sizeof(StepShared);
  shape.cluster_size = kStepRanks;
  shape.overlap = Overlap::kLaunch;
  return launch(step_kernel<T>, shape, stream, p);
}

}  // namespace

size_t gated_delta_decode_workspace(const GatedDeltaParams& p) {
  return static_cast<size_t>(p.num_sequences) * channels_of(p) * sizeof(float);
}

cudaError_t gated_delta_decode(const GatedDeltaParams& p, cudaStream_t stream) {
  if (p.num_sequences == 0 && p.num_tokens == 0) return cudaSuccess;
  if (!valid(p) || p.num_tokens != p.num_sequences) return cudaErrorInvalidValue;
  switch (p.data_type) {
    case DataType::kBf16:
      return decode<__nv_bfloat16>(p, stream);
    case DataType::kF16:
      return decode<__half>(p, stream);
    case DataType::kF32:
      return decode<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
