// Contract: sparse_decode_attention.h; one split: attend_split.cuh.
// Floor (bytes): 4 * head_dim * Hkv a selected token (bf16): 16.8 MB for 4096 tokens of 8 heads of 128, 5.5
// us at 3.03 TB/s a row. FLOP: 4 * Hq * head_dim a token, nothing. Grid: (16 splits, KV heads * head tiles,
// batch) blocks of 8 warps, several to a multiprocessor, so that rows of unequal lists balance by themselves.
// Each writes its partial result; the last of the 16 to arrive folds them in split order (no block ever waits
// for another) and resets the counter for the next launch.
#include "kernels/attend_split.cuh"
#include "kernels/launch.h"

namespace spot::kernels {
namespace {

// Blocks in flight a warp, so that three blocks of threads (one for head_dim 256) share a multiprocessor.
template <int kHeadDim>
constexpr int kStagesOf = kHeadDim == 64 ? 2 : 1;

// The workspace: counters, then {maximum, sum}, then O, of every (batch, KV head, head tile, split).
struct Workspace {
  int64_t pairs;  // batch * KV heads * head tiles
  int head_dim;
  __host__ __device__ size_t counters_bytes() const {
    return (static_cast<size_t>(pairs) * 4 + 255) / 256 * 256;
  }
  __host__ __device__ size_t sums_bytes() const {
    return static_cast<size_t>(pairs) * kAttentionSplits * kHeadTile * 8;
  }
  __host__ __device__ size_t bytes() const {
    return counters_bytes() + sums_bytes() +
           static_cast<size_t>(pairs) * kAttentionSplits * kHeadTile * head_dim * 4;
  }
};
int head_tiles(int32_t num_heads, int32_t num_kv_heads) {
  return (num_heads / num_kv_heads + kHeadTile - 1) / kHeadTile;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kAttendWarps * 32, kHeadDim == 256 ? 1 : 3)
    attention_kernel(const SparseDecodeAttentionParams p) {
  constexpr int kStages = kStagesOf<kHeadDim>;
  using Shared = AttendShared<kHeadDim, kStages>;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  __shared__ int last;
  ptx::griddepcontrol_wait();

  const int group = p.num_heads / p.num_kv_heads, tiles = (group + kHeadTile - 1) / kHeadTile;
  const int split = blockIdx.x, kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles, b = blockIdx.z;
  const int first_head = kv_head * group + tile * kHeadTile;
  AttendSource source;
  source.queries = static_cast<const uint16_t*>(p.queries) +
                   (static_cast<int64_t>(b) * p.num_heads + first_head) * kHeadDim;
  source.keys = static_cast<const uint16_t*>(p.keys) + kv_head * p.head_stride;
  source.values = static_cast<const uint16_t*>(p.values) + kv_head * p.head_stride;
  source.page_stride = p.page_stride;
  source.token_stride = p.token_stride;
  source.heads = min(group - tile * kHeadTile, kHeadTile);
  source.scale_log2 = p.scale * 1.4426950408889634f;
  const int list = p.rows_per_sequence == 1 ? b : b * p.num_kv_heads + kv_head;
  const int32_t* selected =
      p.selected == nullptr ? nullptr : p.selected + static_cast<int64_t>(list) * p.max_selected;
  const int length = p.lengths[b];
  const int count = selected == nullptr ? (length + kPageTokens - 1) / kPageTokens : p.counts[list];
  const int32_t* page_table = p.page_table + b * p.page_table_stride;
  const auto block_of = [&](int i) { return selected == nullptr ? i : selected[i]; };
  source.last_entry = count - 1;
  source.last_valid = count > 0 ? length - block_of(count - 1) * kPageTokens : 0;

  load_query_fragments<kHeadDim>(source, shared.query);
  __syncthreads();
  const int begin = static_cast<int>(static_cast<int64_t>(split) * count / kAttentionSplits);
  const int end = static_cast<int>(static_cast<int64_t>(split + 1) * count / kAttentionSplits);
  attend_warp<T, kHeadDim, kStages>(
      source, begin, end, [&](int i) { return page_table[block_of(i)]; }, shared, threadIdx.x / 32,
      threadIdx.x % 32);
  __syncthreads();

  const Workspace layout = {static_cast<int64_t>(p.batch) * p.num_kv_heads * tiles, kHeadDim};
  const int64_t pair = (static_cast<int64_t>(b) * p.num_kv_heads + kv_head) * tiles + tile;
  uint8_t* workspace = static_cast<uint8_t*>(p.workspace);
  uint32_t* counter = reinterpret_cast<uint32_t*>(workspace) + pair;
  float2* sums =
      reinterpret_cast<float2*>(workspace + layout.counters_bytes()) + pair * kAttentionSplits * kHeadTile;
  float* partial = reinterpret_cast<float*>(workspace + layout.counters_bytes() + layout.sums_bytes()) +
                   pair * kAttentionSplits * kHeadTile * kHeadDim;
  for (int e = threadIdx.x; e < source.heads * kHeadDim; e += blockDim.x) {
    const int head = e / kHeadDim, dim = e % kHeadDim;
    float2 maximum_sum;
    partial[split * kHeadTile * kHeadDim + e] =
        fold_warps<kHeadDim, kStages>(shared, head, dim, &maximum_sum);
    if (dim == 0) sums[split * kHeadTile + head] = maximum_sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1u) == kAttentionSplits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  if (threadIdx.x == 0) *counter = 0;
  for (int e = threadIdx.x; e < source.heads * kHeadDim; e += blockDim.x) {
    const int head = e / kHeadDim, dim = e % kHeadDim;
    float2 largest_sum;
    const float value =
        fold_splits([&](int s) { return __ldcg(&sums[s * kHeadTile + head]).x; },
                    [&](int s) { return __ldcg(&sums[s * kHeadTile + head]).y; },
                    [&](int s) { return __ldcg(&partial[s * kHeadTile * kHeadDim + e]); }, &largest_sum);
    const int64_t q = static_cast<int64_t>(b) * p.num_heads + first_head + head;
    static_cast<T*>(p.out)[q * kHeadDim + dim] = ptx::from_float<T>(value);
    if (dim == 0 && p.log_sum_exp != nullptr) p.log_sum_exp[q] = log_sum_exp_of(largest_sum);
  }
}

template <typename T, int kHeadDim>
cudaError_t launch_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  using Shared = AttendShared<kHeadDim, kStagesOf<kHeadDim>>;
  const auto kernel = attention_kernel<T, kHeadDim>;
  const cudaError_t error = allow_shared_bytes(kernel, sizeof(Shared));
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(kAttentionSplits, p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads), p.batch);
  shape.block = dim3(kAttendWarps * 32);
  shape.shared_bytes = sizeof(Shared);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p);
}

}  // namespace

size_t sparse_decode_workspace_bytes(int32_t batch, int32_t num_heads, int32_t num_kv_heads,
                                     int32_t head_dim) {
  return Workspace{static_cast<int64_t>(batch) * num_kv_heads * head_tiles(num_heads, num_kv_heads), head_dim}
      .bytes();
}

cudaError_t check_attention(const SparseDecodeAttentionParams& p) {
  if (p.batch < 0 || p.num_kv_heads < 1 || p.num_heads < p.num_kv_heads ||
      p.num_heads % p.num_kv_heads != 0 || p.num_heads / p.num_kv_heads > 16 ||
      (p.rows_per_sequence != 1 && p.rows_per_sequence != p.num_kv_heads) ||
      (p.head_dim != 64 && p.head_dim != 128 && p.head_dim != 256) ||
      (p.type != DataType::kBf16 && p.type != DataType::kF16))
    return cudaErrorInvalidValue;
  if (p.batch == 0) return cudaSuccess;
  const auto aligned = [](const void* pointer) {
    return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  if (!aligned(p.keys) || !aligned(p.values) || !aligned(p.queries) || !aligned(p.workspace) ||
      p.page_stride % 8 != 0 || p.head_stride % 8 != 0 || p.token_stride % 8 != 0 ||
      p.page_table == nullptr || p.lengths == nullptr || p.out == nullptr ||
      p.workspace_bytes < sparse_decode_workspace_bytes(p.batch, p.num_heads, p.num_kv_heads, p.head_dim))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t sparse_decode_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = check_attention(p);
  if (error != cudaSuccess || p.batch == 0) return error;
  if (p.selected != nullptr && p.counts == nullptr) return cudaErrorInvalidValue;
  const bool bf16 = p.type == DataType::kBf16;
  switch (p.head_dim) {
    case 64:
      return bf16 ? launch_attention<__nv_bfloat16, 64>(p, stream) : launch_attention<__half, 64>(p, stream);
    case 128:
      return bf16 ? launch_attention<__nv_bfloat16, 128>(p, stream)
                  : launch_attention<__half, 128>(p, stream);
    case 256:
      return bf16 ? launch_attention<__nv_bfloat16, 256>(p, stream)
                  : launch_attention<__half, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
