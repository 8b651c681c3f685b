// Exact softmax attention over selected pages, on the CPU.
//
// One work item is a row and a KV head: its query heads share every page that is read. Pass 1 writes the
// scores of the selected tokens, pass 2 their exponentials, pass 3 reads the values. Nothing is split over
// threads inside an item, so that the result depends on neither thread count nor batch. The scales of E4M3 codes
// are factors of the scores and of the sums.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "ops/attention/attention.h"
#include "ops/cpu/page_kernels.h"
#include "ops/cpu/page_loader.h"

namespace spot::ops::cpu {
namespace {

struct Shape {
  int64_t rows, num_heads, num_kv_heads, groups, head_dim, num_pages, table_width, most;
};

// Of each KV head, 1 where there is none.
std::vector<float> head_scales(const at::Tensor& scale, int64_t num_kv_heads) {
  if (!scale.defined()) return std::vector<float>(num_kv_heads, 1.0f);
  const at::Tensor each = scale.reshape({-1}).expand({num_kv_heads}).contiguous();
  return {each.const_data_ptr<float>(), each.const_data_ptr<float>() + num_kv_heads};
}

// Indices come from anywhere (Python too): nothing outside the pool may be read.
void check_selection(const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
                     const at::Tensor& counts, int64_t num_pages) {
  const auto table = page_table.accessor<const int32_t, 2>();
  const auto length = lengths.accessor<const int32_t, 1>();
  const auto index = indices.accessor<const int32_t, 3>();
  const auto count = counts.accessor<const int32_t, 2>();
  for (int64_t row = 0; row < counts.size(0); ++row) {
    TORCH_CHECK(length[row] >= 0 && length[row] <= page_table.size(1) * kPageTokens,
                "spot::sparse_decode_attention: row ", row, " has a length of ", length[row],
                "; its page table has room for 0 to ", page_table.size(1) * kPageTokens, " tokens");
    for (int64_t group = 0; group < counts.size(1); ++group) {
      TORCH_CHECK(count[row][group] >= 0 && count[row][group] <= indices.size(2),
                  "spot::sparse_decode_attention: count ", count[row][group], " of row ", row, " exceeds ",
                  indices.size(2), " indices");
      for (int64_t i = 0; i < count[row][group]; ++i) {
        const int64_t block = index[row][group][i];
        TORCH_CHECK(block >= 0 && block < page_table.size(1) && block * kPageTokens < length[row],
                    "spot::sparse_decode_attention: row ", row, " selects block ", block, ", past its ",
                    length[row], " tokens or its ", page_table.size(1), " pages");
        TORCH_CHECK(table[row][block] >= 0 && table[row][block] < num_pages,
                    "spot::sparse_decode_attention: page table entry ", block, " of row ", row, " is ",
                    table[row][block], ", but the pools have ", num_pages, " pages");
      }
    }
  }
}

template <typename scalar_t, typename stored_t>
void attend(const at::Tensor& query, const at::Tensor& key_pool, const at::Tensor& value_pool,
            const at::Tensor& page_table, const at::Tensor& lengths, const at::Tensor& indices,
            const at::Tensor& counts, double scale, const std::vector<float>& key_scales,
            const std::vector<float>& value_scales, at::Tensor& output, const Shape& shape) {
  const PageKernels& kernels = page_kernels();
  const int heads = static_cast<int>(shape.num_heads / shape.num_kv_heads);
  const int head_dim = static_cast<int>(shape.head_dim);
  const int stride = (head_dim + 15) / 16 * 16;
  const auto* query_data = query.const_data_ptr<scalar_t>();
  const auto* key_data = key_pool.const_data_ptr<stored_t>();
  const auto* value_data = value_pool.const_data_ptr<stored_t>();
  auto* output_data = output.mutable_data_ptr<scalar_t>();
  const auto* table_data = page_table.const_data_ptr<int32_t>();
  const int64_t table_stride = page_table.stride(0);
  const auto* length_data = lengths.const_data_ptr<int32_t>();
  const auto* index_data = indices.const_data_ptr<int32_t>();
  const auto* count_data = counts.const_data_ptr<int32_t>();
  const int64_t head_stride = key_pool.stride(0), page_stride = key_pool.stride(1);

  at::parallel_for(0, shape.rows * shape.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    PageLoader<stored_t> loader(head_dim, stride, key_pool.stride(2));
    std::vector<float> queries(heads * stride), sums(heads * stride), scores, weights(heads * kPageTokens);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / shape.num_kv_heads, kv_head = item % shape.num_kv_heads;
      const int64_t set = row * shape.groups + (shape.groups == 1 ? 0 : kv_head);
      const int32_t* blocks = index_data + set * shape.most;
      const int64_t count = count_data[set], length = length_data[row];
      const int32_t* table = table_data + row * table_stride;
      auto tokens_of = [&](int64_t i) {
        return static_cast<int>(std::min<int64_t>(kPageTokens, length - int64_t{blocks[i]} * kPageTokens));
      };
      auto page_of = [&](const stored_t* pool, int64_t i) {
        return pool + kv_head * head_stride + table[blocks[i]] * page_stride;
      };
      const int64_t first_head = row * shape.num_heads + kv_head * heads;
      for (int h = 0; h < heads; ++h)
        for (int c = 0; c < stride; ++c)
          queries[h * stride + c] =
              c < head_dim ? static_cast<float>(query_data[(first_head + h) * head_dim + c]) : 0.0f;

      // scores[h][i * 16 + j]; the tokens that a last, partial page lacks stay -inf and get weight 0.
      const int64_t width = count * kPageTokens;
      scores.assign(heads * width, -std::numeric_limits<float>::infinity());
      for (int64_t i = 0; i < count; ++i) {
        const int tokens = tokens_of(i);
        kernels.dots(queries.data(), heads, loader.load(page_of(key_data, i), tokens), tokens, stride,
                     static_cast<float>(scale) * key_scales[kv_head], weights.data());
        for (int h = 0; h < heads; ++h)
          std::copy_n(weights.data() + h * kPageTokens, tokens, scores.data() + h * width + i * kPageTokens);
      }
      std::vector<float> normaliser(heads, 0.0f);
      for (int h = 0; h < heads && width > 0; ++h) {
        float* begin_scores = scores.data() + h * width;
        float max = -std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < width; ++i) max = begin_scores[i] > max ? begin_scores[i] : max;
        normaliser[h] = kernels.exponentials(begin_scores, width, max);
      }
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t i = 0; i < count; ++i) {
        const int tokens = tokens_of(i);
        for (int h = 0; h < heads; ++h)
          std::copy_n(scores.data() + h * width + i * kPageTokens, tokens, weights.data() + h * kPageTokens);
        kernels.accumulate(weights.data(), heads, loader.load(page_of(value_data, i), tokens), tokens, stride,
                           sums.data());
      }
      for (int h = 0; h < heads; ++h) {
        const float factor = width > 0 ? 1.0f / normaliser[h] * value_scales[kv_head] : 0.0f;
        for (int c = 0; c < head_dim; ++c)
          output_data[(first_head + h) * head_dim + c] = static_cast<scalar_t>(sums[h * stride + c] * factor);
      }
    }
  });
}

}  // namespace

at::Tensor sparse_decode_attention(const SparseDecodeAttention& a) {
  const auto& [query, key_pool, value_pool, page_table, lengths, scale, indices, counts, key_scale,
               value_scale] = a;
  if (!indices.defined()) {
    const int64_t rows = page_table.size(0), width = page_table.size(1);
    const at::Tensor every = at::arange(width, page_table.options()).expand({rows, 1, width});
    const at::Tensor blocks = at::div(lengths + (kPageTokens - 1), kPageTokens, "floor").unsqueeze(1);
    return sparse_decode_attention(
        {query, key_pool, value_pool, page_table, lengths, scale, every, blocks, key_scale, value_scale});
  }
  const Shape shape{query.size(0), query.size(1),    key_pool.size(0),   indices.size(1),
                    query.size(2), key_pool.size(1), page_table.size(1), indices.size(2)};
  check_selection(page_table, lengths, indices, counts, shape.num_pages);
  const at::Tensor contiguous_query = query.contiguous();
  at::Tensor output = at::empty_like(contiguous_query);
  const at::Tensor table =
      page_table.stride(1) == 1 || page_table.size(1) <= 1 ? page_table : page_table.contiguous();
  const std::vector<float> key_scales = head_scales(key_scale, shape.num_kv_heads),
                           value_scales = head_scales(value_scale, shape.num_kv_heads);
  auto run_stored = [&]<typename scalar_t, typename stored_t>(scalar_t, stored_t) {
    attend<scalar_t, stored_t>(contiguous_query, a.key_pool, a.value_pool, table, a.lengths.contiguous(),
                               a.indices.contiguous(), a.counts.contiguous(), a.scale, key_scales,
                               value_scales, output, shape);
  };
  auto run = [&](auto scalar) {
    if (a.key_pool.scalar_type() == at::kFloat8_e4m3fn)
      run_stored(scalar, c10::Float8_e4m3fn());
    else
      run_stored(scalar, scalar);
  };
  if (query.scalar_type() == at::kFloat)
    run(float());
  else if (query.scalar_type() == at::kBFloat16)
    run(c10::BFloat16());
  else
    run(c10::Half());
  return output;
}

}  // namespace spot::ops::cpu
