#include <algorithm>

#include "attention/policy.h"
#include "core/error.h"

namespace spot {

TwilightPolicy::TwilightPolicy(const ModelConfig& model, int64_t num_pages, at::ScalarType dtype,
                               at::Device device, const SelectionRule& rule, double p)
    : QuestPolicy(model, num_pages, dtype, device, rule), p_(p) {
  if (!(p > 0 && p <= 1))
    fail("Twilight prunes to the mass p, which is {}; it must be above 0 and at most 1", p);
  if (model.head_dim % 2 != 0)
    fail("Twilight packs two 4-bit codes a byte, but head_dim is {}; use a model where it is even",
         model.head_dim);
  const int64_t slots = num_pages * kPageSize;
  for (int64_t layer : model.full_attention_layers()) {
    const auto on_device = at::TensorOptions(device);
    codes_[layer] = at::zeros({model.num_kv_heads, slots, model.head_dim / 2}, on_device.dtype(at::kByte));
    ranges_[layer] = at::zeros({model.num_kv_heads, slots, 2}, on_device.dtype(at::kHalf));
  }
}

void TwilightPolicy::append(const AttentionInputs& inputs, const KvCache& cache, const BatchView& view) {
  append_summaries(inputs, cache, view, codes_.at(inputs.layer), ranges_.at(inputs.layer));
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

ops::PrunedTokens TwilightPolicy::surviving_tokens(int64_t layer, const at::Tensor& query,
                                                   const at::Tensor& page_table, const at::Tensor& lengths,
                                                   double scale, const Selection& blocks) const {
  const int64_t rows = query.size(0), width = blocks.indices.size(2) * kBlockSize, floor = rule(layer).floor;
  // In parts, so that the logits of a chunk's queries stay small; a decode step is one.
  const int64_t step =
      std::min(std::max<int64_t>(1, (int64_t{1} << 26) / std::max<int64_t>(1, query.size(1) * width)),
               ops::kMaxAttentionParts / query.size(1));
  std::vector<at::Tensor> positions, counts;
  for (int64_t done = 0; done < rows; done += step) {
    auto part = [&](const at::Tensor& x) { return x.narrow(0, done, std::min(step, rows - done)); };
    const at::Tensor logits =
        ops::estimate_logits({part(query), codes_.at(layer), ranges_.at(layer), part(page_table),
                              part(lengths), part(blocks.indices), part(blocks.counts), scale});
    const ops::PrunedTokens kept =
        ops::prune_tokens({logits, part(blocks.indices), part(blocks.counts), part(lengths), p_, floor});
    positions.push_back(kept.positions);
    counts.push_back(kept.counts);
  }
  if (positions.size() == 1) return {positions[0], counts[0]};
  return {at::cat(positions), at::cat(counts)};
}

}  // namespace spot
