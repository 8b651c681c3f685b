#include "cache/page_pools.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"
#include "ops/e4m3.h"

namespace spot {

PagePools::PagePools(int64_t num_pages, int64_t page_size, at::Device device)
    : num_pages_(num_pages), page_size_(page_size), device_(device) {
  if (num_pages < 1 || page_size < 1)
    fail("pools of {} pages of {} tokens were asked for; at least one of each is needed", num_pages,
         page_size);
}

at::Tensor PagePools::add(const std::string& name, int64_t layer, const PageShape& shape,
                          at::ScalarType dtype) {
  std::vector<int64_t> sizes = shape.before;
  sizes.push_back(num_pages_);
  sizes.insert(sizes.end(), shape.after.begin(), shape.after.end());
  const at::Tensor tensor = at::zeros(sizes, at::TensorOptions(device_).dtype(dtype));
  by_layer_[{layer, name}].push_back(pools_.size());
  pools_.push_back({name, layer, static_cast<int64_t>(shape.before.size()), tensor, {}, dtype});
  return tensor;
}

void PagePools::add_codes(const std::string& name, int64_t layer, const PageShape& shape,
                          const at::Tensor& scale, at::ScalarType dtype) {
  if (shape.before.size() != 1 || scale.dim() != 1 || scale.size(0) != shape.before[0])
    fail("{} of layer {}: scales of {} were given for {} heads", name, layer, fmt::join(scale.sizes(), "x"),
         fmt::join(shape.before, "x"));
  add(name, layer, shape, at::kFloat8_e4m3fn);
  pools_.back().scale = scale.to(device_, at::kFloat).contiguous();
  pools_.back().dtype = dtype;
}

const PagePools::Pool* PagePools::find(const std::string& name, int64_t layer) const {
  const auto found = by_layer_.find({layer, name});
  if (found == by_layer_.end()) return nullptr;
  if (found->second.size() > 1)
    fail("layer {} has several pools of '{}' in the cache; ask their owners", layer, name);
  return &pools_[found->second[0]];
}

const PagePools::Pool& PagePools::required(const std::string& name, int64_t layer) const {
  const Pool* pool = find(name, layer);
  if (!pool) fail("layer {} has no {} in the cache", layer, name);
  return *pool;
}

const at::Tensor& PagePools::get(const std::string& name, int64_t layer) const {
  return required(name, layer).tensor;
}

TokenPool PagePools::tokens(const std::string& name, int64_t layer) const {
  const Pool& pool = required(name, layer);
  return {pool.tensor, pool.scale, pool.dtype};
}

bool PagePools::has(const std::string& name, int64_t layer) const {
  return find(name, layer) != nullptr;
}

void PagePools::copy(const std::vector<PageCopy>& copies) {
  for (const PageCopy& copy : copies)
    for (const Pool& pool : pools_)
      pool.tensor.select(pool.page_dim, copy.to).copy_(pool.tensor.select(pool.page_dim, copy.from));
}

int64_t PagePools::page_bytes() const {
  int64_t bytes = 0;
  for (const Pool& pool : pools_) bytes += static_cast<int64_t>(pool.tensor.nbytes()) / num_pages_;
  return bytes;
}

int64_t PagePools::page_bytes(const std::string& name) const {
  int64_t bytes = 0;
  for (const Pool& pool : pools_)
    if (pool.name == name) bytes += static_cast<int64_t>(pool.tensor.nbytes()) / num_pages_;
  return bytes;
}

std::vector<std::string> PagePools::names() const {
  std::vector<std::string> names;
  for (const Pool& pool : pools_)
    if (std::find(names.begin(), names.end(), pool.name) == names.end()) names.push_back(pool.name);
  return names;
}

at::Tensor TokenPool::numbers(const at::Tensor& part) const {
  if (!has_codes()) return part;
  std::vector<int64_t> heads(static_cast<size_t>(part.dim()), 1);
  heads[0] = -1;
  return part.to(dtype).mul_(scale.to(dtype).view(heads));  // exact: by powers of two
}

at::Tensor gather_pages(const TokenPool& pool, const at::Tensor& pages) {
  if (!pool.has_codes()) return pool.stored.index_select(1, pages);
  // As bytes: not every device indexes FP8.
  return pool.numbers(pool.stored.view(at::kByte).index_select(1, pages).view(at::kFloat8_e4m3fn));
}

at::Tensor gather_tokens(const TokenPool& pool, const at::Tensor& pages, int64_t length) {
  const int64_t page_size = pool.stored.size(2), count = (length + page_size - 1) / page_size;
  return gather_pages(pool, pages.narrow(0, 0, count)).flatten(1, 2).narrow(1, 0, length);
}

at::Tensor view_tokens(const TokenPool& pool, int64_t first_page, int64_t length) {
  const at::Tensor& stored = pool.stored;
  const int64_t count = (length + stored.size(2) - 1) / stored.size(2);
  return pool.numbers(stored.narrow(1, first_page, count)
                          .view({stored.size(0), count * stored.size(2), stored.size(3)})
                          .narrow(1, 0, length));
}

void write_tokens(const TokenPool& pool, const at::Tensor& slots, const at::Tensor& rows) {
  const at::Tensor& to = pool.stored;
  if (slots.dim() != 1 || rows.dim() != 3 || rows.size(0) != slots.size(0) || rows.size(1) != to.size(0) ||
      rows.size(2) != to.size(3))
    fail("rows of {} cannot be written to {} slots of a pool of {}", fmt::join(rows.sizes(), "x"),
         slots.numel(), fmt::join(to.sizes(), "x"));
  at::Tensor flat = to.view({to.size(0), to.size(1) * to.size(2), to.size(3)});
  const at::Tensor stored = slots.ge(0).nonzero().squeeze(1);
  at::Tensor kept = rows.index_select(0, stored);
  if (pool.has_codes()) {  // as bytes: not every device indexes FP8
    kept = ops::to_e4m3(kept, pool.scale).view(at::kByte);
    flat = flat.view(at::kByte);
  }
  flat.index_copy_(1, slots.index_select(0, stored), kept.transpose(0, 1).to(flat.scalar_type()));
}

KvPools kv_pools(const PagePools& pools, int64_t layer) {
  return {pools.tokens("keys", layer), pools.tokens("values", layer)};
}

void write_tokens(const KvPools& pools, const at::Tensor& slots, const at::Tensor& key,
                  const at::Tensor& value) {
  write_tokens(pools.keys, slots, key);
  write_tokens(pools.values, slots, value);
}

}  // namespace spot
