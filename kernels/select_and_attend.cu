// Contract: select_and_attend.h.
//
// The fused kernel, for small batches: one cluster of 16 (or 8) thread blocks a (sequence, KV head, head
// tile). At batch 1 and 8 KV heads that is 128 blocks on 132 multiprocessors. Every block selects the whole
// row itself: 8192 scores are 32 KB from L2 and 16 registers a thread, which is cheaper than a launch or a
// cluster barrier. Then block r attends to its 16th of the list (all its copies in flight at once at 4096
// tokens), pushes its partial result into the shared memory of the blocks that own the output elements, and
// after one cluster barrier each owner folds the 16 splits. Floor (bytes): as sparse_decode_attention.cu; the
// scores are L2 traffic. Work is bounded by the row's own count. Grid: (cluster, KV heads * head tiles,
// batch) blocks of 16 warps; all select, the first 8 attend.
#include <algorithm>
#include <atomic>

#include "kernels/attend_split.cuh"
#include "kernels/launch.h"
#include "kernels/select_and_attend.h"
#include "kernels/select_row.cuh"

namespace spot::kernels {
namespace {

constexpr int kThreads = kSelectThreads;

template <int kHeadDim>
constexpr int kFusedStages = 256 / kHeadDim;  // 16 KB a warp

template <int kHeadDim, int kCluster>
struct FusedShared {
  static constexpr int kSlice = kHeadTile * kHeadDim / kCluster;  // output elements a block owns, at most
  AttendShared<kHeadDim, kFusedStages<kHeadDim>> attend;  // its tiles first; the selection lies over them
  float2 sums[kAttentionSplits][kHeadTile];               // written by the whole cluster
  float values[kAttentionSplits][kSlice];
  int32_t list[4];  // longer: dynamic shared memory goes on
};

template <typename T, int kHeadDim, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    fused_kernel(const SelectAndAttendParams p, const SelectConstants constants) {
  constexpr int kStages = kFusedStages<kHeadDim>;
  constexpr int kOwnSplits = kAttentionSplits / kCluster;
  using Shared = FusedShared<kHeadDim, kCluster>;
  static_assert(sizeof(SelectShared) <= sizeof(Shared::attend.tiles));
  Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
  SelectShared& select = *reinterpret_cast<SelectShared*>(ptx::dynamic_shared());
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  ptx::cluster_arrive();  // waited for before the first store into a neighbour: by then all have started
  ptx::griddepcontrol_wait();

  const SparseDecodeAttentionParams& a = p.attention;
  const int group = a.num_heads / a.num_kv_heads, tiles = (group + kHeadTile - 1) / kHeadTile;
  const int rank = static_cast<int>(ptx::cluster_block_rank());
  const int kv_head = blockIdx.y / tiles, tile = blockIdx.y % tiles, b = blockIdx.z;
  const int first_head = kv_head * group + tile * kHeadTile;
  AttendSource source;
  source.queries = static_cast<const uint16_t*>(a.queries) +
                   (static_cast<int64_t>(b) * a.num_heads + first_head) * kHeadDim;
  source.keys = static_cast<const uint16_t*>(a.keys) + kv_head * a.head_stride;
  source.values = static_cast<const uint16_t*>(a.values) + kv_head * a.head_stride;
  source.page_stride = a.page_stride;
  source.token_stride = a.token_stride;
  source.heads = min(group - tile * kHeadTile, kHeadTile);
  source.scale_log2 = a.scale * 1.4426950408889634f;
  // Everything that does not hang on something else is asked for at once: scores, length, queries, and the
  // page table, so that it lies in L1 when the list is known.
  const bool per_head = a.rows_per_sequence > 1;
  const int r = per_head ? b * a.num_kv_heads + kv_head : b;
  const float* scores = p.scores + r * p.score_stride;
  const int32_t* page_table = a.page_table + b * a.page_table_stride;
  FirstScores first;
  first.load(scores, p.max_blocks);
  const int length = a.lengths[b];
  for (int i = tid * 32; i < min(p.max_blocks, kSelectTile); i += kThreads * 32) ptx::touch(page_table + i);
  load_query_fragments<kHeadDim>(source, shared.attend.query);

  // One block of those that share a row reports it.
  const bool reports = rank == 0 && tile == 0 && (per_head || kv_head == 0);
  const SelectRow row = select_row(constants.rules, length, constants.capacity);
  float* share = p.covered_share == nullptr ? nullptr : p.covered_share + r;
  const int count = RowSelector(scores, row, constants, select).run(first, reports ? share : nullptr);
  int32_t* reported = p.selected + static_cast<int64_t>(r) * p.max_selected;
  const int own_begin = static_cast<int>(static_cast<int64_t>(rank * kOwnSplits) * count / kAttentionSplits);
  const int own_end =
      static_cast<int>(static_cast<int64_t>((rank + 1) * kOwnSplits) * count / kAttentionSplits);
  list_bitmap(select, row.num_blocks, [&](int position, int block) {
    if (position >= own_begin && position < own_end) shared.list[position - own_begin] = block;
    if (reports) reported[position] = block;
  });
  if (reports && tid == 0) p.counts[r] = count;
  source.last_entry = count - 1;
  source.last_valid =
      own_end == count && own_end > own_begin ? length - shared.list[count - 1 - own_begin] * kPageTokens : 0;

  const int elements = source.heads * kHeadDim, slice = elements / kCluster;
  for (int own = 0; own < kOwnSplits; ++own) {
    const int split = rank * kOwnSplits + own;
    const int begin = static_cast<int>(static_cast<int64_t>(split) * count / kAttentionSplits);
    const int end = static_cast<int>(static_cast<int64_t>(split + 1) * count / kAttentionSplits);
    if (warp < kAttendWarps)
      attend_warp<T, kHeadDim, kStages>(
          source, begin, end, [&](int i) { return page_table[shared.list[i - own_begin]]; }, shared.attend,
          warp, lane);
    if (own == 0) ptx::cluster_wait();
    __syncthreads();
    for (int e = tid; e < elements; e += kThreads) {
      const int head = e / kHeadDim, dim = e % kHeadDim;
      float2 maximum_sum;
      const float value = fold_warps<kHeadDim, kStages>(shared.attend, head, dim, &maximum_sum);
      ptx::store_cluster(ptx::shared_address(&shared.values[split][e % slice]), e / slice, value);
      if (dim < kCluster) {
        ptx::store_cluster(ptx::shared_address(&shared.sums[split][head].x), dim, maximum_sum.x);
        ptx::store_cluster(ptx::shared_address(&shared.sums[split][head].y), dim, maximum_sum.y);
      }
    }
    if (own + 1 < kOwnSplits) __syncthreads();
  }
  ptx::griddepcontrol_launch_dependents();
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int i = tid; i < slice; i += kThreads) {
    const int e = rank * slice + i, head = e / kHeadDim, dim = e % kHeadDim;
    float2 largest_sum;
    const float value = fold_splits([&](int s) { return shared.sums[s][head].x; },
                                    [&](int s) { return shared.sums[s][head].y; },
                                    [&](int s) { return shared.values[s][i]; }, &largest_sum);
    const int64_t q = static_cast<int64_t>(b) * a.num_heads + first_head + head;
    static_cast<T*>(a.out)[q * kHeadDim + dim] = ptx::from_float<T>(value);
    if (dim == 0 && a.log_sum_exp != nullptr) a.log_sum_exp[q] = log_sum_exp_of(largest_sum);
  }
}

template <int kHeadDim, int kCluster>
size_t fused_shared_bytes(int32_t max_selected) {
  const size_t own =
      (static_cast<size_t>(max_selected) * (kAttentionSplits / kCluster)) / kAttentionSplits + 2;
  return sizeof(FusedShared<kHeadDim, kCluster>) + own * sizeof(int32_t);
}

int head_tiles(const SparseDecodeAttentionParams& a) {
  return (a.num_heads / a.num_kv_heads + kHeadTile - 1) / kHeadTile;
}

// Clusters that the device runs at once; 0 where the size is not supported. Asked once a kernel.
template <typename T, int kHeadDim, int kCluster>
cudaError_t launch_fused(const SelectAndAttendParams& p, cudaStream_t stream, bool only_if_resident) {
  static std::atomic<int> resident{-1};
  const auto kernel = fused_kernel<T, kHeadDim, kCluster>;
  const SparseDecodeAttentionParams& a = p.attention;
  LaunchShape shape;
  shape.grid = dim3(kCluster, a.num_kv_heads * head_tiles(a), a.batch);
  shape.block = dim3(kThreads);
  shape.shared_bytes = fused_shared_bytes<kHeadDim, kCluster>(std::min(p.max_selected, p.max_blocks));
  shape.cluster_size = kCluster;
  shape.overlap = p.overlap;
  if (resident.load() < 0) {
    const size_t most = fused_shared_bytes<kHeadDim, kCluster>(kMaxSelectBlocks);
    cudaError_t error = allow_shared_bytes(kernel, most);
    if (error == cudaSuccess && kCluster > 8) error = allow_any_cluster(kernel);
    if (error != cudaSuccess) return error;
    int clusters = 0;
    LaunchShape widest = shape;
    widest.shared_bytes = most;
    if (max_active_clusters(kernel, widest, &clusters) != cudaSuccess) {
      cudaGetLastError();
      clusters = 0;
    }
    resident.store(clusters);
  }
  const int64_t wanted = static_cast<int64_t>(shape.grid.y) * shape.grid.z;
  if (resident.load() < (only_if_resident ? wanted : 1)) return cudaErrorNotSupported;
  return launch(kernel, shape, stream, p, select_constants(p.rules, p.max_selected));
}

template <int kCluster>
cudaError_t launch_fused_any(const SelectAndAttendParams& p, cudaStream_t stream, bool only_if_resident) {
  const bool bf16 = p.attention.type == DataType::kBf16;
  switch (p.attention.head_dim) {
    case 64:
      return bf16 ? launch_fused<__nv_bfloat16, 64, kCluster>(p, stream, only_if_resident)
                  : launch_fused<__half, 64, kCluster>(p, stream, only_if_resident);
    case 128:
      return bf16 ? launch_fused<__nv_bfloat16, 128, kCluster>(p, stream, only_if_resident)
                  : launch_fused<__half, 128, kCluster>(p, stream, only_if_resident);
    case 256:
      return bf16 ? launch_fused<__nv_bfloat16, 256, kCluster>(p, stream, only_if_resident)
                  : launch_fused<__half, 256, kCluster>(p, stream, only_if_resident);
  }
  return cudaErrorInvalidValue;
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
  const cudaError_t error = check_attention(a);
  if (error != cudaSuccess || a.batch == 0) return error;
  if (p.scores == nullptr || p.selected == nullptr || p.counts == nullptr) return cudaErrorInvalidValue;
  switch (path) {
    case SelectAndAttendPath::kFused16:
      return launch_fused_any<16>(p, stream, false);
    case SelectAndAttendPath::kFused8:
      return launch_fused_any<8>(p, stream, false);
    case SelectAndAttendPath::kTwoKernels:
      return launch_two(p, stream);
    case SelectAndAttendPath::kChoose:
      break;
  }
  cudaError_t launched = launch_fused_any<16>(p, stream, true);
  if (launched == cudaErrorNotSupported) launched = launch_fused_any<8>(p, stream, true);
  if (launched == cudaErrorNotSupported) launched = launch_two(p, stream);
  return launched;
}

}  // namespace spot::kernels
