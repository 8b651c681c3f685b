// Contract: sparse_decode_attention.h; one split: attend_split.cuh.
// Floor (bytes): 4 * head_dim * Hkv a selected token (bf16; half with E4M3 codes): 16.8 MB for 4096 tokens of 8 heads of 128, 5.5
// us at 3.03 TB/s a row. FLOP: 4 * Hq * head_dim a token, nothing. Grid: (16 splits, KV heads * head tiles,
// batch) blocks of 4 warps. A large grid runs several blocks to a multiprocessor with one block of keys in
// flight a warp, so that rows of unequal lists balance by themselves; a small one keeps 128 KB in flight in
// each.
#include "kernels/attend_split.cuh"
#include "kernels/launch.h"

namespace spot::kernels {
namespace {

// Blocks in flight a warp: of E4M3 codes twice as many, as many bytes.
template <int kHeadDim, bool kDeep, int kBytes>
constexpr int kStagesOf = (kDeep            ? 512
                           : kHeadDim == 64 ? 128
                                            : kHeadDim) /
                          kHeadDim * (2 / kBytes);

// kBytes: of a number in the pages.
template <typename T, int kHeadDim, bool kDeep, int kBytes>
__global__ void __launch_bounds__(kAttendWarps * 32, kDeep             ? 1
                                                     : kHeadDim == 256 ? 3
                                                                       : 6)
    attention_kernel(const SparseDecodeAttentionParams p, const HeadTiling tiling) {
  constexpr int kStages = kStagesOf<kHeadDim, kDeep, kBytes>;
  using Shared = AttendShared<kHeadDim, kStages, kBytes>;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  __shared__ CombineShared combined;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  const SplitPlace place(tiling, blockIdx.x, blockIdx.y, blockIdx.z);
  AttendSource source = attend_source<kHeadDim, kBytes>(p, place);
  const int list =
      p.rows_per_sequence == 1 ? place.batch_row : place.batch_row * p.num_kv_heads + place.kv_head;
  const int32_t* selected =
      p.selected == nullptr ? nullptr : p.selected + static_cast<int64_t>(list) * p.max_selected;
  const int length = p.lengths[place.batch_row];
  const int count = selected == nullptr ? (length + kPageTokens - 1) / kPageTokens : p.counts[list];
  load_query<T, kHeadDim, kBytes>(source, shared);
  const int32_t* page_table = p.page_table + place.batch_row * p.page_table_stride;
  const auto block_of = [&](int i) { return selected == nullptr ? i : selected[i]; };
  const int begin = static_cast<int>(static_cast<int64_t>(place.split) * count / kAttentionSplits);
  const int end = static_cast<int>(static_cast<int64_t>(place.split + 1) * count / kAttentionSplits);
  source.last_entry = count - 1;
  source.last_valid = end == count && end > begin ? length - block_of(count - 1) * kPageTokens : 0;
  __syncthreads();
  attend_warp<T>(
      source, begin, end, [&](int i) { return page_table[block_of(i)]; }, shared, threadIdx.x / 32,
      threadIdx.x % 32);
  __syncthreads();
  combine<T, kAttendWarps * 32>(p, place, shared, combined);
}

template <typename T, int kHeadDim, bool kDeep, int kBytes>
cudaError_t launch_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  using Shared = AttendShared<kHeadDim, kStagesOf<kHeadDim, kDeep, kBytes>, kBytes>;
  const auto kernel = attention_kernel<T, kHeadDim, kDeep, kBytes>;
  const cudaError_t error = allow_shared_bytes(kernel, sizeof(Shared));
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(kAttentionSplits, p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads), p.batch);
  shape.block = dim3(kAttendWarps * 32);
  shape.shared_bytes = sizeof(Shared);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p, head_tiling(p));
}
template <typename T, int kHeadDim, int kBytes>
cudaError_t launch_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t grid =
      int64_t{kAttentionSplits} * p.batch * p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads);
  using Deep = AttendShared<kHeadDim, kStagesOf<kHeadDim, true, kBytes>, kBytes>;
  const bool deep = grid <= device.multiprocessors && sizeof(Deep) <= device.shared_bytes;
  return deep ? launch_attention<T, kHeadDim, true, kBytes>(p, stream)
              : launch_attention<T, kHeadDim, false, kBytes>(p, stream);
}
template <typename T, int kBytes>
cudaError_t launch_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  switch (p.head_dim) {
    case 64:
      return launch_attention<T, 64, kBytes>(p, stream);
    case 128:
      return launch_attention<T, 128, kBytes>(p, stream);
    case 256:
      return launch_attention<T, 256, kBytes>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

size_t sparse_decode_workspace_bytes(int32_t batch, int32_t num_heads, int32_t num_kv_heads,
                                     int32_t head_dim) {
  return SplitWorkspace{static_cast<int64_t>(batch) * num_kv_heads * head_tiles(num_heads, num_kv_heads),
                        head_dim}
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
  if (int64_t{p.batch} * p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads) > kCounterBytes / 4)
    return cudaErrorInvalidValue;
  const auto aligned = [](const void* pointer) {
    return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  const int64_t together = p.e4m3 ? 16 : 8;  // numbers
  if (!aligned(p.keys) || !aligned(p.values) || !aligned(p.queries) || !aligned(p.out) ||
      !aligned(p.workspace) || p.page_stride % together != 0 || p.head_stride % together != 0 ||
      p.token_stride % together != 0 || (!p.e4m3 && (p.key_scales != nullptr || p.value_scales != nullptr)) ||
      p.page_table == nullptr || p.lengths == nullptr ||
      p.workspace_bytes < sparse_decode_workspace_bytes(p.batch, p.num_heads, p.num_kv_heads, p.head_dim))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

cudaError_t sparse_decode_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = check_attention(p);
  if (error != cudaSuccess || p.batch == 0) return error;
  if (p.selected != nullptr && p.counts == nullptr) return cudaErrorInvalidValue;
  if (p.type == DataType::kBf16)
    return p.e4m3 ? launch_attention<__nv_bfloat16, 1>(p, stream)
                  : launch_attention<__nv_bfloat16, 2>(p, stream);
  return p.e4m3 ? launch_attention<__half, 1>(p, stream) : launch_attention<__half, 2>(p, stream);
}

}  // namespace spot::kernels
