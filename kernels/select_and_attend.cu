// Contract: select_and_attend.h.
//
// The fused kernel, for small batches: one thread block a (sequence, KV head, head tile, split), 128 of them
// at batch 1 and 8 KV heads on 132 multiprocessors. Every block selects the whole row itself: 8192 scores are
// 32 KB from L2 to shared memory, cheaper than a launch. Then it attends to its 16th of the list,
// with all its copies in flight at once at 4096 tokens, and the last of the 16 blocks folds them
// (attend_split.cuh). Clusters, tried first, lose: 8 clusters of 16 are not co-resident on every H100, and
// their barrier's release costs what the fence here does. Floor (bytes): as sparse_decode_attention.cu; the
// scores are L2 traffic. A card without the shared memory for it runs the two kernels. Work is bounded by the row's own count. Grid: (16, KV heads * head tiles, batch)
// blocks of 16 warps; all select, the first 4 attend.
#include <algorithm>
#include <type_traits>

#include "kernels/attend_split.cuh"
#include "kernels/launch.h"
#include "kernels/select_and_attend.h"
#include "kernels/select_row.cuh"

namespace spot::kernels {
namespace {

constexpr int kTouchedPages = 8192;  // of the page table: 256 lines of L1

template <int kHeadDim, int kBytes>
constexpr int kFusedStages = 1024 / (kHeadDim * kBytes);  // 32 KB a warp

template <int kHeadDim, int kBytes>
struct FusedShared {
  // Its tiles first; the selection lies over them, and behind it the row's scores.
  AttendShared<kHeadDim, kFusedStages<kHeadDim, kBytes>, kBytes> attend;
  CombineShared combined;
  int32_t list[4];  // longer: dynamic shared memory goes on
};

// kMass: see SelectTask. kBytes: of a number in the pages.
template <typename T, int kHeadDim, bool kMass, int kBytes>
__global__ void __launch_bounds__(kSelectThreads, 1)
    fused_kernel(const SelectAndAttendParams p, const SelectConstants constants, const HeadTiling tiling) {
  using Shared = FusedShared<kHeadDim, kBytes>;
  static_assert(sizeof(SelectShared) + kSelectCached * sizeof(float) <= sizeof(Shared::attend.tiles));
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  SelectShared& select = *reinterpret_cast<SelectShared*>(ptx::dynamic_shared());
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  if (p.overlap != Overlap::kHistory) ptx::griddepcontrol_wait();

  // Everything that does not hang on something else is asked for at once: scores, length, queries, and the
  // page table, so that it lies in L1 when the list is known.
  const SparseDecodeAttentionParams& a = p.attention;
  const SplitPlace place(tiling, blockIdx.x, blockIdx.y, blockIdx.z);
  const bool per_head = a.rows_per_sequence > 1;
  const int r = per_head ? place.batch_row * a.num_kv_heads + place.kv_head : place.batch_row;
  const bool cached = p.max_blocks <= kSelectCached;
  const float* global_scores = p.scores + r * p.score_stride;
  float* cached_scores = reinterpret_cast<float*>(&select + 1);
  const float* scores = cached ? cached_scores : global_scores;
  const int32_t* page_table = a.page_table + place.batch_row * a.page_table_stride;
  if (cached && p.overlap != Overlap::kHistory) copy_scores(global_scores, p.max_blocks, cached_scores);
  const int length = a.lengths[place.batch_row];
#pragma unroll 1
  for (int i = tid * 32; i < min(p.max_blocks, kTouchedPages); i += kSelectThreads * 32)
    ptx::touch(page_table + i);
  AttendSource source = attend_source<kHeadDim, kBytes>(a, place);
  load_query<T, kHeadDim, kBytes>(source, shared.attend);
  SelectConstants own_constants = constants;
  own_constants.rules.block_size = kPageTokens;  // which the compiler may know
  const SelectRow row = select_row(own_constants.rules, length, constants.capacity);
  // The memory pipe is idle while we select: blocks already known to be selected begin to move into L2. The
  // 16 thread blocks of a KV head share them out by index.
  const bool contiguous = a.token_stride == kHeadDim;
  const auto fetch = [&](int block) {
    if (!contiguous || block % kAttentionSplits != place.split) return;
    const int64_t at = page_table[block] * source.page_stride;
    ptx::prefetch_l2(source.keys + at, AttendShape<kHeadDim, kBytes>::kTileBytes);
    ptx::prefetch_l2(source.values + at, AttendShape<kHeadDim, kBytes>::kTileBytes);
  };
  if (p.overlap == Overlap::kHistory) {
    ptx::griddepcontrol_wait();
    if (cached) copy_scores(global_scores, p.max_blocks, cached_scores);
  }
  ptx::griddepcontrol_launch_dependents();
  const int reserved = row.num_blocks - (row.residual_end - row.residual_begin);
#pragma unroll 1
  for (int i = tid; i < reserved; i += kSelectThreads)
    fetch(i < row.residual_begin ? i : i - row.residual_begin + row.residual_end);

  // The blocks that share a row report it together: each its own split.
  const bool reports = place.tile == 0 && (per_head || place.kv_head == 0);
  float* share =
      kMass && reports && place.split == 0 && p.covered_share != nullptr ? p.covered_share + r : nullptr;
  const int count = select_row_bitmap<kMass>(scores, row, own_constants,
                                             threshold_of(constants.rules, per_head ? place.kv_head : 0),
                                             share, fetch, select);
  int32_t* reported = p.selected + static_cast<int64_t>(r) * p.max_selected;
  const int begin = static_cast<int>(static_cast<int64_t>(place.split) * count / kAttentionSplits);
  const int end = static_cast<int>(static_cast<int64_t>(place.split + 1) * count / kAttentionSplits);
  list_bitmap(select, row.num_blocks, begin, end, [&](int position, int block) {
    shared.list[position - begin] = block;
    if (reports) reported[position] = block;
  });
  if (reports) {
#pragma unroll 1
    for (int i = count + place.split * kSelectThreads + tid; i < p.max_selected;
         i += kAttentionSplits * kSelectThreads)
      reported[i] = -1;
    if (place.split == 0 && tid == 0) p.counts[r] = count;
  }
  source.last_entry = count - 1;
  source.last_valid = end == count && end > begin ? length - shared.list[count - 1 - begin] * kPageTokens : 0;
  if (warp < kAttendWarps)
    attend_warp<T>(
        source, begin, end, [&](int i) { return page_table[shared.list[i - begin]]; }, shared.attend, warp,
        lane);
  __syncthreads();
  combine<T, kSelectThreads>(a, place, shared.attend, shared.combined);
}

// Of the fused kernel: also the block's own entries of the list.
size_t fused_shared_bytes(const SelectAndAttendParams& p) {
  const size_t own = static_cast<size_t>(std::min(p.max_selected, p.max_blocks)) / kAttentionSplits + 2;
  const auto fixed = [&]<int kBytes>(std::integral_constant<int, kBytes>) {
    return p.attention.head_dim == 64    ? sizeof(FusedShared<64, kBytes>)
           : p.attention.head_dim == 128 ? sizeof(FusedShared<128, kBytes>)
                                         : sizeof(FusedShared<256, kBytes>);
  };
  return (p.attention.e4m3 ? fixed(std::integral_constant<int, 1>())
                           : fixed(std::integral_constant<int, 2>())) +
         own * sizeof(int32_t);
}

template <typename T, int kHeadDim, int kBytes>
cudaError_t launch_fused(const SelectAndAttendParams& p, cudaStream_t stream) {
  const bool mass = p.rules.mode != SelectionMode::top_k || p.covered_share != nullptr;
  const auto kernel =
      mass ? fused_kernel<T, kHeadDim, true, kBytes> : fused_kernel<T, kHeadDim, false, kBytes>;
  const SparseDecodeAttentionParams& a = p.attention;
  LaunchShape shape;
  shape.grid = dim3(kAttentionSplits, a.num_kv_heads * head_tiles(a.num_heads, a.num_kv_heads), a.batch);
  shape.block = dim3(kSelectThreads);
  shape.shared_bytes = fused_shared_bytes(p);
  shape.overlap = p.overlap;
  const cudaError_t error = allow_shared_bytes(kernel, shape.shared_bytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, shape, stream, p, select_constants(p.rules, p.max_selected, kSelectCached),
                head_tiling(p.attention));
}
template <typename T, int kBytes>
cudaError_t launch_fused(const SelectAndAttendParams& p, cudaStream_t stream) {
  switch (p.attention.head_dim) {
    case 64:
      return launch_fused<T, 64, kBytes>(p, stream);
    case 128:
      return launch_fused<T, 128, kBytes>(p, stream);
    case 256:
      return launch_fused<T, 256, kBytes>(p, stream);
  }
  return cudaErrorInvalidValue;
}
cudaError_t launch_fused(const SelectAndAttendParams& p, cudaStream_t stream) {
  if (p.attention.type == DataType::kBf16)
    return p.attention.e4m3 ? launch_fused<__nv_bfloat16, 1>(p, stream)
                            : launch_fused<__nv_bfloat16, 2>(p, stream);
  return p.attention.e4m3 ? launch_fused<__half, 1>(p, stream) : launch_fused<__half, 2>(p, stream);
}

cudaError_t launch_two(const SelectAndAttendParams& p, cudaStream_t stream) {
  SelectBlocksParams select;
  select.rules = p.rules;
  select.rows = p.attention.batch * p.attention.rows_per_sequence;
  select.rows_per_sequence = p.attention.rows_per_sequence;
  select.scores = p.scores;
  select.score_stride = p.score_stride;
  select.lengths = p.attention.lengths;
  select.selected = p.selected;
  select.max_selected = p.max_selected;
  select.counts = p.counts;
  select.covered_share = p.covered_share;
  select.overlap = p.overlap == Overlap::kNone ? Overlap::kNone : Overlap::kLaunch;
  const cudaError_t error = select_blocks(select, stream);
  if (error != cudaSuccess) return error;
  SparseDecodeAttentionParams attention = p.attention;
  attention.selected = p.selected;
  attention.counts = p.counts;
  attention.max_selected = p.max_selected;
  attention.overlap = select.overlap;
  return sparse_decode_attention(attention, stream);
}

}  // namespace

cudaError_t select_and_attend(const SelectAndAttendParams& p, cudaStream_t stream, SelectAndAttendPath path) {
  const SparseDecodeAttentionParams& a = p.attention;
  if (!valid_rules(p.rules) || p.rules.block_size != kPageTokens || p.max_blocks < 0 ||
      p.max_blocks > kMaxSelectBlocks || p.max_selected < smallest_capacity(p.rules) ||
      p.score_stride < p.max_blocks)
    return cudaErrorInvalidValue;
  cudaError_t error = check_attention(a);
  if (error != cudaSuccess || a.batch == 0) return error;
  if (p.scores == nullptr || p.selected == nullptr || p.counts == nullptr) return cudaErrorInvalidValue;
  if (path == SelectAndAttendPath::kTwoKernels) return launch_two(p, stream);
  Device device;
  error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t grid =
      int64_t{kAttentionSplits} * a.batch * a.num_kv_heads * head_tiles(a.num_heads, a.num_kv_heads);
  const bool fused = (path == SelectAndAttendPath::kFused || grid <= device.multiprocessors) &&
                     fused_shared_bytes(p) <= device.shared_bytes;
  return fused ? launch_fused(p, stream) : launch_two(p, stream);
}

}  // namespace spot::kernels
