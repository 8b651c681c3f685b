// Prefill of the Gated DeltaNet in chunks of 64 tokens; contract: gated_delta.h. Everything between loads and
// stores is float32; matrix products keep float32's accuracy on the tensor cores (tf32.cuh). Four kernels:
//
// convolve: a warp a (chunk, 128 channels): convolution, SiLU, L2 norm, convolution state.
//
// prepare: a block a (chunk, key head): K K^T and Q K^T once for all value heads of the key head, then for
// each the decays, P = causal(Q K^T) decay and T = (I + A)^-1, A = beta K K^T decay below the diagonal. The
// inverse goes column by column by substitution: powers of A would overflow where keys repeat.
//
// scan: a block a (sequence, value head, 32 or 16 value columns), chunk after chunk, the state in registers
// (as accumulators) and in shared memory (as operand):
//   R = beta (V - e^G K S),  N = T R,  O = e^G Q S + P N,  S <- e^Gend S + K^T (e^(Gend - G) N).
// The next chunk loads meanwhile. Value columns do not depend on each other, so that tiles of them fill the
// machine from one sequence on.
//
// normalize: a warp a (token, value head): RMS norm and gate.
//
// Floor at 8192 tokens, 16 key and 32 value heads, bf16. `scan` does 7.6 MFLOP a chunk and value head,
// `prepare` 1.6 a chunk and key head, each three times over: 0.10 TFLOP of TF32, 0.34 ms at the 300 TFLOP/s
// to expect of mma.sync. Memory: 1.35 GB, half of it q | k | v in float32, 0.45 ms at 3 TB/s. The kernels
// follow each other: 0.3 ms of memory in the others, then `scan`, which is bound by its products.
//
// Grid: convolve ceil(chunks * channels / 1024) blocks of 8 warps; prepare [chunks, H_k], 2 blocks an SM;
// scan [4 or 8, H_v, sequences], one block an SM (221 KB of shared memory, 138 with one
// buffer); normalize ceil(T * H_v / 8).
//
// Share of the floor: bench/gated_delta.py prints it; docs/performance.md has it, with card and date.
#include <algorithm>

#include "kernels/gated_delta.cuh"
#include "kernels/tf32.cuh"

namespace spot::kernels {
namespace {

constexpr int kRowStride = kDim + 4;       // of k and q in shared memory: rows 4 banks apart
constexpr int kSquareStride = kChunk + 4;  // of [64, 64] matrices in shared memory

// Float32 workspace: the convolved, normalised q | k | v of every token (prefill's scan overwrites v by o),
// then for each (chunk, value head) T, P and the three gates.
constexpr int kSquare = kChunk * kChunk;
constexpr int kChunkFloats = 2 * kSquare + 3 * kChunk;  // T | P | beta, e^G, e^(Gend - G)

__device__ float* chunk_data(const GatedDeltaParams& p, int64_t chunk, int head) {
  return convolved(p) + p.num_tokens * channels_of(p) + (chunk * p.num_value_heads + head) * kChunkFloats;
}

// 16 bytes, global to shared; zeros when not `valid`. Visible after a wait for the copies and a barrier.
__device__ __forceinline__ void copy16_or_zero(float* to, const float* from, bool valid) {
  if (valid)
    ptx::cp_async_16(ptx::shared_address(to), from);
  else
    *reinterpret_cast<float4*>(to) = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// ---- prefill: within the chunks ----

constexpr int kPrepareHeads = 3;  // value heads worked on at once; their matrices take k's and q's place
struct PrepareShared {
  union {
    struct {
      float key[kChunk * kRowStride], query[kChunk * kRowStride];
    };
    float system[kPrepareHeads][kChunk * kSquareStride];  // A = beta K K^T decay, strictly lower
  };
  float key_key[kChunk * kSquareStride], query_key[kChunk * kSquareStride];
  double log_decay[kPrepareHeads][kChunk], sums[kPrepareHeads][kChunk];
  float beta[kPrepareHeads][kChunk];
};

template <typename T>
__global__ void __launch_bounds__(256) prepare_kernel(const GatedDeltaParams p) {
  PrepareShared& shared = *reinterpret_cast<PrepareShared*>(ptx::dynamic_shared());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, key_head = blockIdx.y;
  const int64_t chunk = blockIdx.x, channels = channels_of(p);
  const ChunkPlace place = place_of<true>(p, static_cast<int>(chunk));
  const int count = static_cast<int>(place.end - place.begin);

  for (int i = thread; i < kChunk * kDim / 4; i += 256) {
    const int row = i / (kDim / 4), at = i % (kDim / 4) * 4;
    const float* from = convolved(p) + (place.begin + min(row, count - 1)) * channels + key_head * kDim + at;
    copy16_or_zero(&shared.query[row * kRowStride + at], from, row < count);
    copy16_or_zero(&shared.key[row * kRowStride + at], from + p.num_key_heads * kDim, row < count);
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  // Warp: 16 rows by 32 columns of both products. What lies above the diagonal is never used.
  const int rows = warp % 4 * 16, columns = warp / 4 * 32;
  if (columns < rows + 16) {
    float key_key[4][4] = {}, query_key[4][4] = {};
    for (int k = 0; k < kDim; k += 8) {
      const FragmentA key = load_a(shared.key + rows * kRowStride + k, kRowStride, 1, lane);
      const FragmentA query = load_a(shared.query + rows * kRowStride + k, kRowStride, 1, lane);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const FragmentB other = load_b(shared.key + (columns + 8 * n) * kRowStride + k, 1, kRowStride, lane);
        multiply_add(key_key[n], key, other);
        multiply_add(query_key[n], query, other);
      }
    }
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = (rows + lane / 4 + e / 2 * 8) * kSquareStride + columns + 8 * n + lane % 4 * 2 + e % 2;
        shared.key_key[at] = key_key[n][e];
        shared.query_key[at] = query_key[n][e];
      }
  }
  __syncthreads();

  const int repeats = p.num_value_heads / p.num_key_heads, group = thread / kChunk, own = thread % kChunk;
  for (int first = 0; first < repeats; first += kPrepareHeads) {
    const int heads = min(kPrepareHeads, repeats - first);
    const int head = key_head * repeats + first + group;  // of this thread, where group < heads
    if (group < heads) {
      const Gates gates = own < count ? gates_of<T>(p, place.begin + own, head) : Gates{0.0f, 0.0f};
      shared.log_decay[group][own] = gates.log_decay;
      shared.beta[group][own] = gates.beta;
    }
    __syncthreads();
    if (group < heads) {
      // Double, because differences of these sums are wanted: a token that forgets much must not blur the
      // next ones'.
      double sum = 0.0;
      for (int i = 0; i <= own; ++i) sum += shared.log_decay[group][i];
      shared.sums[group][own] = sum;
    }
    __syncthreads();
    if (group < heads) {
      float* gates = chunk_data(p, chunk, head) + 2 * kSquare;
      gates[own] = shared.beta[group][own];
      gates[kChunk + own] = expf(static_cast<float>(shared.sums[group][own]));
      gates[2 * kChunk + own] =
          expf(static_cast<float>(shared.sums[group][kChunk - 1] - shared.sums[group][own]));
    }
    for (int i = thread; i < heads * kSquare; i += 256) {
      const int g = i / kSquare, row = i % kSquare / kChunk, column = i % kChunk;
      float system = 0.0f, attention = 0.0f;
      if (column <= row) {
        const float decay = expf(static_cast<float>(shared.sums[g][row] - shared.sums[g][column]));
        attention = decay * shared.query_key[row * kSquareStride + column];
        if (column < row) system = shared.beta[g][row] * decay * shared.key_key[row * kSquareStride + column];
      }
      shared.system[g][row * kSquareStride + column] = system;
      chunk_data(p, chunk, key_head * repeats + first + g)[kSquare + i % kSquare] = attention;
    }
    __syncthreads();
    if (group < heads) {
      // Column `own` of (I + A)^-1, by forward substitution: t[i] = [i = own] - sum over j < i of A[i, j]
      // t[j].
      float t[kChunk];
      float* inverse = chunk_data(p, chunk, head);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        float sums[4] = {i == own ? 1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < i; j += 4) {
          const float4 a = load4(&shared.system[group][i * kSquareStride + j]);
          sums[0] -= a.x * t[j];
          if (j + 1 < i) sums[1] -= a.y * t[j + 1];
          if (j + 2 < i) sums[2] -= a.z * t[j + 2];
          if (j + 3 < i) sums[3] -= a.w * t[j + 3];
        }
        t[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        inverse[i * kChunk + own] = t[i];
      }
    }
    __syncthreads();
  }
}

// ---- prefill: from chunk to chunk ----

// q and T are free once used within a chunk and load again at once; the rest alternates between two buffers.
// kBuffers: 2, so that the next chunk loads meanwhile, or 1 where a block has less shared memory.
template <int kColumns, int kBuffers>
struct ScanShared {
  static constexpr int kStride = kColumns + 8;  // rows 8 (or 24) banks apart: conflict-free as B operands
  float key[kBuffers][kChunk * kRowStride], query[kChunk * kRowStride];
  float attention[kBuffers][kChunk * kSquareStride], inverse[kChunk * kSquareStride];
  float value[kBuffers][kChunk * kColumns];
  float gates[kBuffers][3 * kChunk];
  float state[kDim * kStride];
  float residual[kChunk * kStride], new_value[kChunk * kStride], decayed_value[kChunk * kStride];
};

template <int kColumns, int kBuffers>
__global__ void __launch_bounds__(256) scan_kernel(const GatedDeltaParams p) {
  using Shared = ScanShared<kColumns, kBuffers>;
  constexpr int kStride = Shared::kStride;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, lane_row = lane / 4,
            lane_pair = lane % 4 * 2;
  const int head = blockIdx.y, sequence = blockIdx.z, first_column = blockIdx.x * kColumns;
  const int key_head = head / (p.num_value_heads / p.num_key_heads);
  const int first_chunk = p.chunk_starts[sequence], end_chunk = p.chunk_starts[sequence + 1];
  if (first_chunk == end_chunk) return;
  const int64_t channels = channels_of(p), sequence_begin = p.query_starts[sequence],
                sequence_end = p.query_starts[sequence + 1];
  float* pool =
      p.recurrent_states + (p.state_slots[sequence] * p.num_value_heads + head) * kDim * kDim + first_column;

  const auto tokens_of = [&](int chunk) {
    return static_cast<int>(
        min(static_cast<int64_t>(kChunk),
            sequence_end - sequence_begin - static_cast<int64_t>(chunk - first_chunk) * kChunk));
  };
  // Rows of one 128-channel slice, or of this block's value columns, of a chunk; zeros past its tokens.
  const auto load_rows = [&](float* to, int stride, int chunk, int64_t channel, int width) {
    const float* from = convolved(p) +
                        (sequence_begin + static_cast<int64_t>(chunk - first_chunk) * kChunk) * channels +
                        channel;
    const int count = tokens_of(chunk), quads = width / 4;
    for (int i = thread; i < kChunk * quads; i += 256) {
      const int row = i / quads, at = i % quads * 4;
      copy16_or_zero(to + row * stride + at, from + min(row, count - 1) * channels + at, row < count);
    }
  };
  const auto load_square = [&](float* to, const float* from) {
    for (int i = thread; i < kSquare / 4; i += 256)
      copy16_or_zero(to + i / (kChunk / 4) * kSquareStride + i % (kChunk / 4) * 4, from + i * 4, true);
  };
  const int64_t value_channel = (2 * p.num_key_heads + head) * static_cast<int64_t>(kDim) + first_column;
  const auto load_query = [&](int chunk) {
    load_rows(shared.query, kRowStride, chunk, key_head * kDim, kDim);
  };
  const auto load_inverse = [&](int chunk) { load_square(shared.inverse, chunk_data(p, chunk, head)); };
  const auto load_rest = [&](int chunk, int buffer) {
    load_rows(shared.key[buffer], kRowStride, chunk, (p.num_key_heads + key_head) * kDim, kDim);
    load_rows(shared.value[buffer], kColumns, chunk, value_channel, kColumns);
    load_square(shared.attention[buffer], chunk_data(p, chunk, head) + kSquare);
    if (thread < 3 * kChunk / 4)
      copy16_or_zero(&shared.gates[buffer][thread * 4], chunk_data(p, chunk, head) + 2 * kSquare + thread * 4,
                     true);
  };

  load_rest(first_chunk, 0);
  load_query(first_chunk);
  load_inverse(first_chunk);
  // The state's accumulators: warp w holds rows 16 w to 16 w + 15, all columns.
  float state[kColumns / 8][4];
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp * 16 + lane_row + e / 2 * 8, column = n * 8 + lane_pair + e % 2;
      state[n][e] = pool[row * kDim + column];
      shared.state[row * kStride + column] = state[n][e];
    }

  // Of everything with 64 rows, a warp has 16 rows and half of the columns.
  constexpr int kTiles = kColumns / 16;
  const int rows = warp % 4 * 16, columns = warp / 4 * (kColumns / 2);
  for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
    const int buffer = (chunk - first_chunk) % kBuffers;
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kBuffers == 2 && chunk + 1 < end_chunk) load_rest(chunk + 1, 1 - buffer);
    const float *beta = shared.gates[buffer], *decay_in = beta + kChunk, *decay_out = beta + 2 * kChunk;

    // K S and Q S; R = beta (V - e^G K S).
    float by_key[kTiles][4] = {}, output[kTiles][4] = {};
#pragma unroll 4
    for (int k = 0; k < kDim; k += 8) {
      const FragmentA key = load_a(shared.key[buffer] + rows * kRowStride + k, kRowStride, 1, lane);
      const FragmentA query = load_a(shared.query + rows * kRowStride + k, kRowStride, 1, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const FragmentB s = load_b(shared.state + k * kStride + columns + 8 * n, kStride, 1, lane);
        multiply_add(by_key[n], key, s);
        multiply_add(output[n], query, s);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = rows + lane_row + e / 2 * 8, column = columns + 8 * n + lane_pair + e % 2;
        shared.residual[row * kStride + column] =
            beta[row] * (shared.value[buffer][row * kColumns + column] - decay_in[row] * by_key[n][e]);
        output[n][e] *= decay_in[row];
      }
    __syncthreads();
    if (chunk + 1 < end_chunk) load_query(chunk + 1);

    // N = T R; T is lower triangular.
    float new_value[kTiles][4] = {};
#pragma unroll 2
    for (int k = 0; k < rows + 16; k += 8) {
      const FragmentA t = load_a(shared.inverse + rows * kSquareStride + k, kSquareStride, 1, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        multiply_add(new_value[n], t,
                     load_b(shared.residual + k * kStride + columns + 8 * n, kStride, 1, lane));
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = rows + lane_row + e / 2 * 8, at = row * kStride + columns + 8 * n + lane_pair + e % 2;
        shared.new_value[at] = new_value[n][e];
        shared.decayed_value[at] = decay_out[row] * new_value[n][e];
      }
    __syncthreads();
    if (chunk + 1 < end_chunk) load_inverse(chunk + 1);

    // O = e^G Q S + P N, in V's place.
#pragma unroll 2
    for (int k = 0; k < rows + 16; k += 8) {
      const FragmentA attention =
          load_a(shared.attention[buffer] + rows * kSquareStride + k, kSquareStride, 1, lane);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        multiply_add(output[n], attention,
                     load_b(shared.new_value + k * kStride + columns + 8 * n, kStride, 1, lane));
    }
    const int count = tokens_of(chunk);
    float* to = convolved(p) +
                (sequence_begin + static_cast<int64_t>(chunk - first_chunk) * kChunk) * channels +
                value_channel + columns + lane_pair;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rows + lane_row + half * 8;
        if (row < count)
          *reinterpret_cast<float2*>(to + row * channels + 8 * n) =
              make_float2(output[n][2 * half], output[n][2 * half + 1]);
      }

    // S <- e^Gend S + K^T (e^(Gend - G) N).
    const float decay = decay_in[kChunk - 1];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) state[n][e] *= decay;
#pragma unroll 2
    for (int k = 0; k < kChunk; k += 8) {
      const FragmentA key = load_a(shared.key[buffer] + k * kRowStride + warp * 16, 1, kRowStride, lane);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n)
        multiply_add(state[n], key, load_b(shared.decayed_value + k * kStride + 8 * n, kStride, 1, lane));
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        shared.state[(warp * 16 + lane_row + e / 2 * 8) * kStride + n * 8 + lane_pair + e % 2] = state[n][e];
    if (kBuffers == 1 && chunk + 1 < end_chunk) {
      __syncthreads();
      load_rest(chunk + 1, 0);
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      pool[(warp * 16 + lane_row + e / 2 * 8) * kDim + n * 8 + lane_pair + e % 2] = state[n][e];
}

template <typename T>
__global__ void __launch_bounds__(256) normalize_kernel(const GatedDeltaParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (item >= p.num_tokens * p.num_value_heads) return;
  const int64_t token = item / p.num_value_heads, head = item % p.num_value_heads;
  const float4 o =
      load4(convolved(p) + token * channels_of(p) + (2 * p.num_key_heads + head) * kDim + lane * 4);
  const float4 z = load4(static_cast<const T*>(p.z) + token * p.z_stride + head * kDim + lane * 4);
  const float4 weight = load4(p.norm + lane * 4);
  const float mean = warp_sum(o.x * o.x + o.y * o.y + o.z * o.z + o.w * o.w) / kDim;
  const float scale = reciprocal_root(mean + p.norm_epsilon);
  T* to = static_cast<T*>(p.output) + item * kDim + lane * 4;
  store1(to, o.x * scale * weight.x * silu(z.x));
  store1(to + 1, o.y * scale * weight.y * silu(z.y));
  store1(to + 2, o.z * scale * weight.z * silu(z.z));
  store1(to + 3, o.w * scale * weight.w * silu(z.w));
}

template <int kColumns, int kBuffers>
cudaError_t scan(const GatedDeltaParams& p, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid =
      dim3(kDim / kColumns, static_cast<unsigned>(p.num_value_heads), static_cast<unsigned>(p.num_sequences));
  shape.block = dim3(256);
  shape.shared_bytes = sizeof(ScanShared<kColumns, kBuffers>);
  const cudaError_t error = allow_shared_bytes(scan_kernel<kColumns, kBuffers>, shape.shared_bytes);
  return error != cudaSuccess ? error : launch(scan_kernel<kColumns, kBuffers>, shape, stream, p);
}

template <typename T>
cudaError_t prefill(const GatedDeltaParams& p, cudaStream_t stream) {
  cudaError_t error = convolve<T, true>(p, stream);
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(p.num_chunks), static_cast<unsigned>(p.num_key_heads));
  shape.block = dim3(256);
  shape.shared_bytes = sizeof(PrepareShared);
  error = allow_shared_bytes(prepare_kernel<T>, shape.shared_bytes);
  if (error == cudaSuccess) error = launch(prepare_kernel<T>, shape, stream, p);
  Device device;
  if (error == cudaSuccess) error = current_device(device);
  if (error != cudaSuccess) return error;
  // One block fills an SM; where tiles of 32 columns would leave half of them idle, tiles of 16 take less
  // time.
  const int64_t wide_blocks = int64_t{4} * p.num_value_heads * p.num_sequences;
  const bool narrow = p.scan_columns == 0 ? wide_blocks * 2 <= device.multiprocessors : p.scan_columns == 16;
  const bool whole = sizeof(ScanShared<32, 2>) <= device.shared_bytes;
  error = !whole ? scan<16, 1>(p, stream) : narrow ? scan<16, 2>(p, stream) : scan<32, 2>(p, stream);
  if (error != cudaSuccess) return error;
  shape = LaunchShape{};
  shape.grid = dim3(static_cast<unsigned>((p.num_tokens * p.num_value_heads + 7) / 8));
  shape.block = dim3(256);
  return launch(normalize_kernel<T>, shape, stream, p);
}

}  // namespace

bool gated_delta_prefill_fits() {
  Device device;
  return current_device(device) != cudaSuccess ||
         std::max(sizeof(PrepareShared), sizeof(ScanShared<16, 1>)) <= device.shared_bytes;
}

size_t gated_delta_prefill_workspace(const GatedDeltaParams& p) {
  return (static_cast<size_t>(p.num_tokens) * channels_of(p) +
          static_cast<size_t>(p.num_chunks) * p.num_value_heads * kChunkFloats) *
         sizeof(float);
}

cudaError_t gated_delta_prefill(const GatedDeltaParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (!valid(p) || p.num_chunks <= 0 || p.num_chunks > p.num_tokens || p.num_key_heads > 65535 ||
      (p.scan_columns != 0 && p.scan_columns != 16 && p.scan_columns != 32) || p.query_starts == nullptr ||
      p.chunk_starts == nullptr || p.chunk_sequences == nullptr)
    return cudaErrorInvalidValue;
  switch (p.data_type) {
    case DataType::kBf16:
      return prefill<__nv_bfloat16>(p, stream);
    case DataType::kF16:
      return prefill<__half>(p, stream);
    case DataType::kF32:
      return prefill<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
