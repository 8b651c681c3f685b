// Tensors to the pointers of the kernels of sparse prefill, on the current stream. Nothing here waits for the device.
#include "kernels/attend_tiles.h"
#include "kernels/score_tiles.h"
#include "ops/checks.h"
#include "ops/cuda/call.h"
#include "ops/prefill/prefill.h"

namespace spot::ops::cuda {
namespace {

const kernels::QueryTile* tile_rows(const at::Tensor& tiles) {
  static_assert(sizeof(kernels::QueryTile) == 16);
  return reinterpret_cast<const kernels::QueryTile*>(tiles.const_data_ptr<int32_t>());
}

}  // namespace

at::Tensor selector_key_stage(const SelectorKeyStage& a) {
  const c10::DeviceGuard guard(a.pool.device());
  at::Tensor keys =
      at::empty({a.pool.size(1), a.tokens, kernels::kKeyDim}, a.pool.options().dtype(at::kBFloat16));
  const at::Tensor table = a.page_table.contiguous(), lengths = a.lengths.contiguous();
  kernels::StageKeysParams params;
  params.format = a.format;
  params.key_heads = narrow(a.pool.size(1));
  params.pages = a.pool.const_data_ptr<uint8_t>();
  params.global_scale = static_cast<float>(a.global_scale);
  params.sequences = narrow(a.key_begins.size(0));
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.stride(0);
  params.lengths = lengths.const_data_ptr<int32_t>();
  params.longest = std::min(table.size(1) * kPageTokens, a.tokens);
  params.key_begins = a.key_begins.const_data_ptr<int32_t>();
  params.keys = keys.mutable_data_ptr();
  params.key_tokens = a.tokens;
  check(kernels::stage_keys(params, native_stream(a.pool)), "spot::selector_key_stage");
  return keys;
}

at::Tensor score_tiles(const ScoreTiles& a) {
  const c10::DeviceGuard guard(a.query.device());
  at::Tensor scores = at::empty({a.tiles.size(0), a.weight.size(1), a.blocks}, a.weight.options());
  if (scores.numel() == 0) return scores;
  const at::Tensor query = a.query.to(at::kBFloat16).contiguous(), weight = a.weight.contiguous();
  kernels::ScoreTilesParams params;
  params.num_tiles = narrow(a.tiles.size(0));
  params.tile_queries = narrow(a.tile_queries);
  params.tiles = tile_rows(a.tiles);
  params.key_heads = narrow(a.keys.size(0));
  params.groups = narrow(weight.size(1));
  params.queries = query.const_data_ptr();
  params.query_row_stride = query.stride(0);
  params.weights = weight.const_data_ptr<float>();
  params.keys = a.keys.const_data_ptr();
  params.key_tokens = a.keys.size(1);
  params.key_begins = a.key_begins.const_data_ptr<int32_t>();
  params.longest = a.blocks * kPageTokens;
  params.scores = scores.mutable_data_ptr<float>();
  params.score_stride = a.blocks;
  check(kernels::score_tiles(params, native_stream(a.query)), "spot::score_tiles");
  return scores;
}

at::Tensor attend_tiles(const AttendTiles& a) {
  const c10::DeviceGuard guard(a.query.device());
  TORCH_CHECK(a.query.scalar_type() != at::kFloat,
              "spot::attend_tiles: float32 runs on the CPU only; load the model in bfloat16 or float16");
  at::Tensor output = at::empty(a.query.sizes(), a.query.options());
  if (output.numel() == 0 || a.tiles.size(0) == 0) return output;
  const at::Tensor query = a.query.stride(2) == 1 ? a.query : a.query.contiguous(),
                   table = a.page_table.contiguous(), indices = a.indices.contiguous(),
                   counts = a.counts.contiguous();
  kernels::AttendTilesParams params;
  params.type = data_type(query);
  params.num_tiles = narrow(a.tiles.size(0));
  params.tile_queries = narrow(a.tile_queries);
  params.tiles = tile_rows(a.tiles);
  params.num_heads = narrow(query.size(1));
  params.num_kv_heads = narrow(a.key_pool.size(0));
  params.head_dim = narrow(query.size(2));
  params.scale = static_cast<float>(a.scale);
  params.queries = query.const_data_ptr();
  params.query_row_stride = query.stride(0);
  params.query_head_stride = query.stride(1);
  params.keys = a.key_pool.const_data_ptr();
  params.values = a.value_pool.const_data_ptr();
  params.num_pages = narrow(a.key_pool.size(1));
  params.head_stride = a.key_pool.stride(0);
  params.page_stride = a.key_pool.stride(1);
  params.token_stride = a.key_pool.stride(2);
  params.page_table = table.const_data_ptr<int32_t>();
  params.page_table_stride = table.stride(0);
  params.selected = indices.const_data_ptr<int32_t>();
  params.counts = counts.const_data_ptr<int32_t>();
  params.max_selected = narrow(indices.size(2));
  params.rows_per_tile = narrow(counts.size(1));
  params.out = output.mutable_data_ptr();
  check(kernels::attend_tiles(params, native_stream(query)), "spot::attend_tiles");
  return output;
}

}  // namespace spot::ops::cuda
