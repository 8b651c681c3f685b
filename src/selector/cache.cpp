#include "selector/cache.h"

#include "core/error.h"

namespace spot {

SelectorCache::SelectorCache(const SelectorConfig& config, const std::vector<int64_t>& layers,
                             PagePools& pools, KeyFormat format)
    : format_(format), key_heads_(config.key_heads), page_bytes_(kernels::page_head_bytes(format)) {
  if (format == KeyFormat::f32 && !pools.device().is_cpu())
    fail("selector cache format f32 exists on the CPU only; use bf16 on {}", pools.device().str());
  for (int64_t layer : layers)
    pools_[layer] = pools.add("selector_keys", layer, {{}, {key_heads_, page_bytes_}}, at::kByte);
}

at::Tensor SelectorCache::pool(int64_t layer) const {
  auto found = pools_.find(layer);
  if (found == pools_.end()) fail("the selector cache holds no keys of layer {}", layer);
  return found->second;
}

void SelectorCache::append(int64_t layer, const at::Tensor& slots, const at::Tensor& key) {
  ops::selector_key_append({pool(layer), slots, key, format_, global_scale()});
}

void SelectorCache::append(int64_t layer, const at::Tensor& slots, const at::Tensor& projected,
                           const ops::KeyPreparation& preparation) {
  ops::selector_key_append({pool(layer), slots, projected, format_, global_scale(), preparation});
}

at::Tensor SelectorCache::gather(int64_t layer, const at::Tensor& page_table, int64_t length) const {
  return ops::selector_key_gather({pool(layer), page_table, length, format_, global_scale()});
}

double SelectorCache::bytes_per_token() const {
  return static_cast<double>(page_bytes_ * key_heads_) / static_cast<double>(kBlockSize);
}

}  // namespace spot
