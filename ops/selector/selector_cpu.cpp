// Writing selector keys and scoring blocks with them, on the CPU.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/selector_key_math.h"
#include "ops/cpu/int4_scores.h"
#include "ops/cpu/page_kernels.h"
#include "ops/selector/key_pages.h"
#include "ops/selector/selector.h"

namespace spot::ops::cpu {
namespace {

constexpr int kDim = kernels::kKeyDim;
constexpr int kHeads = kernels::kSelectorHeads;

int32_t page_at(const int32_t* table, int64_t block, int64_t num_pages) {
  const int32_t page = table[block];
  TORCH_CHECK(page >= 0 && page < num_pages, "page table entry ", block, " is ", page, ", but the pool has ",
              num_pages, " pages");
  return page;
}

}  // namespace

void selector_key_append(const SelectorKeyAppend& a) {
  const auto& [pool, slots, keys, format, global_scale, preparation] = a;
  const KeyPages pages(format, global_scale);
  const at::Tensor values = keys.to(at::kFloat).contiguous(), where = slots.contiguous();
  const float* value_data = values.const_data_ptr<float>();
  const int64_t* slot_data = where.const_data_ptr<int64_t>();
  uint8_t* pool_data = pool.mutable_data_ptr<uint8_t>();
  const int64_t key_heads = pool.size(1), num_slots = pool.size(0) * kPageTokens;
  auto floats = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; };
  const float *weight = floats(preparation.norm_weight), *bias = floats(preparation.norm_bias);
  const float *cos = floats(preparation.cos), *sin = floats(preparation.sin);
  const at::Tensor rows = cos ? preparation.positions.contiguous() : at::Tensor();
  const int64_t* position = cos ? rows.const_data_ptr<int64_t>() : nullptr;
  const KeyNorm norm = preparation.norm;
  const auto epsilon = static_cast<float>(preparation.norm_eps);
  for (int64_t t = 0; t < where.numel(); ++t) {
    TORCH_CHECK(slot_data[t] < num_slots, "spot::selector_key_append: slot ", slot_data[t],
                " lies outside the pool of ", num_slots, " tokens");
    TORCH_CHECK(!position || (position[t] >= 0 && position[t] < preparation.cos.size(0)),
                "spot::selector_key_append: position ", position ? position[t] : 0,
                " lies outside the rotary tables of ", position ? preparation.cos.size(0) : 0, " positions");
  }
  // Tokens write disjoint bytes, so they may run in any order.
  at::parallel_for(0, where.numel(), 64, [&](int64_t begin, int64_t end) {
    float prepared[kDim];
    for (int64_t t = begin; t < end; ++t) {
      if (slot_data[t] < 0) continue;
      const int64_t page = slot_data[t] / kPageTokens,
                    angle = position ? position[t] * kernels::kRotaryPairs : 0;
      for (int64_t h = 0; h < key_heads; ++h) {
        kernels::prepare_selector_key(value_data + (t * key_heads + h) * kDim, norm, weight, bias, epsilon,
                                      cos ? cos + angle : nullptr, sin ? sin + angle : nullptr, prepared);
        pages.encode(prepared, static_cast<int>(slot_data[t] % kPageTokens),
                     pool_data + (page * key_heads + h) * pages.page_head_bytes());
      }
    }
  });
}

at::Tensor selector_key_gather(const SelectorKeyGather& a) {
  const auto& [pool, page_table, length, format, global_scale] = a;
  const KeyPages pages(format, global_scale);
  const int64_t key_heads = pool.size(1), num_pages = pool.size(0);
  at::Tensor keys = at::empty({length, key_heads, kDim}, pool.options().dtype(at::kFloat));
  const at::Tensor table = page_table.contiguous();
  const int32_t* table_data = table.const_data_ptr<int32_t>();
  const uint8_t* pool_data = pool.const_data_ptr<uint8_t>();
  float* key_data = keys.mutable_data_ptr<float>();
  at::parallel_for(0, (length + kPageTokens - 1) / kPageTokens, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(kPageTokens * kDim);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t page = page_at(table_data, block, num_pages);
      const int tokens = static_cast<int>(std::min<int64_t>(kPageTokens, length - block * kPageTokens));
      for (int64_t h = 0; h < key_heads; ++h) {
        const float* x =
            pages.decode(pool_data + (page * key_heads + h) * pages.page_head_bytes(), tokens, buffer.data());
        for (int j = 0; j < tokens; ++j)
          std::copy_n(x + j * kDim, kDim, key_data + ((block * kPageTokens + j) * key_heads + h) * kDim);
      }
    }
  });
  return keys;
}

at::Tensor score_blocks(const ScoreBlocks& a) {
  const auto& [query, weight, pool, page_table, lengths, format, global_scale, max_blocks] = a;
  const KeyPages pages(format, global_scale);
  const PageKernels& kernels = page_kernels();
  const int64_t rows = query.size(0), groups = weight.size(1), key_heads = pool.size(1),
                num_pages = pool.size(0);
  const int64_t width = max_blocks > 0 ? max_blocks : page_table.size(1);
  const at::Tensor queries = query.to(at::kFloat).contiguous(), weights = weight.contiguous();
  const at::Tensor table = page_table.stride(1) == 1 ? page_table : page_table.contiguous();
  const at::Tensor visible = lengths.contiguous();
  const float* query_data = queries.const_data_ptr<float>();
  const float* weight_data = weights.const_data_ptr<float>();
  const uint8_t* pool_data = pool.const_data_ptr<uint8_t>();
  const int32_t* table_data = table.const_data_ptr<int32_t>();
  const int64_t table_stride = table.stride(0);
  const int32_t* length_data = visible.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK(length_data[row] >= 0 && length_data[row] <= std::min(width, table.size(1)) * kPageTokens,
                "spot::score_blocks: length ", length_data[row], " of row ", row, " exceeds ",
                std::min(width, table.size(1)), " blocks");
  at::Tensor scores =
      at::full({rows, groups, width}, -std::numeric_limits<float>::infinity(), weights.options());
  float* score_data = scores.mutable_data_ptr<float>();

  const bool packed = format == kernels::KeyFormat::int4 && Int4Query::available();
  std::vector<Int4Query> integers;
  for (int64_t row = 0; packed && row < rows; ++row) integers.emplace_back(query_data + row * kHeads * kDim);
  const int64_t page_head_bytes = pages.page_head_bytes();
  constexpr int64_t kRun = 64;  // blocks a work item
  const int64_t runs = (width + kRun - 1) / kRun;
  at::parallel_for(0, rows * runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(kPageTokens * kDim), dots(kHeads * kPageTokens);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / runs, length = length_data[row];
      const int64_t blocks = (length + kPageTokens - 1) / kPageTokens;
      const int64_t last = std::min(blocks, (item % runs + 1) * kRun);
      const float* q = query_data + row * kHeads * kDim;
      for (int64_t block = item % runs * kRun; block < last; ++block) {
        const int64_t page = page_at(table_data + row * table_stride, block, num_pages);
        const int tokens = static_cast<int>(std::min<int64_t>(kPageTokens, length - block * kPageTokens));
        if (packed && integers[row].is_finite()) {
          const uint8_t* first = pool_data + page * key_heads * page_head_bytes;
          const int64_t next = key_heads == 1 ? 0 : page_head_bytes;
          const uint8_t* const heads[] = {first, first + next, first + 2 * next, first + 3 * next};
          integers[row].block_scores(heads, key_heads == 1, tokens, weight_data + row * groups * kHeads,
                                     static_cast<int>(groups), score_data + row * groups * width + block,
                                     width);
          continue;
        }
        for (int64_t h = 0; h < key_heads; ++h) {
          const float* x = pages.decode(pool_data + (page * key_heads + h) * pages.page_head_bytes(), tokens,
                                        buffer.data());
          const int heads = key_heads == 1 ? kHeads : 1;
          kernels.dots(q + h * kDim, heads, x, tokens, kDim, 1.0f, dots.data() + h * kPageTokens);
        }
        for (int64_t g = 0; g < groups; ++g) {
          const float* w = weight_data + (row * groups + g) * kHeads;
          float best = -std::numeric_limits<float>::infinity();
          for (int j = 0; j < tokens; ++j) {
            float score = 0.0f;
            for (int h = 0; h < kHeads; ++h) {
              const float dot = dots[h * kPageTokens + j];
              score += w[h] * (dot > 0.0f ? dot : dot <= 0.0f ? 0.0f : dot);  // a NaN stays one
            }
            best = score > best ? score : best;
          }
          score_data[(row * groups + g) * width + block] = best;
        }
      }
    }
  });
  return scores;
}

}  // namespace spot::ops::cpu
