// Contract: token_attention.h; arithmetic and folding: attend_split.cuh. Floor (bytes): 4 head_dim a token
// and KV head, as for blocks, but in pieces of one row of K and one of V. Grid as in
// sparse_decode_attention.cu.
#include "kernels/attend_split.cuh"
#include "kernels/launch.h"
#include "kernels/token_attention.h"

namespace spot::kernels {
namespace {

// Sixteens of tokens in flight a warp.
template <int kHeadDim, bool kDeep>
constexpr int kStagesFor = (kDeep            ? 512
                            : kHeadDim == 64 ? 128
                                             : kHeadDim) /
                           kHeadDim;

// Starts the copies of 16 tokens; lanes r and r + 16 hold the slot of row r.
template <int kHeadDim>
__device__ __forceinline__ void copy_tokens(const AttendSource& source, int slot, uint32_t stage, int lane) {
  using Shape = AttendShape<kHeadDim>;
  constexpr int kChunks = Shape::kRowBytes / 16;  // a row
#pragma unroll 4
  for (int i = 0; i < kPageTokens * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    const int at = __shfl_sync(0xffffffffu, slot, row);
    const int64_t from = static_cast<int64_t>(at / kPageTokens) * source.page_stride +
                         at % kPageTokens * source.token_stride + chunk * 16;
    const uint32_t to = stage + row * Shape::kRowBytes + Shape::place(chunk, row) * 16;
    ptx::cp_async_16(to, source.keys + from);
    ptx::cp_async_16(to + Shape::kTileBytes, source.values + from);
  }
}

template <typename T, int kHeadDim, bool kDeep>
__global__ void __launch_bounds__(kAttendWarps * 32, kDeep             ? 1
                                                     : kHeadDim == 256 ? 3
                                                                       : 6)
    token_kernel(const SparseDecodeAttentionParams p, const HeadTiling tiling) {
  constexpr int kStages = kStagesFor<kHeadDim, kDeep>;
  using Shared = AttendShared<kHeadDim, kStages>;
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  __shared__ CombineShared combined;
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();

  const SplitPlace place(tiling, blockIdx.x, blockIdx.y, blockIdx.z);
  const AttendSource source = attend_source<kHeadDim>(p, place);
  const int64_t list = static_cast<int64_t>(place.batch_row) * p.num_kv_heads + place.kv_head;
  const int32_t* tokens = p.selected + list * p.max_selected;
  const int32_t* page_table = p.page_table + place.batch_row * p.page_table_stride;
  const int count = p.counts[list], entries = (count + kPageTokens - 1) / kPageTokens;
  load_query_fragments<kHeadDim>(source, shared.query);
  const int begin = static_cast<int>(static_cast<int64_t>(place.split) * entries / kAttentionSplits);
  const int end = static_cast<int>(static_cast<int64_t>(place.split + 1) * entries / kAttentionSplits);
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = begin + warp;
  const int blocks = first < end ? (end - first + kAttendWarps - 1) / kAttendWarps : 0;
  const uint32_t stages = ptx::shared_address(shared.tiles[warp]);
  constexpr int kBlockBytes = AttendShape<kHeadDim>::kBlockBytes;
  // Rows behind the last token repeat it: they weigh nothing.
  const auto slot_of = [&](int i) {
    const int token = tokens[min((first + i * kAttendWarps) * kPageTokens + lane % kPageTokens, count - 1)];
    return page_table[token / kPageTokens] * kPageTokens + token % kPageTokens;
  };
  WarpAttention<kHeadDim> state;
  state.reset();
  const float scale_log2[2] = {source.scale_log2, source.scale_log2};
  // Sixteen i is copied at turn i and attended to at turn i + kStages; its slots are looked up one turn
  // ahead.
  int next = blocks > 0 ? slot_of(0) : 0, stage = 0;
#pragma unroll 1
  for (int i = 0; i < blocks + kStages; ++i) {
    if (i >= kStages) {
      ptx::cp_async_wait<kStages - 1>();
      __syncwarp();
      const int valid = min(count - (first + (i - kStages) * kAttendWarps) * kPageTokens, kPageTokens);
      state.template add_block<T>(stages + stage * kBlockBytes, shared.query, valid, scale_log2, lane);
      __syncwarp();
    }
    if (i < blocks) {
      copy_tokens<kHeadDim>(source, next, stages + stage * kBlockBytes, lane);
      if (i + 1 < blocks) next = slot_of(i + 1);
    }
    ptx::cp_async_commit();
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncwarp();
  state.park(shared.tiles[warp][0], shared.maximum[warp], shared.sum[warp], lane);
  __syncthreads();
  combine<T, kAttendWarps * 32>(p, place, shared, combined);
}

template <typename T, int kHeadDim, bool kDeep>
cudaError_t launch_tokens(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  using Shared = AttendShared<kHeadDim, kStagesFor<kHeadDim, kDeep>>;
  const auto kernel = token_kernel<T, kHeadDim, kDeep>;
  const cudaError_t error = allow_shared_bytes(kernel, sizeof(Shared));
  if (error != cudaSuccess) return error;
  LaunchShape shape;
  shape.grid = dim3(kAttentionSplits, p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads), p.batch);
  shape.block = dim3(kAttendWarps * 32);
  shape.shared_bytes = sizeof(Shared);
  shape.overlap = p.overlap;
  return launch(kernel, shape, stream, p, head_tiling(p));
}
template <typename T, int kHeadDim>
cudaError_t launch_tokens(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t grid =
      int64_t{kAttentionSplits} * p.batch * p.num_kv_heads * head_tiles(p.num_heads, p.num_kv_heads);
  const bool deep = grid <= device.multiprocessors &&
                    sizeof(AttendShared<kHeadDim, kStagesFor<kHeadDim, true>>) <= device.shared_bytes;
  return deep ? launch_tokens<T, kHeadDim, true>(p, stream) : launch_tokens<T, kHeadDim, false>(p, stream);
}

}  // namespace

cudaError_t token_attention(const SparseDecodeAttentionParams& p, cudaStream_t stream) {
  const cudaError_t error = check_attention(p);
  if (error != cudaSuccess || p.batch == 0) return error;
  if (p.selected == nullptr || p.counts == nullptr || p.rows_per_sequence != p.num_kv_heads || p.e4m3)
    return cudaErrorInvalidValue;
  const bool bf16 = p.type == DataType::kBf16;
  switch (p.head_dim) {
    case 64:
      return bf16 ? launch_tokens<__nv_bfloat16, 64>(p, stream) : launch_tokens<__half, 64>(p, stream);
    case 128:
      return bf16 ? launch_tokens<__nv_bfloat16, 128>(p, stream) : launch_tokens<__half, 128>(p, stream);
    case 256:
      return bf16 ? launch_tokens<__nv_bfloat16, 256>(p, stream) : launch_tokens<__half, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
