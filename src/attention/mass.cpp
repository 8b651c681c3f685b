#include "attention/mass.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "core/error.h"

namespace spot {

at::Tensor attention_mass(const at::Tensor& query, const at::Tensor& key, double scale, int64_t start,
                          int64_t groups, BlockReduction reduction) {
  const int64_t tokens = query.size(0), heads = query.size(1), dim = query.size(2);
  const int64_t kv_heads = key.size(0), length = key.size(1);
  if (heads % kv_heads != 0 || (groups != 1 && groups != kv_heads) || length < start + tokens ||
      key.size(2) != dim)
    fail("attention mass: query {} at position {}, key {} and {} groups do not fit together",
         fmt::join(query.sizes(), "x"), start, fmt::join(key.sizes(), "x"), groups);
  const int64_t columns = reduction == BlockReduction::none ? length : (length + kBlockSize - 1) / kBlockSize;
  const auto dtype = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = query.options().dtype(dtype);
  at::Tensor mass = at::zeros({tokens, groups, columns}, options);
  const at::Tensor transposed = key.to(dtype).transpose(1, 2);  // [Hkv, d, L]
  const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 26) / (heads * length));
  for (int64_t first = 0; first < tokens; first += chunk) {
    const int64_t count = std::min(chunk, tokens - first), visible = start + first + count;
    const at::Tensor q = (query.narrow(0, first, count).to(dtype) * scale)
                             .view({count, kv_heads, heads / kv_heads, dim})
                             .permute({1, 2, 0, 3})
                             .reshape({kv_heads, -1, dim});
    at::Tensor scores = at::matmul(q, transposed.narrow(2, 0, visible)).view({kv_heads, -1, count, visible});
    const at::Tensor position = at::arange(start + first, visible, options.dtype(at::kLong)).unsqueeze(1);
    const at::Tensor future = at::arange(visible, options.dtype(at::kLong)).unsqueeze(0) > position;
    scores.masked_fill_(future, -std::numeric_limits<double>::infinity());
    const at::Tensor probabilities = at::softmax(scores, -1);
    // [groups, count, visible]
    at::Tensor mean =
        groups == 1 ? probabilities.mean(at::IntArrayRef({0, 1})).unsqueeze(0) : probabilities.mean(1);
    if (reduction == BlockReduction::none) {
      mass.narrow(0, first, count).narrow(2, 0, visible).copy_(mean.transpose(0, 1));
      continue;
    }
    const int64_t here = (visible + kBlockSize - 1) / kBlockSize;
    if (visible % kBlockSize != 0) mean = at::constant_pad_nd(mean, {0, here * kBlockSize - visible}, 0);
    mean = mean.view({groups, count, here, kBlockSize});
    const at::Tensor reduced = reduction == BlockReduction::sum ? mean.sum(-1) : mean.amax(-1);
    mass.narrow(0, first, count).narrow(2, 0, here).copy_(reduced.transpose(0, 1));
  }
  return mass;
}

at::Tensor chosen_columns(const at::Tensor& mass, const Selection& selection) {
  if (mass.size(0) != selection.rows() || mass.size(1) != selection.groups())
    fail("captured mass: mass {} and a selection of {} rows and {} groups do not fit together",
         fmt::join(mass.sizes(), "x"), selection.rows(), selection.groups());
  return selection.tokens.defined() ? token_mask(selection, mass.size(2))
                                    : block_mask(selection, mass.size(2));
}

CapturedMass captured_mass(const at::Tensor& mass, const Selection& selection, const SelectionRule& rule) {
  const at::Tensor chosen = chosen_columns(mass, selection);
  at::Tensor block = at::arange(mass.size(2), selection.lengths.options()).unsqueeze(0);
  if (selection.tokens.defined()) block = at::div(block, kBlockSize, "floor");
  const at::Tensor recent =
      at::div((selection.lengths - rule.recency).clamp_min(0), kBlockSize, "floor").unsqueeze(1);
  const at::Tensor residual =
      ((block >= (rule.sinks + kBlockSize - 1) / kBlockSize) & (block < recent)).unsqueeze(1);
  const at::Tensor whole = (mass * residual).sum(2), kept = (mass * residual * chosen).sum(2);
  return {(mass * chosen).sum(2), at::where(whole > 0, kept / whole.clamp_min(1e-30), at::ones_like(whole))};
}

}  // namespace spot
