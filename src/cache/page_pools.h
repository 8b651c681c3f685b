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

// A pool of tokens [heads, num_pages, page_size, dim], and what it is read by.
struct TokenPool {
  at::Tensor stored;  // numbers of `dtype`, or float8_e4m3fn codes
  // [heads] float32, powers of two: a head's codes times this are its tokens. Undefined: numbers.
  at::Tensor scale;
  at::ScalarType dtype = at::kFloat;  // of tokens read

  TokenPool() = default;
  // Of numbers. Implicit: a plain tensor is such a pool.
  TokenPool(const at::Tensor& numbers) : stored(numbers), dtype(numbers.scalar_type()) {}
  TokenPool(at::Tensor codes, at::Tensor scale, at::ScalarType dtype)
      : stored(std::move(codes)), scale(std::move(scale)), dtype(dtype) {}

  bool has_codes() const { return scale.defined(); }
  // Some of `stored` (heads first) as numbers of `dtype`: itself where it is.
  at::Tensor numbers(const at::Tensor& part) const;
};

class PagePools {
 public:
  // Throws Error when num_pages or page_size is not positive.
  PagePools(int64_t num_pages, int64_t page_size, at::Device device);

  // Declares a pool, zeroed: kernels may read whole pages and multiply what lies past a sequence's end by
  // zero, which a NaN would survive. Two owners may use one name for one layer; each has its own pool then.
  at::Tensor add(const std::string& name, int64_t layer, const PageShape& shape, at::ScalarType dtype);
  // Declares a pool of float8_e4m3fn for tokens of `dtype`, shape {{heads}, {page_size, dim}}; `scale` as in TokenPool.
  void add_codes(const std::string& name, int64_t layer, const PageShape& shape, const at::Tensor& scale,
                 at::ScalarType dtype);
  // The pool of a name in a layer. Throws Error when there is none, or more than one.
  const at::Tensor& get(const std::string& name, int64_t layer) const;
  // The same to read tokens of.
  TokenPool tokens(const std::string& name, int64_t layer) const;
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
    at::Tensor tensor, scale;
    at::ScalarType dtype;
  };
  const Pool* find(const std::string& name, int64_t layer) const;
  const Pool& required(const std::string& name, int64_t layer) const;

  int64_t num_pages_, page_size_;
  at::Device device_;
  std::vector<Pool> pools_;
  std::map<std::pair<int64_t, std::string>, std::vector<size_t>> by_layer_;  // positions in pools_
};

// Whole pages [count] int32 or int64 of a pool, in order: numbers [heads, count, page_size, dim]. A copy.
at::Tensor gather_pages(const TokenPool& pool, const at::Tensor& pages);
// The first `length` tokens of a pool as [heads, length, dim]. `pages`: page ids [at least as many as needed] int32 or
// int64 on the pool's device. A copy.
at::Tensor gather_tokens(const TokenPool& pool, const at::Tensor& pages, int64_t length);
// The same when the pages are consecutive from `first_page`: a view, of codes a copy.
at::Tensor view_tokens(const TokenPool& pool, int64_t first_page, int64_t length);
// Writes rows [T, heads, dim] at slots [T] int64 (page * page_size + offset) of a pool, converted to its dtype; as codes
// they saturate (ops/e4m3.h). Rows whose slot is negative are left out.
void write_tokens(const TokenPool& pool, const at::Tensor& slots, const at::Tensor& rows);

// A layer's keys and values in the cache.
struct KvPools {
  TokenPool keys, values;
};
// The pools "keys" and "values" of a layer.
KvPools kv_pools(const PagePools& pools, int64_t layer);
// Writes new tokens, [T, heads, dim] each.
void write_tokens(const KvPools& pools, const at::Tensor& slots, const at::Tensor& key,
                  const at::Tensor& value);

}  // namespace spot
