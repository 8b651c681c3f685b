// Decode of the Gated DeltaNet; contract: gated_delta.h. All arithmetic is float32. Two kernels:
//
// convolve: a warp a (sequence, 128 channels): convolution, SiLU, L2 norm, convolution state. Kilobytes.
//
// step: a cluster of 4 blocks a (sequence, value head); a block holds 32 value columns of the state in
// registers. The state is loaded before the wait for `convolve` (programmatic dependent launch), which so
// costs little more than its launch. Key and query read the old state in one pass:
// S'^T q = e^g S^T q + (k.q) d. The blocks exchange what the output norm needs, one sum of squares each. Where there are
// no clusters, one block of 16 warps does the work of the four, with the same sums.
//
// Floor: the states, read and written, 2 * 64 KiB * H_v a sequence: 1.4 us at H_v = 32 and 3 TB/s. One
// sequence (128 blocks) is bound by latency, sixteen (22 us) by memory.
//
// Grid: convolve ceil(sequences * channels / 1024) blocks of 8 warps; step [4 H_v, sequences] of 4 warps
// ([H_v, sequences] of 16).
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

// What the ranks say to each other: blocks of a cluster, or four parts of one block.
template <bool kCluster>
struct Ranks {
  int rank;
  __device__ __forceinline__ void arrive() const {
    if constexpr (kCluster)
      ptx::cluster_arrive();
    else
      __syncthreads();
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kCluster) ptx::cluster_wait();
  }
  // To `own` of this rank's shared memory, in that of `other`.
  __device__ __forceinline__ void store(StepShared* all, float& own, int other, float value) const {
    if constexpr (kCluster) {
      ptx::store_cluster(ptx::shared_address(&own), static_cast<uint32_t>(other), value);
    } else {
      const auto offset = reinterpret_cast<uint8_t*>(&own) - reinterpret_cast<uint8_t*>(all + rank);
      *reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(all + other) + offset) = value;
    }
  }
};

template <typename T, bool kCluster>
__device__ __forceinline__ void step(const GatedDeltaParams& p) {
  StepShared* const all = reinterpret_cast<StepShared*>(ptx::dynamic_shared());
  const int thread = threadIdx.x % kStepThreads, lane = thread % 32, warp = thread / 32;
  int rank = static_cast<int>(threadIdx.x) / kStepThreads;
  if constexpr (kCluster) rank = static_cast<int>(ptx::cluster_block_rank());
  const Ranks<kCluster> ranks = {rank};
  StepShared& shared = all[kCluster ? 0 : rank];
  const int head = static_cast<int>(blockIdx.x) / (kCluster ? kStepRanks : 1),
            key_head = head / (p.num_value_heads / p.num_key_heads);
  const int64_t sequence = blockIdx.y, channels = channels_of(p);
  const int column = rank * kStepColumns + (thread % 8) * 4, row = thread / 8;  // rows row, row + 16, ...
  ranks.arrive();

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
  ranks.wait();  // every block of the cluster runs: its shared memory may be written
  if (warp == 0) {
    const float d = gates.beta * (shared.values[lane] - read(0, lane));
    o = read(1, lane) + d * (shared.key_dot_query[0] + shared.key_dot_query[1] + shared.key_dot_query[2] +
                             shared.key_dot_query[3]);
    const float square = warp_sum(o * o);
    if (lane < kStepRanks) ranks.store(all, shared.squares[rank], lane, square);
    __syncwarp();
  }
  ranks.arrive();
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
  ranks.wait();
  if (warp == 0) {
    const float mean = (shared.squares[0] + shared.squares[1] + shared.squares[2] + shared.squares[3]) / kDim;
    store1(
        static_cast<T*>(p.output) + (sequence * p.num_value_heads + head) * kDim + rank * kStepColumns + lane,
        o * reciprocal_root(mean + p.norm_epsilon) * weight * gate);
  }
}

template <typename T, bool kCluster>
__global__ void __launch_bounds__(kCluster ? kStepThreads : kStepRanks* kStepThreads)
    step_kernel(const GatedDeltaParams p) {
  if constexpr (!kCluster || SPOT_HOPPER_CODE != 0) step<T, kCluster>(p);
}

template <typename T>
cudaError_t decode(const GatedDeltaParams& p, cudaStream_t stream) {
  cudaError_t error = convolve<T, false>(p, stream);
  if (error != cudaSuccess) return error;
  Device device;
  error = current_device(device);
  if (error != cudaSuccess) return error;
  const bool clusters = device.has_clusters();
  const unsigned blocks = clusters ? kStepRanks : 1, parts = kStepRanks / blocks;
  LaunchShape shape;
  shape.grid =
      dim3(blocks * static_cast<unsigned>(p.num_value_heads), static_cast<unsigned>(p.num_sequences));
  shape.block = dim3(parts * kStepThreads);
  shape.shared_bytes = parts * sizeof(StepShared);
  shape.cluster_size = blocks;
  shape.overlap = Overlap::kLaunch;
  return clusters ? launch(step_kernel<T, true>, shape, stream, p)
                  : launch(step_kernel<T, false>, shape, stream, p);
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
