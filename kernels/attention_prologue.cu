// Contract: attention_prologue.h. One warp a (token, head): a head passes through shared memory, where any
// pairing of dims can be turned. One block a (token, mixing weight). Nothing depends on anything else, so one
// launch does all. Floor: at decode a few tens of KB, so the launch and three memory latencies (slot or
// position, table, store), about 2 us; at prefill the bytes of projected, read once, and of the outputs.
// Grid: ceil(T * heads / 8) + T * mix_rows blocks of 8 warps; heads counts q, k, v and the selector's.
#include <initializer_list>

#include "kernels/attention_prologue.h"
#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/selector_key_append.cuh"
#include "kernels/vector.cuh"

namespace spot::kernels {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

int64_t heads_of(const AttentionPrologueParams& p) {
  const int64_t selector = p.selector_queries != nullptr ? kSelectorHeads + p.selector_keys.key_heads : 0;
  return p.num_heads + 2 * p.num_kv_heads + selector;
}

// Where a head is stored in the cache besides (null: nowhere): numbers of the model's type, or codes of them over `scale`.
struct Stored {
  void* head = nullptr;
  bool codes = false;
  float scale = 1.0f;
};

template <typename T>
__device__ __forceinline__ Stored stored_head(const AttentionPrologueParams& p, void* pool,
                                              const float* scales, int64_t token, int head) {
  if (pool == nullptr || p.slots[token] < 0) return {};
  const int64_t slot = p.slots[token], offset = head * p.pool_head_stride +
                                                slot / kPageTokens * p.pool_page_stride +
                                                slot % kPageTokens * p.pool_token_stride;
  if (p.e4m3) return {static_cast<uint8_t*>(pool) + offset, true, scales != nullptr ? scales[head] : 1.0f};
  return {static_cast<T*>(pool) + offset};
}

template <typename T>
__device__ __forceinline__ void store_also(const Stored& also, int i, const float (&v)[2]) {
  if (also.head == nullptr) return;
  if (!also.codes) return store(static_cast<T*>(also.head) + i, v);
  // What a reader of the output would store.
  const uint32_t codes = ptx::floats_to_e4m3x2(div_rn(to_float(rounded<T>(v[0])), also.scale),
                                               div_rn(to_float(rounded<T>(v[1])), also.scale));
  *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(also.head) + i) = static_cast<uint16_t>(codes);
}

// One head's way: norm unless norm is null, the first 2 * pairs dims turned by cos and sin, and out to `to`
// and `also`. `row` is the warp's own shared memory.
template <typename T>
__device__ __forceinline__ void prepare_head(const T* from, int dim, const float* norm, float epsilon,
                                             const float* cos, const float* sin, int pairs, float* row, T* to,
                                             const Stored& also) {
  const int lane = threadIdx.x % 32;
  float square_sum = 0.0f, v[2];
  // One or two turns, and code that runs once is dear: not unrolled.
#pragma unroll 1
  for (int i = 2 * lane; i < dim; i += 64) {
    load(from + i, v);
    square_sum += v[0] * v[0] + v[1] * v[1];
    row[i] = v[0];
    row[i + 1] = v[1];
  }
  if (norm != nullptr) {
    const float reciprocal = 1.0f / sqrtf(sum_of_warp(square_sum) / static_cast<float>(dim) + epsilon);
#pragma unroll 1
    for (int i = 2 * lane; i < dim; i += 64) {
      row[i] *= reciprocal * norm[i];
      row[i + 1] *= reciprocal * norm[i + 1];
    }
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 2 * lane; i < dim; i += 64) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int d = i + j;
      v[j] = row[d];
      if (d < pairs)
        v[j] = v[j] * cos[d] - row[d + pairs] * sin[d];
      else if (d < 2 * pairs)
        v[j] = v[j] * cos[d - pairs] + row[d - pairs] * sin[d - pairs];
    }
    store(to + i, v);
    store_also<T>(also, i, v);
  }
}

template <typename T>
__device__ __forceinline__ void mixing_weight(const AttentionPrologueParams& p, int64_t index) {
  __shared__ float partial[kWarps];
  const float* mix = p.mix + index % p.mix_rows * p.hidden_size;
  const T* hidden = static_cast<const T*>(p.hidden) + index / p.mix_rows * p.hidden_stride;
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 2 * threadIdx.x; i < p.hidden_size; i += 2 * kThreads) {
    float w[2], x[2];
    load(mix + i, w);
    load(hidden + i, x);
    sum += w[0] * x[0] + w[1] * x[1];
  }
  sum = sum_of_block(sum, partial);
  if (threadIdx.x == 0) p.selector_weight[index] = sum * p.mix_scale;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    prologue_kernel(const AttentionPrologueParams p, unsigned heads, unsigned head_blocks) {
  __shared__ float rows[kWarps][kMaxHeadDim];
  if (blockIdx.x >= head_blocks) {  // weights never change: they may move before the products are there
    const float* mix = p.mix + (blockIdx.x - head_blocks) % p.mix_rows * p.hidden_size;
    for (int64_t i = 32 * threadIdx.x; i < p.hidden_size; i += 32 * kThreads) ptx::touch(mix + i);
  }
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (blockIdx.x >= head_blocks) {
    mixing_weight<T>(p, blockIdx.x - head_blocks);
    return;
  }
  const int warp = threadIdx.x / 32;
  const unsigned item = blockIdx.x * kWarps + warp;
  if (item >= p.num_tokens * heads) return;
  const int64_t token = item / heads;
  int head = static_cast<int>(item % heads);
  float* row = rows[warp];

  const T* projected = static_cast<const T*>(p.projected) + token * p.token_stride;
  if (head < p.num_heads + p.num_kv_heads) {  // a query or a key
    const int64_t angle = p.positions[token] * p.rotary_pairs;
    const float* norm = p.qk_norm != nullptr ? p.qk_norm + static_cast<int64_t>(head) * p.head_dim : nullptr;
    const bool is_query = head < p.num_heads;
    const T* from = projected + head * p.query_head_stride;
    T* to = static_cast<T*>(p.query) + (token * p.num_heads + head) * p.head_dim;
    Stored also;
    if (!is_query) {
      head -= p.num_heads;
      from = projected + p.key_offset + static_cast<int64_t>(head) * p.head_dim;
      to = static_cast<T*>(p.key) + (token * p.num_kv_heads + head) * p.head_dim;
      also = stored_head<T>(p, p.key_pool, p.key_scales, token, head);
    }
    prepare_head(from, p.head_dim, norm, p.norm_epsilon, p.rope_cos + angle, p.rope_sin + angle,
                 p.rotary_pairs, row, to, also);
    return;
  }
  head -= p.num_heads + p.num_kv_heads;
  if (head < p.num_kv_heads) {  // a value
    T* to = static_cast<T*>(p.value) + (token * p.num_kv_heads + head) * p.head_dim;
    prepare_head<T>(projected + p.value_offset + static_cast<int64_t>(head) * p.head_dim, p.head_dim, nullptr,
                    0.0f, nullptr, nullptr, 0, row, to,
                    stored_head<T>(p, p.value_pool, p.value_scales, token, head));
    return;
  }
  head -= p.num_kv_heads;
  const SelectorKeyAppendParams& keys = p.selector_keys;
  if (head < kSelectorHeads) {
    const bool turns = keys.rope_cos != nullptr;
    const int64_t angle = turns ? keys.positions[token] * kRotaryPairs : 0;
    const T* from =
        static_cast<const T*>(p.selector_queries) + token * p.selector_token_stride + head * kKeyDim;
    prepare_head<T>(from, kKeyDim, nullptr, 0.0f, turns ? keys.rope_cos + angle : nullptr,
                    turns ? keys.rope_sin + angle : nullptr, turns ? kRotaryPairs : 0, row,
                    static_cast<T*>(p.selector_query) + (token * kSelectorHeads + head) * kKeyDim, {});
    return;
  }
  head -= kSelectorHeads;
  const int lane = threadIdx.x % 32;
  switch (keys.format) {
    case KeyFormat::bf16:
      return append_key<KeyFormat::bf16>(keys, token, head, lane);
    case KeyFormat::int8:
      return append_key<KeyFormat::int8>(keys, token, head, lane);
    case KeyFormat::int4:
      return append_key<KeyFormat::int4>(keys, token, head, lane);
    case KeyFormat::mxfp4:
      return append_key<KeyFormat::mxfp4>(keys, token, head, lane);
    case KeyFormat::nvfp4:
      return append_key<KeyFormat::nvfp4>(keys, token, head, lane);
    case KeyFormat::f32:  // refused at launch
      return;
  }
}

bool even(std::initializer_list<int64_t> numbers) {
  for (int64_t n : numbers)
    if (n % 2 != 0) return false;
  return true;
}

bool valid_shape(const AttentionPrologueParams& p) {
  return p.num_heads >= 1 && p.num_kv_heads >= 1 && p.head_dim >= 2 && p.head_dim <= kMaxHeadDim &&
         p.rotary_pairs >= 1 && 2 * p.rotary_pairs <= p.head_dim;
}

bool valid_attention(const AttentionPrologueParams& p) {
  if (p.projected == nullptr || p.rope_cos == nullptr || p.rope_sin == nullptr || p.positions == nullptr ||
      p.query == nullptr || p.key == nullptr || p.value == nullptr ||
      (p.key_pool == nullptr) != (p.value_pool == nullptr) || (p.key_pool != nullptr && p.slots == nullptr) ||
      (!p.e4m3 && (p.key_scales != nullptr || p.value_scales != nullptr)))
    return false;
  return even({p.head_dim, p.token_stride, p.query_head_stride, p.key_offset, p.value_offset,
               p.pool_head_stride, p.pool_page_stride, p.pool_token_stride}) &&
         moves_together(p.projected, 0, p.type, 2);
}

bool valid_selector(const AttentionPrologueParams& p) {
  const SelectorKeyAppendParams& keys = p.selector_keys;
  if (keys.format == KeyFormat::f32 || keys.num_tokens != p.num_tokens ||
      (keys.key_heads != 1 && keys.key_heads != kSelectorHeads) || keys.keys == nullptr ||
      keys.slots == nullptr || keys.pages == nullptr)
    return false;
  if (keys.rope_cos != nullptr && (keys.rope_sin == nullptr || keys.positions == nullptr)) return false;
  return p.selector_query != nullptr && p.hidden != nullptr && p.mix != nullptr && p.mix_rows >= 1 &&
         p.selector_weight != nullptr && p.hidden_size >= 1 &&
         even({p.selector_token_stride, keys.token_stride, p.hidden_stride, p.hidden_size}) &&
         moves_together(p.selector_queries, 0, p.type, 2) && moves_together(keys.keys, 0, keys.key_type, 2) &&
         moves_together(p.hidden, 0, p.type, 2) && moves_together(p.mix, 0, DataType::kF32, 2);
}

}  // namespace

cudaError_t attention_prologue(const AttentionPrologueParams& p, cudaStream_t stream) {
  const bool selector = p.selector_queries != nullptr, alone = p.num_heads == 0 && p.num_kv_heads == 0;
  if (p.num_tokens < 0 || (alone ? !selector : !valid_shape(p))) return cudaErrorInvalidValue;
  if (p.num_tokens == 0) return cudaSuccess;
  if ((!alone && !valid_attention(p)) || (selector && !valid_selector(p))) return cudaErrorInvalidValue;
  const int64_t heads = heads_of(p), head_blocks = (p.num_tokens * heads + kWarps - 1) / kWarps;
  const int64_t blocks = head_blocks + (selector ? p.num_tokens * p.mix_rows : 0);
  if (blocks > INT32_MAX / kWarps) return cudaErrorInvalidValue;
  const auto heads_of_token = static_cast<unsigned>(heads),
             blocks_of_heads = static_cast<unsigned>(head_blocks);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks));
  shape.block = dim3(kThreads);
  shape.overlap = p.overlap;
  switch (p.type) {
    case DataType::kBf16:
      return launch(prologue_kernel<__nv_bfloat16>, shape, stream, p, heads_of_token, blocks_of_heads);
    case DataType::kF16:
      return launch(prologue_kernel<__half>, shape, stream, p, heads_of_token, blocks_of_heads);
    case DataType::kF32:
      return launch(prologue_kernel<float>, shape, stream, p, heads_of_token, blocks_of_heads);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
