#include "ops/prefill/prefill.h"

#include "kernels/query_tiles.h"
#include "ops/checks.h"

namespace spot::ops {

using kernels::kKeyDim;
using kernels::kSelectorHeads;

namespace {

void check_tiles(const char* op, const at::Tensor& tiles, int64_t tile_queries) {
  TORCH_CHECK(tile_queries == 16 || tile_queries == 32 || tile_queries == 64, op, ": tile_queries is ",
              tile_queries, "; it must be 16, 32 or 64");
  TORCH_CHECK(tiles.dim() == 2 && tiles.size(1) == 4 && tiles.scalar_type() == at::kInt &&
                  tiles.is_contiguous() && tiles.size(0) % (kernels::kStripQueries / tile_queries) == 0,
              op, ": tiles are ", tiles.scalar_type(), " ", tiles.sizes(),
              "; they must be contiguous int32 [tiles, 4], a multiple of ",
              kernels::kStripQueries / tile_queries, " tiles");
}

void check_begins(const char* op, const at::Tensor& key_begins) {
  TORCH_CHECK(key_begins.dim() == 1 && key_begins.scalar_type() == at::kInt && key_begins.is_contiguous(), op,
              ": key_begins is ", key_begins.scalar_type(), " ", key_begins.sizes(),
              "; it must be contiguous int32 [sequences]");
}

}  // namespace

void SelectorKeyStage::check() const {
  const char* op = "spot::selector_key_stage";
  check_key_pool(op, pool, format);
  check_begins(op, key_begins);
  check_rows(op, page_table, lengths, key_begins.size(0));
  TORCH_CHECK(tokens >= 0, op, ": tokens is ", tokens, "; it must be 0 or more");
  check_devices(op, pool, {&page_table, &lengths, &key_begins});
}

void ScoreTiles::check() const {
  const char* op = "spot::score_tiles";
  check_tiles(op, tiles, tile_queries);
  check_begins(op, key_begins);
  TORCH_CHECK(query.dim() == 3 && query.size(1) == kSelectorHeads && query.size(2) == kKeyDim &&
                  query.is_floating_point(),
              op, ": query is ", query.scalar_type(), " ", query.sizes(),
              "; it must be floating point [tokens, 4, 128]");
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == query.size(0) && weight.size(1) >= 1 &&
                  weight.size(1) <= kernels::kMaxScoreGroups && weight.size(2) == kSelectorHeads &&
                  weight.scalar_type() == at::kFloat,
              op, ": weight is ", weight.scalar_type(), " ", weight.sizes(), "; it must be float32 [",
              query.size(0), ", 1 to ", kernels::kMaxScoreGroups, ", 4]");
  TORCH_CHECK(keys.dim() == 3 && (keys.size(0) == 1 || keys.size(0) == kSelectorHeads) &&
                  keys.size(2) == kKeyDim && keys.scalar_type() == at::kBFloat16 && keys.is_contiguous(),
              op, ": keys are ", keys.scalar_type(), " ", keys.sizes(),
              "; they must be contiguous bfloat16 [1 or 4, tokens, 128]");
  TORCH_CHECK(blocks >= 0, op, ": blocks is ", blocks, "; it must be 0 or more");
  check_devices(op, query, {&weight, &keys, &key_begins, &tiles});
}

void AttendTiles::check() const {
  const char* op = "spot::attend_tiles";
  check_tiles(op, tiles, tile_queries);
  check_heads(op, "tokens", query, key_pool, value_pool);
  TORCH_CHECK(page_table.dim() == 2 && page_table.scalar_type() == at::kInt, op, ": page_table is ",
              page_table.scalar_type(), " ", page_table.sizes(), "; it must be int32 [sequences, pages]");
  TORCH_CHECK(counts.dim() == 2 && counts.size(0) == tiles.size(0) && counts.scalar_type() == at::kInt &&
                  (counts.size(1) == 1 || counts.size(1) == key_pool.size(0)),
              op, ": counts are ", counts.scalar_type(), " ", counts.sizes(), "; they must be int32 [",
              tiles.size(0), ", 1 or ", key_pool.size(0), "]");
  TORCH_CHECK(indices.dim() == 3 && indices.size(0) == counts.size(0) && indices.size(1) == counts.size(1) &&
                  indices.scalar_type() == at::kInt,
              op, ": indices are ", indices.scalar_type(), " ", indices.sizes(), "; they must be int32 [",
              counts.size(0), ", ", counts.size(1), ", blocks]");
  check_devices(op, query, {&key_pool, &value_pool, &page_table, &tiles, &indices, &counts});
}

namespace aten {
decltype(ops::selector_key_stage) selector_key_stage;
decltype(ops::score_tiles) score_tiles;
decltype(ops::attend_tiles) attend_tiles;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::selector_key_stage) selector_key_stage;
decltype(ops::score_tiles) score_tiles;
decltype(ops::attend_tiles) attend_tiles;
}  // namespace cuda
#endif

namespace {
namespace fake {

at::Tensor selector_key_stage(const SelectorKeyStage& a) {
  return at::empty_symint({a.pool.sym_size(1), a.tokens, kKeyDim}, a.pool.options().dtype(at::kBFloat16));
}
at::Tensor score_tiles(const ScoreTiles& a) {
  return at::empty_symint({a.tiles.sym_size(0), a.weight.sym_size(1), a.blocks}, a.weight.options());
}
at::Tensor attend_tiles(const AttendTiles& a) {
  return at::empty_symint(a.query.sym_sizes(), a.query.options());
}

}  // namespace fake
}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<SelectorKeyStage>(library);
  define<ScoreTiles>(library);
  define<AttendTiles>(library);
}
TORCH_LIBRARY_IMPL(spot, CPU, library) {
  implement<aten::selector_key_stage>(library);
  implement<aten::score_tiles>(library);
  implement<aten::attend_tiles>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::selector_key_stage>(library);
  implement<fake::score_tiles>(library);
  implement<fake::attend_tiles>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::selector_key_stage>(library);
  implement<cuda::score_tiles>(library);
  implement<cuda::attend_tiles>(library);
}
#endif

at::Tensor selector_key_stage(const SelectorKeyStage& arguments) {
  return call(arguments);
}
at::Tensor score_tiles(const ScoreTiles& arguments) {
  return call(arguments);
}
at::Tensor attend_tiles(const AttendTiles& arguments) {
  return call(arguments);
}

}  // namespace spot::ops
