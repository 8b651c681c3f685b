// What lies between an attention layer's projections and its attention: QK norm and RoPE per head, keys and
// values into the paged cache, and a selector's share of the same: RoPE on its queries, its key into its own
// cache, its mixing weights.
#pragma once

#include "kernels/selector_key_append.h"
#include "kernels/types.h"

namespace spot::kernels {

inline constexpr int kMaxHeadDim = 512;

// T tokens; "type" is the model's. Numbers of a head are contiguous, and every stride and offset is even.
struct AttentionPrologueParams {
  DataType type = DataType::kBf16;
  int64_t num_tokens = 0;
  // head_dim even, at most kMaxHeadDim. No heads at all: the selector's share alone, and nothing else up to it counts.
  int32_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
  // [T, queries | keys | values] of type; key and value heads lie head_dim apart, query heads
  // query_head_stride (2 * head_dim where an output gate follows each query).
  const void* projected = nullptr;
  int64_t token_stride = 0, query_head_stride = 0, key_offset = 0, value_offset = 0;
  const float* qk_norm = nullptr;  // [num_heads + num_kv_heads, head_dim]: RMSNorm's factors; null: no norm
  float norm_epsilon = 1e-6f;
  const float* rope_cos = nullptr;     // [positions, rotary_pairs] float32
  const float* rope_sin = nullptr;     // dims i and i + rotary_pairs turn together, the rest stays
  int32_t rotary_pairs = 0;            // at most head_dim / 2
  const int64_t* positions = nullptr;  // [T], rows of the tables
  void* query = nullptr;               // [T, num_heads, head_dim] of type
  void* key = nullptr;                 // [T, num_kv_heads, head_dim] of type
  void* value = nullptr;               // [T, num_kv_heads, head_dim] of type
  // [num_kv_heads, pages, 16, head_dim] of type, dims contiguous, the rest at these strides in elements; null: keys
  // and values are not stored. With e4m3 E4M3 codes, a byte each, of the outputs divided by their head's scale,
  // [num_kv_heads] each (null: 1): to nearest even, saturating at +-448, NaN as NaN.
  void* key_pool = nullptr;
  void* value_pool = nullptr;
  bool e4m3 = false;
  const float* key_scales = nullptr;
  const float* value_scales = nullptr;
  int64_t pool_head_stride = 0, pool_page_stride = 0, pool_token_stride = 0;
  const int64_t* slots = nullptr;  // [T], page * 16 + offset in the page; a negative slot is not stored

  // The selector; null: none.
  const void* selector_queries = nullptr;  // [T, 4, 128] of type, heads contiguous
  int64_t selector_token_stride = 0;
  void* selector_query = nullptr;         // [T, 4, 128] of type: turned as selector_keys says
  SelectorKeyAppendParams selector_keys;  // num_tokens = T; its overlap is ignored
  const void* hidden = nullptr;           // [T, hidden_size] of type
  int64_t hidden_stride = 0;
  int32_t hidden_size = 0;
  const float* mix = nullptr;  // [mix_rows, hidden_size] float32
  int32_t mix_rows = 0;
  float mix_scale = 1.0f;
  float* selector_weight = nullptr;  // [T, mix_rows]: mix_scale * mix . hidden

  Overlap overlap = Overlap::kNone;  // kHistory: the same as kLaunch
};

// All in float32, queries and keys rounded once (and once more where they are stored as codes). A token's results
// depend on the token alone. The selector's stored keys have the bits of selector_key_append.
cudaError_t attention_prologue(const AttentionPrologueParams& params, cudaStream_t stream);

}  // namespace spot::kernels
