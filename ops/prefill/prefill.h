// Sparse prefill: tiles of neighbouring queries choose their blocks together and attend to them. First the selector's
// keys are staged, then tiles score blocks, select_blocks (ops/attention/attention.h) takes a row a tile, with the
// position after the tile's last query as its length, then tiles attend.
//
// A tile is the queries of one sequence at positions [k T, (k + 1) T) that the batch brings, T = tile_queries (16, 32 or
// 64): a row of `tiles` [N, 4] int32 is (sequence, first row of the query tensors, queries, position of the first
// query), all 0 for an empty tile. Tiles lie strip by strip: rows [s 64 / T, (s + 1) 64 / T) are the tiles of 64
// positions of one sequence, empty ones where the batch brings no query. Page tables are [sequences, pages] int32.
#pragma once

#include <ATen/ATen.h>

#include "ops/op.h"

namespace spot::ops {

using kernels::KeyFormat;

// The selector keys of whole sequences, decoded and rounded to bfloat16, [key_heads, tokens, 128]: the token at
// position t of sequence s is row key_begins[s] + t of a head. Rows that no sequence has hold anything.
struct SelectorKeyStage {
  static constexpr const char* kName = "selector_key_stage";
  using Result = at::Tensor;
  at::Tensor pool;  // as in ops/selector/selector.h
  at::Tensor page_table;
  at::Tensor lengths;     // [sequences] int32
  at::Tensor key_begins;  // [sequences] int32
  int64_t tokens = 0;     // at least every key_begins[s] + lengths[s]
  KeyFormat format = KeyFormat::bf16;
  double global_scale = 1.0;

  static constexpr auto fields() {
    using S = SelectorKeyStage;
    return std::tuple(required<&S::pool>("pool"), required<&S::page_table>("page_table"),
                      required<&S::lengths>("lengths"), required<&S::key_begins>("key_begins"),
                      required<&S::tokens>("tokens"), required<&S::format>("format"),
                      optional<&S::global_scale>("global_scale"));
  }
  void check() const;
};
at::Tensor selector_key_stage(const SelectorKeyStage& arguments);

// Block scores [N, groups, blocks] float32: the maximum over a tile's queries q and the tokens t of a block that q sees
// (up to its own position) of sum_h weight[q, g, h] ReLU(query[q, h] . key[t, h]). Blocks past that of a tile's last
// query hold anything.
struct ScoreTiles {
  static constexpr const char* kName = "score_tiles";
  using Result = at::Tensor;
  at::Tensor query;       // [T, 4, 128], any floating dtype; rounded to bfloat16
  at::Tensor weight;      // [T, groups, 4] float32, at most 16 groups
  at::Tensor keys;        // of selector_key_stage
  at::Tensor key_begins;  // [sequences] int32
  at::Tensor tiles;
  int64_t tile_queries = 32;
  int64_t blocks = 0;  // at least those of the longest sequence up to its last query

  static constexpr auto fields() {
    using S = ScoreTiles;
    return std::tuple(required<&S::query>("query"), required<&S::weight>("weight"),
                      required<&S::keys>("keys"), required<&S::key_begins>("key_begins"),
                      required<&S::tiles>("tiles"), required<&S::tile_queries>("tile_queries"),
                      required<&S::blocks>("blocks"));
  }
  void check() const;
};
at::Tensor score_tiles(const ScoreTiles& arguments);

// softmax(scale * q K^T) V of every tile's queries over the tile's blocks, each query up to its own position,
// accumulated in float32: [T, num_heads, head_dim] in query's dtype; 0 for a query that sees no listed token. Rows that
// no tile has hold anything. CUDA: bfloat16 and float16, head_dim 64, 128 and 256.
struct AttendTiles {
  static constexpr const char* kName = "attend_tiles";
  using Result = at::Tensor;
  at::Tensor query;                 // [T, num_heads, head_dim] float32, bfloat16 or float16
  at::Tensor key_pool, value_pool;  // [num_kv_heads, pages, 16, head_dim]
  at::Tensor page_table;
  at::Tensor tiles;
  int64_t tile_queries = 32;
  at::Tensor indices, counts;  // of select_blocks, [N, groups, M] and [N, groups], groups 1 or num_kv_heads
  double scale = 0.0;

  static constexpr auto fields() {
    using S = AttendTiles;
    return std::tuple(required<&S::query>("query"), required<&S::key_pool>("key_pool"),
                      required<&S::value_pool>("value_pool"), required<&S::page_table>("page_table"),
                      required<&S::tiles>("tiles"), required<&S::tile_queries>("tile_queries"),
                      required<&S::indices>("indices"), required<&S::counts>("counts"),
                      required<&S::scale>("scale"));
  }
  void check() const;
};
at::Tensor attend_tiles(const AttendTiles& arguments);

}  // namespace spot::ops
