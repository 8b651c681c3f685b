#include "attention/dense.h"

#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>
#include <optional>

#include "attention/prefill.h"
#include "core/error.h"
#include "ops/attention/attention.h"

namespace spot {
namespace {

// Partial attention over some keys: output [heads, T, head_dim] and the log of its normaliser [heads, T],
// float32.
struct Partial {
  at::Tensor output, logsumexp;
};

Partial flash(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool causal,
              double scale) {
  auto [output, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), 0.0, causal, std::nullopt, scale);
  return {output[0], logsumexp[0]};
}

// The flash kernel aligns its causal mask to the first key, so a chunk that begins at `start` is attended in
// two parts: the keys before it, all visible, and its own, causal. A mask tensor would be four times slower.
at::Tensor causal_attention_cpu(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                int64_t start, double scale, at::Tensor* logsumexp) {
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2), kv_heads = key.size(0);
  const int64_t group = heads / kv_heads;
  const at::Tensor grouped =
      query.view({tokens, kv_heads, group, dim}).permute({1, 2, 0, 3});  // [Hkv, g, T, d]
  if (tokens == 1) {
    const at::Tensor part = flash(grouped.reshape({kv_heads, group, dim}), key.narrow(1, 0, start + 1),
                                  value.narrow(1, 0, start + 1), false, scale)
                                .output;
    return part.reshape({1, heads, dim});
  }
  const at::Tensor own_key = key.narrow(1, start, tokens), own_value = value.narrow(1, start, tokens);
  at::Tensor output = at::empty({kv_heads, group, tokens, dim}, query.options());
  at::Tensor own_sum = at::empty({kv_heads, group, tokens}, query.options().dtype(at::kFloat));
  for (int64_t member = 0; member < group; ++member) {
    const Partial own = flash(grouped.select(1, member), own_key, own_value, true, scale);
    output.select(1, member).copy_(own.output);
    own_sum.select(1, member).copy_(own.logsumexp);
  }
  if (logsumexp && start == 0) *logsumexp = own_sum.view({heads, tokens});
  if (start > 0) {
    const Partial past = flash(grouped.reshape({kv_heads, group * tokens, dim}), key.narrow(1, 0, start),
                               value.narrow(1, 0, start), false, scale);
    const at::Tensor past_sum = past.logsumexp.view({kv_heads, group, tokens});
    const at::Tensor past_share = at::sigmoid(past_sum - own_sum).unsqueeze(-1);
    const at::Tensor past_output = past.output.reshape({kv_heads, group, tokens, dim});
    output = at::lerp(output.to(at::kFloat), past_output.to(at::kFloat), past_share).to(query.scalar_type());
  }
  return output.permute({2, 0, 1, 3}).reshape({tokens, heads, dim});
}

// torch's flash kernel aligns the causal mask to the last key, as chunked prefill needs it, and reads grouped
// KV
// heads in place; scaled_dot_product_attention would not choose it for a chunk.
at::Tensor causal_attention_flash(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  int64_t start, double scale, at::Tensor* logsumexp) {
  const int64_t length = start + query.size(0);
  const auto result = at::_scaled_dot_product_flash_attention(
      query.transpose(0, 1).unsqueeze(0), key.narrow(1, 0, length).unsqueeze(0),
      value.narrow(1, 0, length).unsqueeze(0), 0.0, /*is_causal=*/true, false, scale);
  if (logsumexp) *logsumexp = std::get<1>(result)[0].narrow(1, 0, query.size(0));
  return std::get<0>(result)[0].transpose(0, 1);
}

// cuDNN's attention, on Hopper 1.7 to 2.2 times as fast as torch's flash kernel from 2,048 tokens on
// (kernels/NOTES.md), builds a plan of about 50 ms for every new shape. So lengths are rounded up, by at most a
// 32nd, and products that take less than about a millisecond are left to flash attention.
int64_t plan_step(int64_t tokens) {
  return std::max<int64_t>(256, static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens))) / 64);
}
int64_t round_up(int64_t tokens, int64_t step) {
  return (tokens + step - 1) / step * step;
}
bool worth_a_plan(const at::Tensor& query, int64_t start) {
  const auto tokens = static_cast<double>(query.size(0)),
             width = static_cast<double>(query.size(1) * query.size(2));
  return query.size(0) >= 256 && 4 * width * tokens * (static_cast<double>(start) + tokens / 2) >= 5e11;
}

// [heads, rows, dim] with `before` and `after` rows of zeros around it.
at::Tensor padded(const at::Tensor& x, int64_t before, int64_t after) {
  return before + after == 0 ? x : at::constant_pad_nd(x, {0, 0, before, after});
}

// query, key, value: [heads, rows, dim]. The causal mask is aligned to the first key.
Partial cudnn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool causal,
              double scale) {
  const auto result = at::_scaled_dot_product_cudnn_attention(
      query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), std::nullopt, /*compute_log_sumexp=*/true,
      0.0, causal, false, scale);
  return {std::get<0>(result)[0], std::get<1>(result)[0].view({query.size(0), query.size(1)})};
}

// The keys before `start`, all visible, and the rest, causal, as two parts: the border is moved down to a whole
// step, by rows of zeros before the queries.
at::Tensor causal_attention_cudnn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  int64_t start, double scale, at::Tensor* logsumexp) {
  const int64_t tokens = query.size(0), step = plan_step(start + tokens), past = start / step * step;
  const int64_t before = start - past, rows = before + tokens, after = round_up(rows, plan_step(rows)) - rows;
  const at::Tensor q = query.transpose(0, 1);
  const Partial all = cudnn(padded(q, before, after), padded(key.narrow(1, past, rows), 0, after),
                            padded(value.narrow(1, past, rows), 0, after), true, scale);
  at::Tensor output = all.output.narrow(1, before, tokens), sum = all.logsumexp.narrow(1, before, tokens);
  if (past > 0) {
    const Partial part = cudnn(padded(q, 0, round_up(tokens, plan_step(tokens)) - tokens),
                               key.narrow(1, 0, past), value.narrow(1, 0, past), false, scale);
    const at::Tensor past_sum = part.logsumexp.narrow(1, 0, tokens);
    const at::Tensor past_output = part.output.narrow(1, 0, tokens);
    output =
        at::lerp(output.to(at::kFloat), past_output.to(at::kFloat), at::sigmoid(past_sum - sum).unsqueeze(-1))
            .to(query.scalar_type());
    if (logsumexp) sum = at::logaddexp(sum, past_sum);
  }
  if (logsumexp) *logsumexp = sum;
  return output.transpose(0, 1);
}

// Nothing where cuDNN refuses (an old one, or a card or shape that it does not serve); it is not asked again.
std::optional<at::Tensor> try_cudnn(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                    int64_t start, double scale, at::Tensor* logsumexp) {
  static std::atomic<bool> refused{false};
  if (refused) return std::nullopt;
  try {
    return causal_attention_cudnn(query, key, value, start, scale, logsumexp);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error&) {
    refused = true;
    return std::nullopt;
  }
}

at::Tensor causal_attention_masked(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                   int64_t start, double scale) {
  const int64_t tokens = query.size(0);
  const bool grouped = query.size(1) != key.size(0);
  const at::Tensor q = query.transpose(0, 1).unsqueeze(0), k = key.unsqueeze(0), v = value.unsqueeze(0);
  if (tokens == 1 || start == 0) {
    const int64_t length = start + tokens;
    return at::scaled_dot_product_attention(q, k.narrow(2, 0, length), v.narrow(2, 0, length), std::nullopt,
                                            0.0, tokens > 1, scale, grouped)[0]
        .transpose(0, 1);
  }
  std::vector<at::Tensor> parts;
  const int64_t chunk = std::max<int64_t>(16, (int64_t{1} << 26) / (start + tokens));
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first), length = start + first + count;
    const at::Tensor position =
        at::arange(start + first, length, query.options().dtype(at::kLong)).unsqueeze(1);
    const at::Tensor mask = at::arange(length, query.options().dtype(at::kLong)).unsqueeze(0) <= position;
    parts.push_back(at::scaled_dot_product_attention(q.narrow(2, first, count), k.narrow(2, 0, length),
                                                     v.narrow(2, 0, length), mask, 0.0, false, scale,
                                                     grouped)[0]
                        .transpose(0, 1));
  }
  return at::cat(parts);
}

}  // namespace

at::Tensor causal_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            int64_t start, double scale, at::Tensor* logsumexp) {
  if (query.size(1) % key.size(0) != 0 || key.size(1) < start + query.size(0))
    fail("causal attention: {} query heads at positions {} to {} do not fit keys {}", query.size(1), start,
         start + query.size(0) - 1, fmt::join(key.sizes(), "x"));
  if (query.is_cpu()) return causal_attention_cpu(query, key, value, start, scale, logsumexp);
  const bool flash = (query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf) &&
                     query.size(2) % 8 == 0 && query.size(2) <= 256;
  if (!flash) return causal_attention_masked(query, key, value, start, scale);
  if (worth_a_plan(query, start))
    if (auto output = try_cudnn(query, key, value, start, scale, logsumexp)) return *std::move(output);
  return causal_attention_flash(query, key, value, start, scale, logsumexp);
}

at::Tensor attend_dense_decode(const AttentionInputs& inputs, const KvPools& pools) {
  const Batch& batch = inputs.batch;
  const auto& [keys, values] = pools;
  if (ops::attends(inputs.query, keys.stored))
    return ops::sparse_decode_attention({.query = inputs.query,
                                         .key_pool = keys.stored,
                                         .value_pool = values.stored,
                                         .page_table = batch.page_table,
                                         .lengths = batch.lengths,
                                         .scale = inputs.scale,
                                         .key_scale = keys.scale,
                                         .value_scale = values.scale});
  // Shapes that the operator does not know: as chunks of one token.
  at::Tensor output = at::empty_like(inputs.query);
  paged_prefill_attention(inputs.query, pools, paged_chunks(batch, query_chunks(batch)), inputs.scale,
                          output);
  return output;
}

at::Tensor attend_dense(const AttentionInputs& inputs, const KvPools& pools) {
  const Batch& batch = inputs.batch;
  if (batch.is_decode()) return attend_dense_decode(inputs, pools);
  at::Tensor output = at::empty_like(inputs.query);
  if (batch.num_decodes > 0) {
    const Batch decodes = batch.decodes();
    output.narrow(0, 0, batch.num_decodes).copy_(attend_dense_decode(inputs.decode_rows(decodes), pools));
  }
  attend_prefill(inputs, pools, output);
  return output;
}

AttentionPreparation DenseAttention::prepare(int64_t layer, const at::Tensor&, const Batch& batch) {
  return {.pools = kv_pools(pools_, layer), .slots = batch.slots};
}

at::Tensor DenseAttention::forward(const AttentionInputs& inputs) {
  const KvPools pools = kv_pools(pools_, inputs.layer);
  if (!inputs.stored) write_tokens(pools, inputs.batch.slots, inputs.key, inputs.value);
  return attend_dense(inputs, pools);
}

}  // namespace spot
