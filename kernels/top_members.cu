// Contract: top_members.h. A block takes a row. Scores become integers in the same order, kept in shared
// memory where they fit; 16 rounds of counting find the k-th largest, two bits a round: counts do not depend
// on the order of addition. Where more keys tie with it than there is room for, the last one admitted is
// found by counting too.
//
// Bound by the rounds: 16 * 4 bytes of shared memory a key, at 16384 keys 8200 clocks a row, two or three
// rows an SM at a time.
//
// Grid: rows, blocks of 512 threads, up to 192 KB of shared memory.
#include <algorithm>

#include "kernels/query_strip.cuh"
#include "kernels/top_members.h"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr size_t kSharedBytes = 192 * 1024;  // most of a row's scores in shared memory
constexpr float kLn2 = 0.6931471805599453f;

// Larger floats give larger integers; a number with its sign bit set (a negative NaN apart) less than any
// without.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

// Sums over the block, the same in every thread. `partial` alternates between calls, so that one barrier is
// enough.
template <int kCount>
__device__ __forceinline__ void count_in_block(int (&counts)[kCount], int (*partial)[kCount]) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int sum = __reduce_add_sync(0xffffffffu, counts[i]);
    if (lane == 0) partial[warp][i] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    counts[i] = __reduce_add_sync(0xffffffffu, lane < kWarps ? partial[lane][i] : 0);
}

__global__ void __launch_bounds__(kThreads) top_members_kernel(const TopMembersParams p, const bool cached) {
  __shared__ int partial_counts[2][kWarps][3];
  __shared__ float partial_sums[5][kWarps];
  const QueryStrip& strip = p.strip;
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int begin = strip.low[row] - strip.first_key, count = strip.last[row] + 1 - strip.low[row];
  const float* scores = p.scores + row * strip.width + begin;
  float* mass = p.mass + row * strip.width + begin;
  uint32_t* const shared = reinterpret_cast<uint32_t*>(ptx::dynamic_shared());

  float largest = -INFINITY, information = 0.0f, total = 0.0f;
  for (int i = thread; i < count; i += kThreads) {
    const float score = scores[i], t = mass[i];
    if (cached) shared[i] = ordered(score);
    largest = fmaxf(largest, score);
    total += t;
    information += t == 0.0f ? 0.0f : t * ptx::log2_approx(t);
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  if (thread % 32 == 0) partial_sums[0][thread / 32] = largest;
  total = sum_of_block(total, partial_sums[1]);  // its barrier serves `shared` and the first sums too
  information = sum_of_block(information, partial_sums[2]);
  largest = thread % 32 < kWarps ? partial_sums[0][thread % 32] : -INFINITY;
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));

  const auto key = [&](int i) { return cached ? shared[i] : ordered(scores[i]); };
  uint32_t threshold = 0;  // members: keys above it, and those equal to it up to index last_equal
  int last_equal = count;
  if (count > p.k) {
    int round = 0;
    for (int shift = 30; shift >= 0; shift -= 2, ++round) {
      int counts[3] = {};
      for (int i = thread; i < count; i += kThreads) {
        const uint32_t value = key(i);
#pragma unroll
        for (uint32_t j = 0; j < 3; ++j) counts[j] += value >= threshold + ((j + 1) << shift) ? 1 : 0;
      }
      count_in_block(counts, partial_counts[round % 2]);
      threshold += static_cast<uint32_t>((counts[0] >= p.k) + (counts[1] >= p.k) + (counts[2] >= p.k))
                   << shift;
    }
    int counts[3] = {};  // above, equal
    for (int i = thread; i < count; i += kThreads) {
      const uint32_t value = key(i);
      counts[0] += value > threshold ? 1 : 0;
      counts[1] += value == threshold ? 1 : 0;
    }
    count_in_block(counts, partial_counts[round++ % 2]);
    const int wanted = p.k - counts[0];
    if (counts[1] > wanted) {         // the same in every thread
      int low = 0, high = count - 1;  // the first index with `wanted` equal keys up to it
      while (low < high) {
        const int middle = (low + high) / 2;
        int equal[3] = {};
        for (int i = thread; i <= middle; i += kThreads) equal[0] += key(i) == threshold ? 1 : 0;
        count_in_block(equal, partial_counts[round++ % 2]);
        (equal[0] >= wanted ? high : low) = equal[0] >= wanted ? middle : middle + 1;
      }
      last_equal = low;
    }
  }
  const auto member = [&](int i) {
    const uint32_t value = key(i);
    return value > threshold || (value == threshold && i <= last_equal);
  };

  float sum = 0.0f, kept = 0.0f;
  for (int i = thread; i < count; i += kThreads)
    if (member(i)) {
      sum += ptx::exp2_approx(scores[i] - largest);
      kept += mass[i];
    }
  sum = sum_of_block(sum, partial_sums[3]);
  kept = sum_of_block(kept, partial_sums[4]);
  for (int i = thread; i < count; i += kThreads)
    // Written so that a NaN stays one.
    mass[i] = member(i) && !(kept < kSmallestMass) ? mass[i] / kept : -1.0f;
  for (int i = thread; i < p.logsumexp_stride; i += kThreads)
    p.logsumexp[row * p.logsumexp_stride + i] = i == 0 ? largest + log2f(sum) : -INFINITY;
  // -sum (t / total) log2(t / total) = log2 total - (sum t log2 t) / total
  if (thread == 0)
    p.entropy[row] = total < kSmallestMass ? 0.0f : (log2f(total) - information / total) * kLn2;
}

}  // namespace

cudaError_t top_members(const TopMembersParams& p, cudaStream_t stream) {
  if (!is_strip(p.strip) || p.k < 1 || p.scores == nullptr || p.mass == nullptr || p.logsumexp == nullptr ||
      p.logsumexp_stride < 1 || p.entropy == nullptr)
    return cudaErrorInvalidValue;
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const size_t row = static_cast<size_t>(p.strip.width) * sizeof(uint32_t);
  const bool cached = row <= std::min(kSharedBytes, device.shared_bytes - kOwnSharedBytes);
  const size_t bytes = cached ? row : 0;
  error = allow_shared_bytes(top_members_kernel, bytes);
  if (error != cudaSuccess) return error;
  return launch(top_members_kernel, {dim3(static_cast<unsigned>(p.strip.rows)), dim3(kThreads), bytes},
                stream, p, cached);
}

}  // namespace spot::kernels
