// The operators of SpotAttention: registered with torch as the library "spot" (torch.ops.spot.* from Python),
// and callable from here. The CPU implementations are the oracle; CUDA ones are registered where the build
// has SPOT_CUDA.
//
// R rows: a row is one query, with its own page table row and length; decode has one row a sequence. Page
// tables hold page ids, 16 tokens a page, [R, pages] int32 (a row may be expanded over R); lengths [R] int32
// count a row's visible tokens, its own included. Every operator throws c10::Error on shapes, dtypes or
// devices that do not fit.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <tuple>

namespace spot::ops {

// Formats of selector key pools: "bf16", "int8", "int4", "mxfp4", "nvfp4" as in kernels/key_format.h, uint8
// [pages, key_heads, bytes of a page and head]; and "f32" (CPU only), where a page and head is [16, 128]
// float32.
int64_t page_head_bytes(const std::string& format);

// Writes keys [T, key_heads, 128] (float32, bfloat16, float16 or float64) at slots [T] int64 = page * 16 +
// offset. A negative slot is skipped. global_scale is nvfp4's.
void append_selector_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                          const std::string& format, double global_scale);

// How projected keys become stored ones: norm over each key's 128 dims, then RoPE on the first 64,
// half-split.
struct KeyPreparation {
  enum Norm { kNone = 0, kLayerNorm = 1, kRmsNorm = 2 };
  Norm norm = kNone;
  at::Tensor norm_weight, norm_bias;  // [128] float32; undefined: 1 and 0
  double norm_eps = 1e-6;
  at::Tensor cos, sin;   // [positions, 32] float32; undefined: no rotation
  at::Tensor positions;  // [T] int64, rows of the tables
};
// append_selector_keys of prepared keys, in one kernel; all in float32.
void append_projected_keys(at::Tensor pool, const at::Tensor& slots, const at::Tensor& keys,
                           const KeyPreparation& preparation, const std::string& format, double global_scale);

// The first `length` tokens behind page_table [pages] int32, dequantised: [length, key_heads, 128] float32.
at::Tensor gather_selector_keys(const at::Tensor& pool, const at::Tensor& page_table, int64_t length,
                                const std::string& format, double global_scale);

// Block scores [R, G, max_blocks] float32: max over the block's visible tokens of sum_h weight[r, g, h]
// ReLU(query[r, h] . key[token, h]); -inf past the length. query [R, 4, 128], weight [R, G, 4] float32;
// key_heads (1 or 4) is the pool's. max_blocks 0: the page table's width. history_settled promises that the
// launch just before this one wrote nothing that this one reads but the query, the weight and each row's last
// block of keys: on CUDA the rest is then read while that launch drains.
at::Tensor score_blocks(const at::Tensor& query, const at::Tensor& weight, const at::Tensor& pool,
                        const at::Tensor& page_table, const at::Tensor& lengths, const std::string& format,
                        double global_scale, int64_t max_blocks = 0, bool history_settled = false);

// The arguments of select_blocks: SelectionRule without torch types.
// Attention kernels count finished parts in a workspace of this many counters, one a row, KV head and tile of
// 8 query heads:
// more than that in one call throws on CUDA.
inline constexpr int64_t kMaxAttentionParts = 65536;

struct SelectArguments {
  bool top_p = true;
  double p = 0.9;
  int64_t budget = 0;            // tokens (top_k)
  double budget_fraction = 0.0;  // top_k: when positive, the budget is ceil(fraction * length)
  int64_t sinks = 128, recency = 256, floor = 512, cap = 0;
  double temperature = 1.0;
  int64_t max_selected =
      0;  // width of the result in blocks; 0: as wide as the largest count (CPU), or the widest the
          // rule can give at this score width (CUDA, where counts stay on the device)
};
// scores [R, G, blocks] float32, lengths [R] int32 -> indices [R, G, width] int32 ascending, padded with -1;
// counts [R, G] int32; kept share of the residual mass [R, G] float32. kernels/select_reference.h defines the
// result exactly. Throws when blocks or max_selected are too few.
std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(const at::Tensor& scores,
                                                             const at::Tensor& lengths,
                                                             const SelectArguments& arguments);

// softmax(scale * q K^T) V over the selected blocks' visible tokens. query [R, num_heads, head_dim]; pools
// [num_kv_heads, pages, 16, head_dim] of query's dtype; indices [R, G, M] and counts [R, G] as from
// select_blocks, G = 1 or num_kv_heads; both undefined: every block. float32 accumulation. A row without
// blocks gives zeros. Never reads an unselected page or a token past the length. Returns [R, num_heads,
// head_dim] in query's dtype.
at::Tensor sparse_decode_attention(const at::Tensor& query, const at::Tensor& key_pool,
                                   const at::Tensor& value_pool, const at::Tensor& page_table,
                                   const at::Tensor& lengths, const at::Tensor& indices,
                                   const at::Tensor& counts, double scale);

// Whether sparse_decode_attention has an implementation for the device, dtype and heads of these.
bool attends(const at::Tensor& query, const at::Tensor& key_pool);

// select_blocks, then sparse_decode_attention over its choice, the same bits, in one launch where the GPU has
// room. predicted_mass is empty without with_mass, which saves time under top_k. history_settled promises
// that the
// launch just before this one wrote nothing that this one reads but the scores: on CUDA the rest is then read
// while
// that launch drains.
struct SelectedAttention {
  at::Tensor output, indices, counts, predicted_mass;
};
SelectedAttention select_and_attend(const at::Tensor& scores, const at::Tensor& query,
                                    const at::Tensor& key_pool, const at::Tensor& value_pool,
                                    const at::Tensor& page_table, const at::Tensor& lengths, double scale,
                                    const SelectArguments& arguments, bool with_mass = true,
                                    bool history_settled = false);

}  // namespace spot::ops
