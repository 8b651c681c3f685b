// Plain float64 references of the kernels, and random paged inputs to feed both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/key_format.h"

namespace spot::kernels::testing {

using Random = std::mt19937;

// Roughly normal numbers (the sum of four uniform ones), quickly: pools hold hundreds of millions.
inline std::vector<float> normal(Random& random, size_t count, float deviation = 1.0f) {
  std::vector<float> values(count);
  uint64_t state = static_cast<uint64_t>(random()) << 32 | random();
  for (float& v : values) {
    state += 0x9e3779b97f4a7c15ull;
    uint64_t x = (state ^ state >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    x ^= x >> 31;
    const uint64_t sum = (x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48);
    v = (static_cast<float>(sum) * (1.0f / 65536.0f) - 2.0f) * 1.7320508f * deviation;
  }
  return values;
}

// ||out - reference|| / ||reference||; infinite when out is not finite.
inline double relative_error(const std::vector<double>& out, const std::vector<double>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    difference += (out[i] - reference[i]) * (out[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  const double error = std::sqrt(difference / std::max(norm, 1e-300));
  return std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
}

// Pages of several sequences, in random order in one pool, tables padded with page 0.
struct PageTable {
  int32_t num_pages = 0, stride = 0;
  std::vector<int32_t> table, lengths;
  PageTable(Random& random, const std::vector<int32_t>& row_lengths, int32_t spare_pages = 3)
      : lengths(row_lengths) {
    for (int32_t length : lengths) {
      const int32_t pages = (length + kPageTokens - 1) / kPageTokens;
      num_pages += pages;
      stride = std::max(stride, pages);
    }
    num_pages += spare_pages;
    stride += 1;
    std::vector<int32_t> order(num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    table.assign(lengths.size() * stride, 0);
    size_t next = 0;
    for (size_t row = 0; row < lengths.size(); ++row)
      for (int32_t page = 0; page * kPageTokens < lengths[row]; ++page)
        table[row * stride + page] = order[next++];
  }
  int32_t page(size_t row, int32_t block) const { return table[row * stride + block]; }
  int32_t max_blocks() const { return stride - 1; }
};

// Selector keys encoded into a pool, and what they decode to: [num_pages * 16, key_heads, 128].
struct KeyPool {
  std::vector<uint8_t> bytes;
  std::vector<float> decoded;
  KeyPool(Random& random, KeyFormat format, int32_t key_heads, int32_t num_pages, float global_scale) {
    bytes.resize(num_pages * page_bytes(format, key_heads));
    decoded.resize(static_cast<size_t>(num_pages) * kPageTokens * key_heads * kKeyDim);
    for (int32_t page = 0; page < num_pages; ++page)
      for (int32_t head = 0; head < key_heads; ++head)
        for (int32_t token = 0; token < kPageTokens; ++token) {
          const std::vector<float> key =
              normal(random, kKeyDim, 0.5f + static_cast<float>(random() % 100) * 0.02f);
          uint8_t* at = bytes.data() + page * page_bytes(format, key_heads) + head * page_head_bytes(format);
          encode_key(format, key.data(), token, at, global_scale);
          decode_key(format, at, token,
                     decoded.data() +
                         ((static_cast<size_t>(page) * kPageTokens + token) * key_heads + head) * kKeyDim,
                     global_scale);
        }
  }
};

// max over the block's visible tokens of sum_h w_h ReLU(q_h . k_h).
inline double block_score_reference(const float* query, const float* weights, const KeyPool& pool,
                                    int32_t key_heads, int32_t page, int32_t visible_tokens) {
  double best = -std::numeric_limits<double>::infinity();
  for (int32_t token = 0; token < std::min(visible_tokens, kPageTokens); ++token) {
    double score = 0;
    for (int32_t head = 0; head < kSelectorHeads; ++head) {
      const float* key =
          pool.decoded.data() +
          ((static_cast<size_t>(page) * kPageTokens + token) * key_heads + (key_heads == 1 ? 0 : head)) *
              kKeyDim;
      double dot = 0;
      for (int32_t dim = 0; dim < kKeyDim; ++dim)
        dot += static_cast<double>(query[head * kKeyDim + dim]) * static_cast<double>(key[dim]);
      score += static_cast<double>(weights[head]) * std::max(dot, 0.0);
    }
    best = std::max(best, score);
  }
  return best;
}

// Softmax attention of one query head over the listed blocks. key(token), value(token) give pointers to
// head_dim floats.
template <typename Key, typename Value>
double attention_reference(const float* query, const Key& key, const Value& value, int32_t head_dim,
                           const std::vector<int32_t>& blocks, int32_t length, double scale, double* out) {
  std::vector<double> logits;
  std::vector<int32_t> tokens;
  for (int32_t block : blocks)
    for (int32_t token = block * kPageTokens; token < std::min(length, (block + 1) * kPageTokens); ++token) {
      double dot = 0;
      const float* k = key(token);
      for (int32_t dim = 0; dim < head_dim; ++dim)
        dot += static_cast<double>(query[dim]) * static_cast<double>(k[dim]);
      logits.push_back(dot * scale);
      tokens.push_back(token);
    }
  std::fill(out, out + head_dim, 0.0);
  if (logits.empty()) return -std::numeric_limits<double>::infinity();
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double& logit : logits) sum += logit = std::exp(logit - largest);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const float* v = value(tokens[i]);
    for (int32_t dim = 0; dim < head_dim; ++dim) out[dim] += logits[i] / sum * static_cast<double>(v[dim]);
  }
  return largest + std::log(sum);
}

}  // namespace spot::kernels::testing
