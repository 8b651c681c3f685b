// The layer's operators by ATen: the oracle of the kernels, and what serves where they do not.
#include <utility>

#include "ops/e4m3.h"
#include "ops/layer/layer.h"

namespace spot::ops::aten {

at::Tensor rms_norm(const RmsNorm& a) {
  const auto dtype = a.x.scalar_type();
  if (a.factor.scalar_type() == dtype)
    return at::rms_norm(a.x, a.factor.sizes(), a.factor, a.epsilon).contiguous();
  return at::rms_norm(a.x.to(at::kFloat), a.factor.sizes(), a.factor, a.epsilon).to(dtype).contiguous();
}

at::Tensor gated_product(const GatedProduct& a) {
  return (a.activation == "silu" ? at::silu(a.gate) : at::sigmoid(a.gate)).mul_(a.x).contiguous();
}

namespace {

// rows [T, heads, dim] to the tokens' slots; negative ones are skipped.
void store(const at::Tensor& pool, const at::Tensor& scale, const at::Tensor& slots, const at::Tensor& rows) {
  if (pool.scalar_type() == at::kFloat8_e4m3fn &&
      rows.scalar_type() != at::kByte)  // not every device indexes FP8
    return store(pool.view(at::kByte), {}, slots, to_e4m3(rows, scale).view(at::kByte));
  const int64_t page_tokens = pool.size(2);
  const at::Tensor kept = slots.ge(0).nonzero().squeeze(1);
  const at::Tensor where = slots.index_select(0, kept);
  // [pages, 16, heads, dim], wherever these lie in memory.
  at::Tensor tokens = pool.permute({1, 2, 0, 3});
  tokens.index_put_({at::div(where, page_tokens, "floor"), where.remainder(page_tokens)},
                    rows.index_select(0, kept));
}

// Clones, since no result of an operator may share memory with another tensor.
at::Tensor own(const at::Tensor& x) {
  return x.clone(at::MemoryFormat::Contiguous);
}

// Stores a selector's keys; its queries [T, 4, 128] and mixing weights [T, groups * 4].
std::pair<at::Tensor, at::Tensor> prepared(const SelectorPrologue& s, const at::Tensor& slots,
                                           const at::Tensor& positions) {
  selector_key_append(selector_append(s, slots, positions));
  const at::Tensor queries = s.projected.narrow(1, 0, kernels::kSelectorHeads * kernels::kKeyDim)
                                 .unflatten(1, {-1, kernels::kKeyDim});
  return {
      own(s.preparation.cos.defined() ? rotate_heads(queries, positions, s.preparation.cos, s.preparation.sin)
                                      : queries),
      at::linear(s.hidden.to(at::kFloat), s.mix) * s.mix_scale};
}

}  // namespace

AttentionPrologue::Result attention_prologue(const AttentionPrologue& a) {
  const auto dtype = a.projected.scalar_type();
  const int64_t dim = a.head_dim, kv_rows = a.num_kv_heads * dim;
  const int64_t query_rows = a.num_heads * dim * (a.output_gate ? 2 : 1);
  at::Tensor heads;  // [T, num_heads + num_kv_heads, head_dim]
  if (a.output_gate) {
    heads =
        at::cat({a.projected.narrow(1, 0, query_rows).unflatten(1, {a.num_heads, 2 * dim}).narrow(2, 0, dim),
                 a.projected.narrow(1, query_rows, kv_rows).unflatten(1, {a.num_kv_heads, dim})},
                1);
  } else {
    heads = a.projected.narrow(1, 0, query_rows + kv_rows).unflatten(1, {a.num_heads + a.num_kv_heads, dim});
  }
  heads = heads.to(at::kFloat);
  if (a.qk_norm.defined()) heads = at::rms_norm(heads, {dim}, {}, a.norm_eps) * a.qk_norm;
  heads = rotate_heads(heads, a.positions, a.cos, a.sin).to(dtype);
  const at::Tensor query = own(heads.narrow(1, 0, a.num_heads)),
                   key = own(heads.narrow(1, a.num_heads, a.num_kv_heads)),
                   value = own(a.projected.narrow(1, query_rows + kv_rows, kv_rows)
                                   .unflatten(1, {a.num_kv_heads, dim}));
  if (a.key_pool.defined()) {
    store(a.key_pool, a.key_scale, a.slots, key);
    store(a.value_pool, a.value_scale, a.slots, value);
  }
  const SelectorPrologue& s = a.selector;
  if (!s.projected.defined())
    return {query, key, value, at::empty({0}, query.options()),
            at::empty({0}, query.options().dtype(at::kFloat))};
  const auto [selector_query, selector_weight] = prepared(s, a.slots, a.positions);
  return {query, key, value, selector_query, selector_weight};
}

SelectorPrologueAlone::Result selector_prologue(const SelectorPrologueAlone& a) {
  const auto [query, weight] = prepared(a.selector, a.slots, a.selector.preparation.positions);
  return {query, weight.unflatten(1, {-1, kernels::kSelectorHeads})};
}

}  // namespace spot::ops::aten
