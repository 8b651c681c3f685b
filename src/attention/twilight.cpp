#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention/policy.h"
#include "core/error.h"

namespace spot {
namespace {

// Keys [..., head_dim] as 4-bit codes, two a byte, and [..., 2] float16 scale and minimum.
std::pair<at::Tensor, at::Tensor> quantise(const at::Tensor& key) {
  const at::Tensor values = key.to(at::kFloat);
  const at::Tensor low = values.amin(-1, true), high = values.amax(-1, true);
  const at::Tensor range = at::cat({(high - low) / 15, low}, -1).to(at::kHalf);
  // Codes are taken against the rounded scale and minimum, which are what is read back. A scale of zero (all
  // dims equal) gives code 0.
  const at::Tensor scale = range.narrow(-1, 0, 1).to(at::kFloat),
                   minimum = range.narrow(-1, 1, 1).to(at::kFloat);
  const at::Tensor steps = (values - minimum) / at::where(scale > 0, scale, INFINITY);
  const at::Tensor codes = steps.round().clamp(0, 15).to(at::kByte);
  const at::Tensor pairs = codes.unflatten(-1, {-1, 2});
  return {pairs.select(-1, 0).bitwise_or(pairs.select(-1, 1).bitwise_left_shift(4)), range};
}

at::Tensor dequantise(const at::Tensor& codes, const at::Tensor& range) {
  const at::Tensor values =
      at::stack({codes.bitwise_and(15), codes.bitwise_right_shift(4)}, -1).flatten(-2).to(at::kFloat);
  return values * range.narrow(-1, 0, 1).to(at::kFloat) + range.narrow(-1, 1, 1).to(at::kFloat);
}

// Twilight's search: the greatest threshold above which weights [..., n] (rows summing to 1) hold mass p.
// Keeps the weights above it, true where kept. 24 halvings reach float32 resolution of the largest weight.
at::Tensor keep_top_p(const at::Tensor& weights, double p) {
  at::Tensor high = weights.amax(-1, true), low = at::zeros_like(high);
  for (int step = 0; step < 24; ++step) {
    const at::Tensor middle = (low + high) / 2;
    const at::Tensor enough = (weights * (weights > middle)).sum(-1, true) >= p;
    low = at::where(enough, middle, low);
    high = at::where(enough, high, middle);
  }
  return weights > low;
}

}  // namespace

TwilightPolicy::TwilightPolicy(const ModelConfig& model, int64_t num_pages, at::Device device,
                               const SelectionRule& rule, double p)
    : QuestPolicy(model, num_pages, device, rule), p_(p) {
  if (!(p > 0 && p <= 1))
    fail("Twilight prunes to the mass p, which is {}; it must be above 0 and at most 1", p);
  if (model.head_dim % 2 != 0)
    fail("Twilight packs two 4-bit codes a byte, but head_dim is {}; use a model where it is even",
         model.head_dim);
  const int64_t slots = num_pages * kPageSize;
  for (int64_t layer : model.full_attention_layers()) {
    const auto on_device = at::TensorOptions(device);
    codes_[layer] =
        at::zeros({model.num_kv_heads, slots, model.head_dim / 2}, on_device.dtype(at::kByte));
    ranges_[layer] = at::zeros({model.num_kv_heads, slots, 2}, on_device.dtype(at::kHalf));
  }
}

void TwilightPolicy::append(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view) {
  QuestPolicy::append(inputs, cache, view);
  const auto [codes, range] = quantise(inputs.key.transpose(0, 1));
  codes_.at(inputs.layer).index_copy_(1, view.slots, codes);
  ranges_.at(inputs.layer).index_copy_(1, view.slots, range);
}

PolicyState TwilightPolicy::export_pages(const std::vector<int32_t>& pages) const {
  PolicyState state = QuestPolicy::export_pages(pages);
  auto by_page = [&](const at::Tensor& pool) {
    const at::Tensor paged = pool.unflatten(1, {-1, kPageSize});
    return paged.index_select(1, page_index(pages, pool.device())).transpose(0, 1).contiguous();
  };
  for (const auto& [layer, codes] : codes_) {
    state[fmt::format("twilight_codes.{}", layer)] = by_page(codes);
    state[fmt::format("twilight_ranges.{}", layer)] = by_page(ranges_.at(layer));
  }
  return state;
}

void TwilightPolicy::import_pages(const std::vector<int32_t>& pages, const PolicyState& state) {
  QuestPolicy::import_pages(pages, state);
  auto put = [&](at::Tensor& pool, const std::string& name) {
    pool.unflatten(1, {-1, kPageSize})
        .index_copy_(1, page_index(pages, pool.device()), state_tensor(state, name).transpose(0, 1));
  };
  for (auto& [layer, codes] : codes_) {
    put(codes, fmt::format("twilight_codes.{}", layer));
    put(ranges_.at(layer), fmt::format("twilight_ranges.{}", layer));
  }
}

at::Tensor TwilightPolicy::surviving_tokens(const AttentionInputs& inputs, const KvCache& cache,
                                            const QueryChunk& chunk, const Selection& blocks) const {
  const at::Tensor &codes = codes_.at(inputs.layer), &ranges = ranges_.at(inputs.layer);
  const int64_t kv_heads = codes.size(0), group = inputs.query.size(1) / kv_heads, dim = inputs.query.size(2);
  const int64_t length = chunk.start + chunk.count, width = blocks.indices.size(2) * kBlockSize;
  const auto integers = inputs.batch.positions.options();
  // Only blocks that some query chose are read: `used`, ascending.
  const at::Tensor chosen = blocks.indices.clamp_min(0).to(at::kLong);  // padding is masked below
  const at::Tensor used = std::get<0>(at::_unique2(chosen));
  const at::Tensor pages = sequence_pages(cache, inputs.batch.sequences[chunk.sequence],
                                          (length + kBlockSize - 1) / kBlockSize, inputs.query.device())
                               .index_select(0, used);
  const at::Tensor offset = at::arange(kBlockSize, integers);
  const at::Tensor slots = (pages.unsqueeze(1) * kPageSize + offset).flatten();
  const at::Tensor key =
      dequantise(codes.index_select(1, slots), ranges.index_select(1, slots)).transpose(1, 2);
  // Of each chosen token, [count, kv_heads, width]: its place among the read ones, its position, its right.
  const at::Tensor place = (at::searchsorted(used, chosen).unsqueeze(3) * kBlockSize + offset).flatten(2);
  const at::Tensor position = (chosen.unsqueeze(3) * kBlockSize + offset).flatten(2);
  const at::Tensor visible =
      (blocks.indices >= 0).repeat_interleave(kBlockSize, 2).logical_and(
          position <= at::arange(chunk.start, length, integers).view({-1, 1, 1}));

  at::Tensor kept = at::empty_like(visible);
  // In parts, so that the [heads, queries, tokens] products stay small.
  const int64_t numbers = kv_heads * group * (slots.size(0) + width);  // a query
  const int64_t step = std::max<int64_t>(1, (int64_t{1} << 24) / numbers);
  for (int64_t done = 0; done < chunk.count; done += step) {
    const int64_t count = std::min(step, chunk.count - done);
    const at::Tensor query = (inputs.query.narrow(0, chunk.first + done, count).to(at::kFloat) * inputs.scale)
                                 .view({count, kv_heads, group, dim})
                                 .permute({1, 0, 2, 3})
                                 .reshape({kv_heads, count * group, dim});
    const at::Tensor scores =
        at::matmul(query, key)
            .view({kv_heads, count, group, -1})
            .transpose(0, 1)
            .gather(3, place.narrow(0, done, count).unsqueeze(2).expand({-1, -1, group, -1}))
            .masked_fill(visible.narrow(0, done, count).logical_not().unsqueeze(2), -INFINITY);
    kept.narrow(0, done, count).copy_(keep_top_p(at::softmax(scores, -1), p_).any(2));
  }
  const at::Tensor lengths = blocks.lengths.view({-1, 1, 1});
  return at::where(lengths <= rule(inputs.layer).floor, visible, kept);
}

}  // namespace spot
