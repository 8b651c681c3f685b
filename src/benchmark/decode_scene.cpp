#include "benchmark/decode_scene.h"

#include <algorithm>
#include <cmath>

#include "core/error.h"
#include "ops/baselines/baselines.h"
#include "ops/selector/selector.h"

namespace spot {
namespace {

constexpr int64_t kPage = kernels::kPageTokens, kSelectorDim = kernels::kKeyDim,
                  kSelectorHeads = kernels::kSelectorHeads;

at::Tensor unit(const at::Tensor& x) {
  return x / x.norm(2, -1, true);
}

DecodeSet make_set(const DecodeShape& shape, int64_t length, int64_t batch, const AttentionStatistics& s,
                   at::ScalarType dtype, at::Device device) {
  const int64_t blocks = length / kPage, pages = batch * blocks, dim = shape.head_dim,
                group = shape.num_heads / shape.num_kv_heads;
  const auto real = at::TensorOptions(device).dtype(at::kFloat), here = real.dtype(dtype);
  DecodeSet set;
  set.keys = at::empty({shape.num_kv_heads, pages, kPage, dim}, here);
  set.values = at::empty_like(set.keys).normal_();
  // z of every slot; pages are in random order, so tokens are independent of their place in memory.
  const double common = std::sqrt(s.local), own = std::sqrt(1 - s.local);
  const at::Tensor z = common * at::randn({pages, 1}, real) + own * at::randn({pages, kPage}, real);
  // A head's keys are normal, but along its direction they are z.
  const at::Tensor direction = unit(at::randn({shape.num_kv_heads, dim}, real));
  for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
    at::Tensor key = set.keys[head].normal_().mul_(own).add_(at::randn({pages, 1, dim}, here), common);
    const at::Tensor u = direction[head].to(dtype);
    key.addcmul_((z.to(dtype) - at::matmul(key, u)).unsqueeze(-1), u);
  }
  const at::Tensor along = direction.view({1, shape.num_kv_heads, 1, dim});
  at::Tensor across = at::randn({batch, shape.num_kv_heads, group, dim}, real);
  across = unit(across - (across * along).sum(-1, true) * along);
  set.query = (s.sigma * std::sqrt(static_cast<double>(dim)) *
               (std::sqrt(s.shared) * along + std::sqrt(1 - s.shared) * across))
                  .view({batch, shape.num_heads, dim})
                  .to(dtype);
  set.page_table = at::randperm(pages, real.dtype(at::kLong)).to(at::kInt).view({batch, blocks});
  set.lengths = at::full({batch}, length, real.dtype(at::kInt));
  set.slots = set.page_table.select(1, blocks - 1).to(at::kLong) * kPage + kPage - 1;

  // Keys (z' + 4) v + noise, all four queries tau / 128 v: scores are tau z' + const, the best estimate of
  // the log weight.
  const at::Tensor v = at::randn({kSelectorDim}, real);
  const at::Tensor seen =
      s.fidelity * z.flatten() + std::sqrt(1 - s.fidelity * s.fidelity) * at::randn({pages * kPage}, real);
  set.selector_query = (v * (s.sigma * std::sqrt(s.shared) * s.fidelity / v.dot(v).item<double>()))
                           .expand({batch, kSelectorHeads, kSelectorDim})
                           .to(dtype)
                           .contiguous();
  set.selector_weight = at::full({batch, 1, kSelectorHeads}, 1.0 / kSelectorHeads, real);
  for (int kind = 0; kind < 2; ++kind) {
    const int64_t key_heads = kind == 0 ? 1 : kSelectorHeads;
    at::Tensor& pool = set.selector_keys[kind];
    pool = at::zeros({pages, key_heads, kernels::page_head_bytes(KeyFormat::int4)}, real.dtype(at::kByte));
    const int64_t step = int64_t{1} << 18;  // tokens
    for (int64_t first = 0; first < pages * kPage; first += step) {
      const int64_t count = std::min(step, pages * kPage - first);
      const at::Tensor keys = ((seen.narrow(0, first, count) + 4).view({count, 1, 1}) * v +
                               at::randn({count, key_heads, kSelectorDim}, real))
                                  .to(dtype);
      ops::selector_key_append(
          {pool, at::arange(first, first + count, real.dtype(at::kLong)), keys, KeyFormat::int4});
    }
    set.new_keys[kind] = ((seen.index_select(0, set.slots) + 4).view({batch, 1, 1}) * v)
                             .expand({batch, key_heads, kSelectorDim})
                             .to(dtype)
                             .contiguous();
  }
  set.summarize_keys();
  return set;
}

std::vector<DecodeSet> make_sets(const DecodeShape& shape, int64_t length, int64_t batch, int64_t count,
                                 const AttentionStatistics& statistics, at::ScalarType dtype,
                                 at::Device device, uint64_t seed) {
  if (length < kPage || length % kPage != 0)
    fail("a length of {} tokens: give a positive multiple of {}", length, kPage);
  at::manual_seed(seed);
  std::vector<DecodeSet> sets;
  for (int64_t i = 0; i < count; ++i)
    sets.push_back(make_set(shape, length, batch, statistics, dtype, device));
  return sets;
}

}  // namespace

const std::vector<DecodeShape>& decode_shapes() {
  static const std::vector<DecodeShape> shapes = {{"qwen3-4b", 32, 8, 128},
                                                  {"qwen3-8b", 32, 8, 128},
                                                  {"qwen3-14b", 40, 8, 128},
                                                  {"qwen3-32b", 64, 8, 128},
                                                  {"qwen3.5-9b", 16, 4, 256}};
  return shapes;
}

void DecodeSet::summarize_keys() {
  const int64_t heads = keys.size(0), slots_held = keys.size(1) * kPage, dim = keys.size(3);
  bounds = at::zeros({heads, keys.size(1), 2, dim}, keys.options());
  codes = at::zeros({heads, slots_held, dim / 2}, keys.options().dtype(at::kByte));
  ranges = at::zeros({heads, slots_held, 2}, keys.options().dtype(at::kHalf));
  ops::key_summary_append(
      {bounds, codes, ranges, keys, at::arange(slots_held, keys.options().dtype(at::kLong))});
}

DecodeScene::DecodeScene(const DecodeShape& shape, int64_t length, int64_t batch, int64_t sets,
                         const AttentionStatistics& statistics, at::ScalarType dtype, at::Device device,
                         uint64_t seed)
    : DecodeScene(shape, length, batch,
                  make_sets(shape, length, batch, sets, statistics, dtype, device, seed)) {}

DecodeScene::DecodeScene(const DecodeShape& shape, int64_t length, int64_t batch, std::vector<DecodeSet> sets,
                         const SelectionRule& tiers)
    : shape_(shape), length_(length), batch_(batch), sets_(std::move(sets)), tiers_(tiers) {
  for (const DecodeSet& s : sets_) {
    at::Tensor& of_set = probabilities_.emplace_back(
        at::empty({batch, shape.num_heads, length}, s.keys.options().dtype(at::kFloat)));
    for (int64_t row = 0; row < batch; ++row) {
      const at::Tensor keys =
          s.keys.index_select(1, s.page_table[row].to(at::kLong)).flatten(1, 2);  // [Hkv, L, d]
      const at::Tensor query = s.query[row].view({shape.num_kv_heads, -1, shape.head_dim});
      of_set[row].copy_(
          at::softmax(at::matmul(query, keys.transpose(1, 2)).to(at::kFloat) * scale(), -1).flatten(0, 1));
    }
  }
}

int64_t DecodeScene::set_bytes(const DecodeShape& shape, int64_t length, int64_t batch,
                               at::ScalarType dtype) {
  const int64_t number = static_cast<int64_t>(c10::elementSize(dtype)), heads = shape.num_kv_heads,
                dim = shape.head_dim;
  const int64_t token = 2 * heads * dim * number + 2 * heads * dim * number / kPage + heads * (dim / 2 + 4) +
                        5 * 72 + 4 + 4 * shape.num_heads;
  return token * length * batch;
}

double DecodeScene::scale() const {
  return 1 / std::sqrt(static_cast<double>(shape_.head_dim));
}

double DecodeScene::covered_mass(const at::Tensor& tokens, int64_t set) const {
  const int64_t groups = tokens.size(-2);
  const at::Tensor chosen = tokens.expand({batch_, groups, length_}).to(at::kFloat).unsqueeze(3);
  return at::matmul(probabilities_[static_cast<size_t>(set)].view({batch_, groups, -1, length_}), chosen)
      .mean()
      .item<double>();
}

double DecodeScene::tokens_holding(double mass, int64_t set) const {
  double sum = 0;
  for (int64_t row = 0; row < batch_; ++row) {
    const at::Tensor best =
        std::get<0>(probabilities_[static_cast<size_t>(set)][row].sort(-1, true)).cumsum(-1);
    sum += (best < mass).sum(-1).add(1).to(at::kDouble).mean().item<double>();
  }
  return sum / static_cast<double>(batch_ * length_);
}

}  // namespace spot
