#include "ops/selector/selector.h"

#include "ops/checks.h"

namespace spot::ops {

using kernels::kKeyDim;
using kernels::kSelectorHeads;

void KeyPreparation::check(const char* op, const at::Tensor& keys) const {
  for (const at::Tensor* x : {&norm_weight, &norm_bias})
    TORCH_CHECK(
        !x->defined() || (x->scalar_type() == at::kFloat && x->numel() == kKeyDim && x->is_contiguous()), op,
        ": a norm weight or bias is ", x->scalar_type(), " ", x->sizes(),
        "; it must be contiguous float32 [128]");
  TORCH_CHECK(cos.defined() == sin.defined(), op, ": cos and sin must be given together");
  check_devices(op, keys, {&norm_weight, &norm_bias, &cos, &sin, &positions});
  if (!cos.defined()) return;
  for (const at::Tensor* x : {&cos, &sin})
    TORCH_CHECK(x->scalar_type() == at::kFloat && x->dim() == 2 && x->size(1) == kernels::kRotaryPairs &&
                    x->is_contiguous() && x->size(0) == cos.size(0),
                op, ": a rotary table is ", x->scalar_type(), " ", x->sizes(),
                "; it must be contiguous float32 [positions, 32]");
  TORCH_CHECK(positions.defined() && positions.dim() == 1 && positions.size(0) == keys.size(0) &&
                  positions.scalar_type() == at::kLong,
              op, ": rotation needs positions, int64 [", keys.size(0), "]");
}

void SelectorKeyAppend::check() const {
  const char* op = "spot::selector_key_append";
  check_key_pool(op, pool, format);
  TORCH_CHECK(
      keys.dim() == 3 && keys.size(1) == pool.size(1) && keys.size(2) == kKeyDim && keys.is_floating_point(),
      op, ": keys are ", keys.scalar_type(), " ", keys.sizes(), "; they must be floating point [tokens, ",
      pool.size(1), ", 128]");
  check_slots(op, slots, keys.size(0));
  check_devices(op, pool, {&slots, &keys});
  preparation.check(op, keys);
}

void SelectorKeyGather::check() const {
  const char* op = "spot::selector_key_gather";
  check_key_pool(op, pool, format);
  TORCH_CHECK(page_table.dim() == 1 && page_table.scalar_type() == at::kInt && length >= 0 &&
                  length <= page_table.size(0) * kPageTokens,
              op, ": page_table is ", page_table.scalar_type(), " ", page_table.sizes(),
              "; it must be int32 [pages] and hold all of ", length, " tokens");
  check_devices(op, pool, {&page_table});
}

void ScoreBlocks::check() const {
  const char* op = "spot::score_blocks";
  check_key_pool(op, pool, format);
  TORCH_CHECK(query.dim() == 3 && query.size(1) == kSelectorHeads && query.size(2) == kKeyDim &&
                  query.is_floating_point(),
              op, ": query is ", query.scalar_type(), " ", query.sizes(),
              "; it must be floating point [rows, 4, 128]");
  TORCH_CHECK(weight.dim() == 3 && weight.size(0) == query.size(0) && weight.size(1) >= 1 &&
                  weight.size(2) == kSelectorHeads && weight.scalar_type() == at::kFloat,
              op, ": weight is ", weight.scalar_type(), " ", weight.sizes(), "; it must be float32 [",
              query.size(0), ", groups, 4]");
  check_rows(op, page_table, lengths, query.size(0));
  TORCH_CHECK(max_blocks >= 0, op, ": max_blocks is ", max_blocks, "; it must be 0 or more");
  check_devices(op, query, {&weight, &pool, &page_table, &lengths});
}

void SelectorProject::check() const {
  const char* op = "spot::selector_project";
  TORCH_CHECK(hidden.dim() == 2 && hidden.is_floating_point(), op, ": hidden is ", hidden.scalar_type(), " ",
              hidden.sizes(), "; it must be floating point [tokens, hidden_size]");
  const int64_t size = hidden.size(1);
  auto matrix = [&](const char* name, const at::Tensor& x, bool fits, const char* rows) {
    TORCH_CHECK(x.dim() == 2 && x.size(1) == size && fits && x.is_floating_point(), op, ": ", name, " is ",
                x.scalar_type(), " ", x.sizes(), "; it must be floating point [", rows, ", ", size, "]");
  };
  matrix("query_weight", query_weight, query_weight.size(0) == kSelectorHeads * kKeyDim, "512");
  matrix("key_weight", key_weight,
         key_weight.size(0) == kKeyDim || key_weight.size(0) == kSelectorHeads * kKeyDim, "128 or 512");
  matrix("mix_weight", mix_weight, mix_weight.size(0) >= 1 && mix_weight.size(0) % kSelectorHeads == 0,
         "a multiple of 4");
  TORCH_CHECK(
      positions.dim() == 1 && positions.size(0) == hidden.size(0) && positions.scalar_type() == at::kLong, op,
      ": positions are ", positions.scalar_type(), " ", positions.sizes(), "; they must be int64 [",
      hidden.size(0), "]");
  for (const at::Tensor* x : {&norm_weight, &norm_bias})
    TORCH_CHECK(!x->defined() || (x->dim() == 1 && x->size(0) == kKeyDim && x->is_floating_point()), op,
                ": a norm weight or bias is ", x->scalar_type(), " ", x->sizes(),
                "; it must be floating point [128]");
  TORCH_CHECK(norm != KeyNorm::none || !(norm_weight.defined() || norm_bias.defined()), op,
              ": norm is none, so a norm weight or bias has no effect; leave it out");
  TORCH_CHECK(cos.defined() == sin.defined(), op, ": cos and sin must be given together");
  if (cos.defined())
    for (const at::Tensor* x : {&cos, &sin})
      TORCH_CHECK(x->scalar_type() == at::kFloat && x->dim() == 2 && x->sizes() == cos.sizes() &&
                      x->size(1) >= 1 && 2 * x->size(1) <= kKeyDim,
                  op, ": a rotary table is ", x->scalar_type(), " ", x->sizes(),
                  "; it must be float32 [positions, 1 to 64]");
  check_devices(op, hidden,
                {&query_weight, &key_weight, &mix_weight, &positions, &norm_weight, &norm_bias, &cos, &sin});
}

namespace cpu {
decltype(ops::selector_key_append) selector_key_append;
decltype(ops::selector_key_gather) selector_key_gather;
decltype(ops::score_blocks) score_blocks;
}  // namespace cpu
namespace aten {
decltype(ops::selector_key_gather) selector_key_gather;
decltype(ops::selector_project) selector_project;
}  // namespace aten
#ifdef SPOT_CUDA
namespace cuda {
decltype(ops::selector_key_append) selector_key_append;
decltype(ops::score_blocks) score_blocks;
}  // namespace cuda
#endif

namespace {
namespace fake {

void selector_key_append(const SelectorKeyAppend&) {}

at::Tensor selector_key_gather(const SelectorKeyGather& a) {
  return at::empty_symint({a.length, a.pool.sym_size(1), kKeyDim}, a.pool.options().dtype(at::kFloat));
}

at::Tensor score_blocks(const ScoreBlocks& a) {
  return at::empty_symint({a.query.sym_size(0), a.weight.sym_size(1),
                           a.max_blocks > 0 ? c10::SymInt(a.max_blocks) : a.page_table.sym_size(1)},
                          a.weight.options());
}

SelectorProject::Result selector_project(const SelectorProject& a) {
  const c10::SymInt tokens = a.hidden.sym_size(0);
  const auto options = a.hidden.options();
  return {at::empty_symint({tokens, kSelectorHeads, kKeyDim}, options),
          at::empty_symint({tokens, a.mix_weight.sym_size(0) / kSelectorHeads, kSelectorHeads},
                           options.dtype(a.hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)),
          at::empty_symint({tokens, a.key_weight.sym_size(0) / kKeyDim, kKeyDim}, options)};
}

}  // namespace fake

// Under autograd the ATen form records its own gradient.
SelectorProject::Result selector_project_autograd(const SelectorProject& a) {
  bool wanted = false;
  for (const at::Tensor* x :
       {&a.hidden, &a.query_weight, &a.key_weight, &a.mix_weight, &a.norm_weight, &a.norm_bias})
    wanted = wanted || (x->defined() && x->requires_grad());
  if (wanted && at::GradMode::is_enabled()) return aten::selector_project(a);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(spot, library) {
  define<SelectorKeyAppend>(library);
  define<SelectorKeyGather>(library);
  define<ScoreBlocks>(library);
  define<SelectorProject>(library);
}
TORCH_LIBRARY_IMPL(spot, CPU, library) {
  implement<cpu::selector_key_append>(library);
  implement<cpu::selector_key_gather>(library);
  implement<cpu::score_blocks>(library);
}
TORCH_LIBRARY_IMPL(spot, CompositeExplicitAutograd, library) {
  implement<aten::selector_project>(library);
}
TORCH_LIBRARY_IMPL(spot, Autograd, library) {
  implement<selector_project_autograd>(library);
}
TORCH_LIBRARY_IMPL(spot, Meta, library) {
  implement<fake::selector_key_append>(library);
  implement<fake::selector_key_gather>(library);
  implement<fake::score_blocks>(library);
  implement<fake::selector_project>(library);
}
#ifdef SPOT_CUDA
TORCH_LIBRARY_IMPL(spot, CUDA, library) {
  implement<cuda::selector_key_append>(library);
  implement<aten::selector_key_gather>(library);
  implement<cuda::score_blocks>(library);
}
#endif

void selector_key_append(const SelectorKeyAppend& arguments) {
  call(arguments);
}
at::Tensor selector_key_gather(const SelectorKeyGather& arguments) {
  return call(arguments);
}
at::Tensor score_blocks(const ScoreBlocks& arguments) {
  return call(arguments);
}
SelectorProject::Result selector_project(const SelectorProject& arguments) {
  return call(arguments);
}

}  // namespace spot::ops
