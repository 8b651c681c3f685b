#include "ops/cpu/int4_scores.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spot::ops::cpu {

using kernels::kKeyDim;
using kernels::kSelectorHeads;

#if defined(__x86_64__)
namespace {

#define SPOT_AVX2 __attribute__((target("avx2")))

// The 64 bytes of codes of tokens t and t + 8 in one half of the dims, by 16 bytes a pair of dims: rows (t, t + 8) lie
// interleaved; this puts row 0 first, so that 4 bytes belong to one row and one scale group.
#define SPOT_BY_ROW 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15

struct Codes {
  __m256i lower[2], upper[2];
};
SPOT_AVX2 inline Codes unpack(const uint8_t* at) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(SPOT_BY_ROW)),
                nibble = _mm256_set1_epi8(15);
  Codes codes;
  for (int i = 0; i < 2; ++i) {
    const __m256i bytes =
        _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * i)), order);
    codes.lower[i] = _mm256_and_si256(bytes, nibble);
    codes.upper[i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  }
  return codes;
}
// 16-bit sums of eight products cannot overflow: 8 * 15 * 127 = 15,240.
SPOT_AVX2 inline __m256i part(const Codes& codes, const int8_t (&query)[2][2][64], int which) {
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 2; ++i) {
    const auto* lower = reinterpret_cast<const __m256i*>(query[0][which] + 32 * i);
    const auto* upper = reinterpret_cast<const __m256i*>(query[1][which] + 32 * i);
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes.lower[i], _mm256_load_si256(lower)));
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes.upper[i], _mm256_load_si256(upper)));
  }
  return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
}
// Codes times query: [row 0 group a, row 0 group b, row 1 group a, row 1 group b].
SPOT_AVX2 inline __m128i products(const Codes& codes, const int8_t (&query)[2][2][64], const int32_t* bias) {
  const auto* offsets = reinterpret_cast<const __m256i*>(bias);
  const __m256i offset = _mm256_add_epi32(_mm256_load_si256(offsets), _mm256_load_si256(offsets + 1));
  const __m256i sum = _mm256_add_epi32(
      _mm256_add_epi32(_mm256_slli_epi32(part(codes, query, 0), 7), part(codes, query, 1)), offset);
  return _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
}
// bf16 scales of tokens t and t + 8, [row][group], as floats of one half's groups: [row 0: 2, row 1: 2].
SPOT_AVX2 inline __m128 key_scales(const uint8_t* at, int half) {
  const __m256 all = _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))), 16));
  const __m128 row0 = _mm256_castps256_ps128(all), row1 = _mm256_extractf128_ps(all, 1);
  return half == 0 ? _mm_shuffle_ps(row0, row1, 0x44) : _mm_shuffle_ps(row0, row1, 0xee);
}

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

template <bool Shared>
SPOT_AVX2 void avx2_block_scores(const Int4Query::Layout& query, const uint8_t* const* pages, int tokens,
                                 const float* weights, int groups, float* best, int64_t stride) {
  constexpr int kHeads = kernels::kSelectorHeads, kHalfBytes = 512;
  constexpr int kScales = kernels::page_code_bytes(kernels::KeyFormat::int4);
  Four dots[kHeads][8];  // by t
  for (int t = 0; t < 8; ++t)
    for (int half = 0; half < 2; ++half) {
      Four key_scale;
      Codes codes;
      for (int h = 0; h < kHeads; ++h) {
        if (h == 0 || !Shared) {
          codes = unpack(pages[h] + half * kHalfBytes + t * 64);
          key_scale = (Four)key_scales(pages[h] + kScales + t * 16, half);
        }
        const __m128i sums = products(codes, query.codes[half][h], query.bias[half][h]);
        const Four scale = *reinterpret_cast<const Four*>(query.scales[half][h]) * key_scale;
        const Four value = (Four)_mm_cvtepi32_ps(sums) * scale;
        dots[h][t] = half == 0 ? value : dots[h][t] + value;
      }
    }
  // The two groups of a token added; four tokens a vector, in the order 0, 8, 1, 9 | 2, 10, ...
  Four relu[4][kHeads];
  for (int i = 0; i < 4; ++i)
    for (int h = 0; h < kHeads; ++h) {
      const __m128 first = (__m128)dots[h][2 * i], second = (__m128)dots[h][2 * i + 1];
      relu[i][h] = (Four)_mm_max_ps(
          _mm_add_ps(_mm_shuffle_ps(first, second, 0x88), _mm_shuffle_ps(first, second, 0xdd)),
          _mm_setzero_ps());
    }
  const Four lowest = Four{} - __builtin_inff();
  for (int g = 0; g < groups; ++g) {
    const float* w = weights + g * kHeads;
    Four most = lowest;
    for (int i = 0; i < 4; ++i) {
      Four score = relu[i][0] * w[0];
      for (int h = 1; h < kHeads; ++h) score += relu[i][h] * w[h];
      const FourInts token = {2 * i, 2 * i + 8, 2 * i + 1, 2 * i + 9};
      most = ((token < tokens) & (score > most)) ? score : most;  // a NaN never wins
    }
    float lanes[4];
    __builtin_memcpy(lanes, &most, sizeof lanes);
    const float a = lanes[0] > lanes[1] ? lanes[0] : lanes[1], b = lanes[2] > lanes[3] ? lanes[2] : lanes[3];
    best[g * stride] = a > b ? a : b;
  }
}

#undef SPOT_BY_ROW

}  // namespace

bool Int4Query::available() {
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") != 0;
  }();
  return found;
}

void Int4Query::block_scores(const uint8_t* const* pages, bool shared, int tokens, const float* weights,
                             int groups, float* best, int64_t stride) const {
  const auto run = shared ? avx2_block_scores<true> : avx2_block_scores<false>;
  run(layout_, pages, tokens, weights, groups, best, stride);
}
#else
bool Int4Query::available() {
  return false;
}

void Int4Query::block_scores(const uint8_t* const*, bool, int, const float*, int, float*, int64_t) const {}
#endif

Int4Query::Int4Query(const float* query) {
  constexpr int kGroup = 32, kLargest = 127 * 128;
  for (int h = 0; h < kSelectorHeads; ++h) {
    int32_t codes[kKeyDim];
    for (int g = 0; g < kKeyDim / kGroup; ++g) {
      const float* x = query + h * kKeyDim + g * kGroup;
      float largest = 0.0f;
      for (int i = 0; i < kGroup; ++i) {
        finite_ = finite_ && std::isfinite(x[i]);
        largest = std::max(largest, std::fabs(x[i]));
      }
      const float scale = largest / kLargest;
      for (int i = 0; i < kGroup; ++i)
        codes[g * kGroup + i] =
            finite_ && scale > 0.0f
                ? std::clamp(static_cast<int>(std::lrint(x[i] / scale)), -kLargest, kLargest)
                : 0;
      layout_.scales[g / 2][h][g % 2] = layout_.scales[g / 2][h][g % 2 + 2] = scale;
    }
    for (int half = 0; half < 2; ++half) {
      int32_t* bias = layout_.bias[half][h];
      std::fill_n(bias, 16, 0);
      // Byte: pair of dims, row, step of 16 dims, odd or even dim (kernels/key_format.h, code_offset, rows first).
      for (int byte = 0; byte < 64; ++byte)
        for (int upper = 0; upper < 2; ++upper) {
          const int pair = byte / 16, step = byte % 8 / 2, odd = byte % 2;
          const int code = codes[half * 64 + step * 16 + upper * 8 + pair * 2 + odd];
          const int high = (code + 64) >> 7;
          layout_.codes[half][h][upper][0][byte] = static_cast<int8_t>(high);
          layout_.codes[half][h][upper][1][byte] = static_cast<int8_t>(code - high * 128);
          bias[byte / 4] -= 8 * code;
        }
    }
  }
}

}  // namespace spot::ops::cpu
