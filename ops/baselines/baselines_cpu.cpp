// Quest's and Twilight's stages in plain loops: one work item is a row and a KV head, so that neither thread count
// nor batch changes a result.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/select_rules.h"
#include "ops/baselines/baselines.h"
#include "ops/cpu/page_kernels.h"

namespace spot::ops::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows of a batch with their page tables (undefined where no page is looked up) and lists.
struct Rows {
  at::Tensor table, lengths, indices, counts;
  int64_t kv_heads = 0, width = 0;  // of the lists
  Rows(const at::Tensor& page_table, const at::Tensor& lengths_)
      : table(page_table.defined() ? page_table.contiguous() : page_table), lengths(lengths_.contiguous()) {}
  Rows(const at::Tensor& page_table, const at::Tensor& lengths_, const at::Tensor& indices_,
       const at::Tensor& counts_)
      : Rows(page_table, lengths_) {
    indices = indices_.contiguous();
    counts = counts_.contiguous();
    kv_heads = indices.size(1);
    width = indices.size(2);
  }
  int64_t length(int64_t row) const { return lengths.const_data_ptr<int32_t>()[row]; }
  int64_t page(int64_t row, int64_t block, int64_t num_pages, const char* op) const {
    TORCH_CHECK(block >= 0 && block < table.size(1), op, ": row ", row, " names block ", block,
                ", but its table has ", table.size(1), " pages");
    const int64_t page = table.const_data_ptr<int32_t>()[row * table.size(1) + block];
    TORCH_CHECK(page >= 0 && page < num_pages, op, ": page table entry ", block, " of row ", row, " is ",
                page, ", but the pools have ", num_pages, " pages");
    return page;
  }
  const int32_t* list(int64_t item) const { return indices.const_data_ptr<int32_t>() + item * width; }
  int64_t count(int64_t item, const char* op) const {
    const int64_t count = counts.const_data_ptr<int32_t>()[item];
    TORCH_CHECK(count >= 0 && count <= width, op, ": count ", count, " exceeds ", width, " indices");
    return count;
  }
};

// The largest threshold t >= 1 for which the masses >= t hold `target`.
uint32_t mass_threshold(std::vector<uint32_t> masses, uint64_t target) {
  std::sort(masses.begin(), masses.end(), std::greater<>());
  uint64_t sum = 0;
  for (uint32_t mass : masses)
    if ((sum += mass) >= target) return std::max(mass, 1u);
  return 1;
}

}  // namespace

void key_summary_append(const KeySummaryAppend& a) {
  const auto& [bounds, codes, ranges, key_pool, slots] = a;
  const int64_t heads = key_pool.size(0), pages = key_pool.size(1), dim = key_pool.size(3),
                tokens = slots.numel();
  const at::Tensor where = slots.contiguous();
  const int64_t* slot = where.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < tokens; ++t)
    TORCH_CHECK(slot[t] < pages * kPageTokens, "spot::key_summary_append: slot ", slot[t], " of token ", t,
                " is outside the pool's ", pages * kPageTokens);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, key_pool.scalar_type(), "key_summary_append", [&] {
        const at::Tensor& keys = a.key_pool;
        auto key_of = [&](int64_t head, int64_t at) {
          return keys.const_data_ptr<scalar_t>() + head * keys.stride(0) + at / kPageTokens * keys.stride(1) +
                 at % kPageTokens * keys.stride(2);
        };
        at::parallel_for(0, tokens * heads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t t = item / heads, head = item % heads, page = slot[t] / kPageTokens,
                          offset = slot[t] % kPageTokens;
            if (slot[t] < 0) continue;
            // The last new token of a page has its bounds.
            if (offset == kPageTokens - 1 || t + 1 == tokens || slot[t + 1] != slot[t] + 1) {
              scalar_t* low = bounds.mutable_data_ptr<scalar_t>() + (head * pages + page) * 2 * dim;
              scalar_t* high = low + dim;
              std::copy_n(key_of(head, page * kPageTokens), dim, low);
              std::copy_n(low, dim, high);
              for (int64_t row = 1; row <= offset; ++row) {
                const scalar_t* key = key_of(head, page * kPageTokens + row);
                for (int64_t i = 0; i < dim; ++i)
                  low[i] = std::min(low[i], key[i]), high[i] = std::max(high[i], key[i]);
              }
            }
            if (!codes.defined()) continue;
            const scalar_t* key = key_of(head, slot[t]);
            float low = static_cast<float>(key[0]), high = low;
            for (int64_t i = 1; i < dim; ++i) {
              low = std::min(low, static_cast<float>(key[i]));
              high = std::max(high, static_cast<float>(key[i]));
            }
            const int64_t row = head * pages * kPageTokens + slot[t];
            c10::Half* range = ranges.mutable_data_ptr<c10::Half>() + row * 2;
            range[0] = static_cast<c10::Half>((high - low) / 15.0f);
            range[1] = static_cast<c10::Half>(low);
            const float scale = range[0], minimum = range[1];
            uint8_t* out = codes.mutable_data_ptr<uint8_t>() + row * (dim / 2);
            auto code = [&](int64_t i) {
              if (!(scale > 0)) return 0;
              return static_cast<int>(
                  std::clamp(std::nearbyint((static_cast<float>(key[i]) - minimum) / scale), 0.0f, 15.0f));
            };
            for (int64_t i = 0; i < dim / 2; ++i)
              out[i] = static_cast<uint8_t>(code(2 * i) | code(2 * i + 1) << 4);
          }
        });
      });
}

at::Tensor quest_score(const QuestScore& a) {
  const auto& [query, bounds, page_table, lengths, scale, per_kv_head] = a;
  const bool mean = !per_kv_head;  // of each KV head's query heads, then of the KV heads
  const Rows rows(page_table, lengths);
  const int64_t kv_heads = bounds.size(0), pages = bounds.size(1), dim = bounds.size(3),
                width = page_table.size(1);
  const int64_t group = query.size(1) / kv_heads;
  const at::Tensor queries = query.to(at::kFloat).contiguous();
  at::Tensor scores = at::full({query.size(0), kv_heads, width}, kMinusInfinity, queries.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, bounds.scalar_type(), "quest_score", [&] {
    at::parallel_for(0, query.size(0) * kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> low(dim), high(dim);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / kv_heads, head = item % kv_heads;
        const float* q = queries.const_data_ptr<float>() + (row * query.size(1) + head * group) * dim;
        float* out = scores.mutable_data_ptr<float>() + item * width;
        const int64_t blocks = std::min<int64_t>(width, (rows.length(row) + kPageTokens - 1) / kPageTokens);
        for (int64_t b = 0; b < blocks; ++b) {
          const scalar_t* bound = bounds.const_data_ptr<scalar_t>() +
                                  (head * pages + rows.page(row, b, pages, "spot::quest_score")) * 2 * dim;
          for (int64_t i = 0; i < dim; ++i)
            low[i] = static_cast<float>(bound[i]), high[i] = static_cast<float>(bound[dim + i]);
          float merged = mean ? 0.0f : kMinusInfinity;
          for (int64_t h = 0; h < group; ++h) {
            float sum = 0;
            for (int64_t i = 0; i < dim; ++i)
              sum += std::max(q[h * dim + i] * low[i], q[h * dim + i] * high[i]);
            merged = mean ? merged + sum / static_cast<float>(group) : std::max(merged, sum);
          }
          out[b] = merged * static_cast<float>(scale);
        }
      }
    });
  });
  return mean ? scores.mean(1, true) : scores;
}

at::Tensor estimate_logits(const EstimateLogits& a) {
  const auto& [query, codes, ranges, page_table, lengths, indices, counts, scale] = a;
  const char* op = "spot::estimate_logits";
  const Rows rows(page_table, lengths, indices, counts);
  const int64_t dim = query.size(2), slots = codes.size(1), group = query.size(1) / rows.kv_heads;
  const int64_t stride = (dim + 15) / 16 * 16, width = rows.width * kPageTokens;
  const at::Tensor queries = at::constant_pad_nd(query.to(at::kFloat), {0, stride - dim}).contiguous();
  at::Tensor logits = at::full({query.size(0), query.size(1), width}, kMinusInfinity, queries.options());
  const PageKernels& kernels = page_kernels();
  at::parallel_for(0, query.size(0) * rows.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys(kPageTokens * stride, 0.0f), dots(group * kPageTokens);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / rows.kv_heads, head = item % rows.kv_heads,
                    first_head = row * query.size(1) + head * group;
      for (int64_t entry = 0; entry < rows.count(item, op); ++entry) {
        const int64_t block = rows.list(item)[entry];
        const int tokens =
            static_cast<int>(std::clamp<int64_t>(rows.length(row) - block * kPageTokens, 0, kPageTokens));
        const int64_t first = head * slots + rows.page(row, block, slots / kPageTokens, op) * kPageTokens;
        for (int t = 0; t < tokens; ++t) {
          const uint8_t* code = codes.const_data_ptr<uint8_t>() + (first + t) * (dim / 2);
          const c10::Half* range = ranges.const_data_ptr<c10::Half>() + (first + t) * 2;
          const float step = range[0], minimum = range[1];
          for (int64_t i = 0; i < dim / 2; ++i) {
            keys[t * stride + 2 * i] = static_cast<float>(code[i] & 15) * step + minimum;
            keys[t * stride + 2 * i + 1] = static_cast<float>(code[i] >> 4) * step + minimum;
          }
        }
        kernels.dots(queries.const_data_ptr<float>() + first_head * stride, static_cast<int>(group),
                     keys.data(), tokens, static_cast<int>(stride), static_cast<float>(scale), dots.data());
        for (int64_t h = 0; h < group; ++h)
          std::copy_n(dots.data() + h * kPageTokens, tokens,
                      logits.mutable_data_ptr<float>() + (first_head + h) * width + entry * kPageTokens);
      }
    }
  });
  return logits;
}

PrunedTokens prune_tokens(const PruneTokens& a) {
  const auto& [logits, indices, counts, lengths, p, floor] = a;
  const Rows rows({}, lengths, indices, counts);
  const int64_t width = rows.width * kPageTokens, group = logits.size(1) / rows.kv_heads;
  const at::Tensor values = logits.contiguous();
  PrunedTokens pruned{at::full({logits.size(0), rows.kv_heads, width}, -1, rows.counts.options()),
                      at::empty_like(rows.counts)};
  kernels::SelectionRule rules;
  rules.p = p;
  const uint32_t probability = kernels::fixed_probability(rules);
  const float mass_scale = kernels::mass_scale(rules);
  at::parallel_for(0, logits.size(0) * rows.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / rows.kv_heads, length = rows.length(row);
      const int64_t n = rows.count(item, "spot::prune_tokens") * kPageTokens;
      std::vector<char> kept(n, length <= floor);
      for (int64_t h = 0; h < group && length > floor && n > 0; ++h) {
        const float* logit = values.const_data_ptr<float>() + (item * group + h) * width;
        float largest = kMinusInfinity;
        for (int64_t i = 0; i < n; ++i) largest = std::max(largest, kernels::canonical_score(logit[i]));
        std::vector<uint32_t> masses(n);
        uint64_t total = 0;
        for (int64_t i = 0; i < n; ++i)
          total += masses[i] = kernels::mass_of(kernels::canonical_score(logit[i]), largest, mass_scale);
        const uint32_t threshold = mass_threshold(masses, kernels::mass_target(probability, total));
        for (int64_t i = 0; i < n; ++i) kept[i] |= masses[i] >= threshold;
      }
      int32_t* out = pruned.positions.mutable_data_ptr<int32_t>() + item * width;
      int32_t number = 0;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t token = rows.list(item)[i / kPageTokens] * kPageTokens + i % kPageTokens;
        if (kept[i] && token < length) out[number++] = static_cast<int32_t>(token);
      }
      pruned.counts.mutable_data_ptr<int32_t>()[item] = number;
    }
  });
  return pruned;
}

at::Tensor token_attention(const TokenAttention& a) {
  const auto& [query, key_pool, value_pool, page_table, lengths, positions, counts, scale] = a;
  const char* op = "spot::token_attention";
  const Rows rows(page_table, lengths, positions, counts);
  const int64_t dim = query.size(2), pages = key_pool.size(1), group = query.size(1) / rows.kv_heads;
  const int64_t stride = (dim + 15) / 16 * 16;
  const int heads = static_cast<int>(group), row_stride = static_cast<int>(stride);
  const at::Tensor queries = at::constant_pad_nd(query.to(at::kFloat), {0, stride - dim}).contiguous();
  at::Tensor output = at::empty_like(query, at::MemoryFormat::Contiguous);
  const PageKernels& kernels = page_kernels();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, query.scalar_type(), "token_attention", [&] {
    at::parallel_for(0, query.size(0) * rows.kv_heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(kPageTokens * stride, 0.0f), sums(group * stride),
          weights(group * kPageTokens), scores;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t row = item / rows.kv_heads, head = item % rows.kv_heads, count = rows.count(item, op);
        const int64_t width = (count + kPageTokens - 1) / kPageTokens * kPageTokens;
        const int64_t first_head = row * query.size(1) + head * group;
        // Sixteen list entries at a time, gathered as if they were a page.
        auto gather = [&](const at::Tensor& pool, int64_t first) {
          const int tokens = static_cast<int>(std::min<int64_t>(kPageTokens, count - first));
          for (int t = 0; t < tokens; ++t) {
            const int64_t token = rows.list(item)[first + t];
            TORCH_CHECK(token >= 0 && token < rows.length(row), op, ": row ", row, " names token ", token,
                        " of ", rows.length(row));
            const scalar_t* from = pool.const_data_ptr<scalar_t>() + head * pool.stride(0) +
                                   rows.page(row, token / kPageTokens, pages, op) * pool.stride(1) +
                                   token % kPageTokens * pool.stride(2);
            for (int64_t i = 0; i < dim; ++i) buffer[t * stride + i] = static_cast<float>(from[i]);
          }
          return tokens;
        };
        scores.assign(group * width, kMinusInfinity);
        for (int64_t first = 0; first < count; first += kPageTokens) {
          const int tokens = gather(a.key_pool, first);
          kernels.dots(queries.const_data_ptr<float>() + first_head * stride, heads, buffer.data(), tokens,
                       row_stride, static_cast<float>(scale), weights.data());
          for (int64_t h = 0; h < group; ++h)
            std::copy_n(weights.data() + h * kPageTokens, tokens, scores.data() + h * width + first);
        }
        std::vector<float> normaliser(group, 0.0f);
        for (int64_t h = 0; h < group && width > 0; ++h) {
          float* begin_scores = scores.data() + h * width;
          normaliser[h] = kernels.exponentials(begin_scores, width,
                                               *std::max_element(begin_scores, begin_scores + count));
        }
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t first = 0; first < count; first += kPageTokens) {
          const int tokens = gather(a.value_pool, first);
          for (int64_t h = 0; h < group; ++h)
            std::copy_n(scores.data() + h * width + first, tokens, weights.data() + h * kPageTokens);
          kernels.accumulate(weights.data(), heads, buffer.data(), tokens, row_stride, sums.data());
        }
        for (int64_t h = 0; h < group; ++h)
          for (int64_t i = 0; i < dim; ++i)
            output.mutable_data_ptr<scalar_t>()[(first_head + h) * dim + i] =
                static_cast<scalar_t>(count > 0 ? sums[h * stride + i] / normaliser[h] : 0.0f);
      }
    });
  });
  return output;
}

}  // namespace spot::ops::cpu
