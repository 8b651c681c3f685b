// Tensors whose rows are pages: keys, values and whatever else is kept of a page's tokens, under one page id.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cache/block_allocator.h"

namespace spot {

// A pool is a tensor [before..., num_pages, after...].
struct PageShape {
  std::vector<int64_t> before, after;
};

class PagePools {
 public:
  // Throws Error when num_pages or page_size is not positive.
  PagePools(int64_t num_pages, int64_t page_size, at::Device device);

  // Declares a pool, zeroed: kernels may read whole pages and multiply what lies past a sequence's end by
  // zero, which a NaN would survive. Two owners may use one name for one layer; each has its own pool then.
  at::Tensor add(const std::string& name, int64_t layer, const PageShape& shape, at::ScalarType dtype);
  // The pool of a name in a layer. Throws Error when there is none, or more than one.
  const at::Tensor& get(const std::string& name, int64_t layer) const;
  bool has(const std::string& name, int64_t layer) const;

  // Copies pages in every pool.
  void copy(const std::vector<PageCopy>& copies);

  int64_t num_pages() const { return num_pages_; }
  int64_t page_size() const { return page_size_; }
  at::Device device() const { return device_; }
  // Bytes of one page in all pools, or in those of one name.
  int64_t page_bytes() const;
  int64_t page_bytes(const std::string& name) const;
  int64_t bytes() const { return page_bytes() * num_pages_; }
  std::vector<std::string> names() const;  // in order of declaration, each once

 private:
  struct Pool {
    std::string name;
    int64_t layer, page_dim;
    at::Tensor tensor;
  };
  const Pool* find(const std::string& name, int64_t layer) const;

  int64_t num_pages_, page_size_;
  at::Device device_;
  std::vector<Pool> pools_;
  std::map<std::pair<int64_t, std::string>, std::vector<size_t>> by_layer_;  // positions in pools_
};

// The first `length` tokens of a paged tensor [heads, num_pages, page_size, dim] as [heads, length, dim].
// `pages`: page ids [at least as many as needed] int32 or int64 on the pool's device. A copy.
at::Tensor gather_tokens(const at::Tensor& pool, const at::Tensor& pages, int64_t length);
// The same when the pages are consecutive from `first_page`: a view.
at::Tensor view_tokens(const at::Tensor& pool, int64_t first_page, int64_t length);
// Writes rows [T, heads, dim] at slots [T] int64 (page * page_size + offset) of such a pool, converted to its
// dtype. Rows whose slot is negative are left out.
void write_tokens(const at::Tensor& pool, const at::Tensor& slots, const at::Tensor& rows);

}  // namespace spot
