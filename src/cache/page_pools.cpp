#include "cache/page_pools.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "core/error.h"

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
  pools_.push_back({name, layer, static_cast<int64_t>(shape.before.size()), tensor});
  return tensor;
}

const PagePools::Pool* PagePools::find(const std::string& name, int64_t layer) const {
  const auto found = by_layer_.find({layer, name});
  if (found == by_layer_.end()) return nullptr;
  if (found->second.size() > 1)
    fail("layer {} has several pools of '{}' in the cache; ask their owners", layer, name);
  return &pools_[found->second[0]];
}

const at::Tensor& PagePools::get(const std::string& name, int64_t layer) const {
  const Pool* pool = find(name, layer);
  if (!pool) fail("layer {} has no {} in the cache", layer, name);
  return pool->tensor;
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

at::Tensor gather_tokens(const at::Tensor& pool, const at::Tensor& pages, int64_t length) {
  const int64_t count = (length + pool.size(2) - 1) / pool.size(2);
  return pool.index_select(1, pages.narrow(0, 0, count)).flatten(1, 2).narrow(1, 0, length);
}

at::Tensor view_tokens(const at::Tensor& pool, int64_t first_page, int64_t length) {
  const int64_t count = (length + pool.size(2) - 1) / pool.size(2);
  return pool.narrow(1, first_page, count)
      .view({pool.size(0), count * pool.size(2), pool.size(3)})
      .narrow(1, 0, length);
}

void write_tokens(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& rows) {
  if (slots.dim() != 1 || rows.dim() != 3 || rows.size(0) != slots.size(0) || rows.size(1) != pool.size(0) ||
      rows.size(2) != pool.size(3))
    fail("rows of {} cannot be written to {} slots of a pool of {}", fmt::join(rows.sizes(), "x"),
         slots.numel(), fmt::join(pool.sizes(), "x"));
  const at::Tensor flat = pool.view({pool.size(0), pool.size(1) * pool.size(2), pool.size(3)});
  const at::Tensor stored = slots.ge(0).nonzero().squeeze(1);
  flat.index_copy_(1, slots.index_select(0, stored),
                   rows.index_select(0, stored).transpose(0, 1).to(pool.scalar_type()));
}

}  // namespace spot
