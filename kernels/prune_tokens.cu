// Contract: prune_tokens.h. One thread block a query head: masses in registers (what does not fit is computed
// again from the logits), the threshold by bisection, first of its logarithm. Every round adds the masses
// above the middle, as integers; once few enough masses lie between the ends, they alone are looked at, in
// shared memory. The kept tokens are bits in the workspace; the last of a KV head's thread blocks to arrive
// lists their union. Floor (bytes): the logits once, from L2. In fact bound by the rounds' barriers. No block
// waits for another.
#include "kernels/launch.h"
#include "kernels/prune_tokens.h"
#include "kernels/ptx.cuh"

namespace spot::kernels {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kHeld = 32;         // masses a thread holds in registers
constexpr int kRemaining = 4096;  // masses that fit in shared memory

__host__ __device__ constexpr int64_t bit_words(int64_t max_selected) {
  return (max_selected * kPageTokens + 31) / 32;
}

struct Sums {
  uint64_t mass;
  uint32_t count;
};
struct PruneShared {
  uint64_t mass[2][kWarps];
  uint32_t count[2][kWarps];
  float largest[kWarps];
  uint32_t remaining[kRemaining];
  uint32_t used;
  int last;
};

__device__ __forceinline__ uint64_t warp_sum(uint64_t x) {
  const uint64_t low = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x & 0xffffu));
  const uint64_t middle = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x >> 16 & 0xffffffu));
  const uint64_t high = __reduce_add_sync(0xffffffffu, static_cast<uint32_t>(x >> 40));
  return low + (middle << 16) + (high << 40);
}
// Every thread gets the block's sums; `turn` alternates, so that one barrier a call is enough.
__device__ __forceinline__ Sums block_sum(Sums own, PruneShared& shared, int turn) {
  own.mass = warp_sum(own.mass);
  own.count = __reduce_add_sync(0xffffffffu, own.count);
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    shared.mass[turn][threadIdx.x / 32] = own.mass;
    shared.count[turn][threadIdx.x / 32] = own.count;
  }
  __syncthreads();
  return {warp_sum(shared.mass[turn][lane]), __reduce_add_sync(0xffffffffu, shared.count[turn][lane])};
}

// Between 1 <= low < high - 1: by logarithm while they are far apart, then halfway.
__device__ __forceinline__ uint32_t middle_of(uint32_t low, uint32_t high) {
  const int low_bits = 32 - __clz(static_cast<int>(low)), high_bits = 32 - __clz(static_cast<int>(high - 1));
  return high_bits > low_bits ? 1u << ((low_bits + high_bits) / 2) : low + (high - low) / 2;
}

__global__ void __launch_bounds__(kThreads, 1)
    prune_kernel(const PruneTokensParams p, uint32_t probability, int group) {
  PruneShared& shared = *reinterpret_cast<PruneShared*>(ptx::dynamic_shared());
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int head = blockIdx.x, row = blockIdx.y, kv_head = head / group;
  const int list = row * p.num_kv_heads + kv_head;
  const int count = p.counts[list], length = p.lengths[row], n = count * kPageTokens;
  const float* logits =
      p.logits + (static_cast<int64_t>(row) * p.num_heads + head) * p.max_selected * kPageTokens;
  const int64_t words = bit_words(p.max_selected);
  uint32_t* counters = static_cast<uint32_t*>(p.workspace);
  uint32_t* bits = counters + kCounterBytes / 4;
  uint32_t* own_bits = bits + (static_cast<int64_t>(row) * p.num_heads + head) * words;
  const float minus_infinity = __uint_as_float(0xff800000u), scale = 1.44269504088896340736f;

  float largest = minus_infinity;
  uint32_t held[kHeld];  // logits, then masses
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = i * kThreads + tid;
    const float logit = at < n ? canonical_score(logits[at]) : minus_infinity;
    held[i] = float_bits(logit);
    largest = fmaxf(largest, logit);
  }
  for (int at = kHeld * kThreads + tid; at < n; at += kThreads)
    largest = fmaxf(largest, canonical_score(logits[at]));
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  if (lane == 0) shared.largest[warp] = largest;
  if (tid == 0) shared.used = 0;
  __syncthreads();
  largest = shared.largest[lane];
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));

  const auto mass_at = [&](int at) { return mass_of(canonical_score(logits[at]), largest, scale); };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const bool there = i * kThreads + tid < n;
    held[i] = there ? mass_of(bits_float(held[i]), largest, scale) : 0;
  }
  const auto above = [&](uint32_t threshold) {  // of this thread
    Sums sums = {0, 0};
    uint32_t mass = 0;  // 32 masses of at most 2^24
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (held[i] >= threshold) mass += held[i], ++sums.count;
    sums.mass = mass;
    for (int at = kHeld * kThreads + tid; at < n; at += kThreads) {
      const uint32_t m = mass_at(at);
      if (m >= threshold) sums.mass += m, ++sums.count;
    }
    return sums;
  };
  uint32_t low = 1, high = (1u << kMassBits) + 1;  // masses >= low hold the target, those >= high do not
  if (n > 0 && length > p.floor) {
    int turn = 0;
    Sums at_low = block_sum(above(low), shared, turn), at_high = {0, 0};
    const uint64_t target = mass_target(probability, at_low.mass);
    while (high - low > 1 && at_low.count - at_high.count > kRemaining) {
      const uint32_t middle = middle_of(low, high);
      turn ^= 1;
      const Sums sums = block_sum(above(middle), shared, turn);
      if (sums.mass >= target)
        low = middle, at_low = sums;
      else
        high = middle, at_high = sums;
    }
    if (high - low > 1) {
      const auto put = [&](uint32_t m) {
        if (m >= low && m < high) shared.remaining[atomicAdd(&shared.used, 1u)] = m;
      };
#pragma unroll
      for (int i = 0; i < kHeld; ++i) put(held[i]);
      for (int at = kHeld * kThreads + tid; at < n; at += kThreads) put(mass_at(at));
      __syncthreads();
      const int used = static_cast<int>(shared.used);
      uint32_t few[kRemaining / kThreads];
#pragma unroll
      for (int i = 0; i < kRemaining / kThreads; ++i)
        few[i] = i * kThreads + tid < used ? shared.remaining[i * kThreads + tid] : 0;
      while (high - low > 1) {
        const uint32_t middle = middle_of(low, high);
        Sums own = {0, 0};
#pragma unroll
        for (int i = 0; i < kRemaining / kThreads; ++i)
          if (few[i] >= middle) own.mass += few[i], ++own.count;
        turn ^= 1;
        const Sums sums = block_sum(own, shared, turn);
        if (at_high.mass + sums.mass >= target)
          low = middle;
        else
          high = middle;
      }
    }
  }

  const bool all = length <= p.floor;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = i * kThreads + warp * 32;
    if (at >= n) break;
    const uint32_t word = __ballot_sync(0xffffffffu, at + lane < n && (all || held[i] >= low));
    if (lane == 0) own_bits[at / 32] = word;
  }
  for (int at = kHeld * kThreads + warp * 32; at < n; at += kThreads) {
    const bool there = at + lane < n;
    const uint32_t word = __ballot_sync(0xffffffffu, there && (all || mass_at(at + lane) >= low));
    if (lane == 0) own_bits[at / 32] = word;
  }
  __syncthreads();
  if (tid == 0) {
    __threadfence();
    shared.last = atomicAdd(&counters[list], 1u) == static_cast<uint32_t>(group - 1);
    if (shared.last) {
      counters[list] = 0;
      __threadfence();
    }
  }
  __syncthreads();
  if (!shared.last) return;

  // The union, in order: a word of 32 tokens, two blocks, a thread.
  const int32_t* selected = p.selected + static_cast<int64_t>(list) * p.max_selected;
  int32_t* tokens = p.tokens + static_cast<int64_t>(list) * p.max_selected * kPageTokens;
  const uint32_t* head_bits = bits + (static_cast<int64_t>(row) * p.num_heads + kv_head * group) * words;
  uint32_t written = 0;
  for (int first = 0; first < (n + 31) / 32; first += kThreads) {
    const int word = first + tid;
    uint32_t kept = 0;
    int begin[2] = {0, 0};
    if (word < (n + 31) / 32) {
      for (int h = 0; h < group; ++h) kept |= __ldcg(&head_bits[h * words + word]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool there = 2 * word + half < count;
        begin[half] = there ? selected[2 * word + half] * kPageTokens : 0;
        const int visible = there ? max(min(length - begin[half], kPageTokens), 0) : 0;
        kept &= ~(((0xffffu << visible) & 0xffffu) << (16 * half));
      }
    }
    const uint32_t own = static_cast<uint32_t>(__popc(kept));
    uint32_t before = own;  // inclusive, in the warp
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane >= offset) before += other;
    }
    __syncthreads();
    if (lane == 31) shared.count[0][warp] = before;
    __syncthreads();
    const uint32_t warp_total = shared.count[0][lane];
    const uint32_t total = __reduce_add_sync(0xffffffffu, warp_total);
    uint32_t at = written + before - own + __reduce_add_sync(0xffffffffu, lane < warp ? warp_total : 0u);
    for (uint32_t rest = kept; rest != 0; rest &= rest - 1) {
      const int bit = __ffs(static_cast<int>(rest)) - 1;
      tokens[at++] = begin[bit / 16] + bit % 16;
    }
    written += total;
  }
  if (tid == 0) p.token_counts[list] = static_cast<int32_t>(written);
}

}  // namespace

size_t prune_tokens_workspace_bytes(int32_t batch, int32_t num_heads, int32_t max_selected) {
  return kCounterBytes + static_cast<size_t>(batch) * num_heads * bit_words(max_selected) * sizeof(uint32_t);
}

cudaError_t prune_tokens(const PruneTokensParams& p, cudaStream_t stream) {
  if (p.batch < 0 || p.num_kv_heads < 1 || p.num_heads < p.num_kv_heads ||
      p.num_heads % p.num_kv_heads != 0 || p.max_selected < 0 || p.max_selected > 65536 || !(p.p > 0.0f) ||
      p.batch > 65535 || int64_t{p.batch} * p.num_kv_heads > kCounterBytes / 4)
    return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  if (p.lengths == nullptr || p.selected == nullptr || p.counts == nullptr || p.logits == nullptr ||
      p.tokens == nullptr || p.token_counts == nullptr || p.workspace == nullptr ||
      p.workspace_bytes < prune_tokens_workspace_bytes(p.batch, p.num_heads, p.max_selected))
    return cudaErrorInvalidValue;
  const cudaError_t error = allow_shared_bytes(prune_kernel, sizeof(PruneShared));
  if (error != cudaSuccess) return error;
  SelectionRule rules;
  rules.p = p.p;
  LaunchShape shape;
  shape.grid = dim3(p.num_heads, p.batch);
  shape.block = dim3(kThreads);
  shape.shared_bytes = sizeof(PruneShared);
  shape.overlap = p.overlap;
  return launch(prune_kernel, shape, stream, p, fixed_probability(rules), p.num_heads / p.num_kv_heads);
}

}  // namespace spot::kernels
