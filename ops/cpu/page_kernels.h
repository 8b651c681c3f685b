// Vector loops over one page of 16 tokens, compiled for several instruction sets and chosen at run time.
#pragma once

#include <cstdint>

#include "kernels/key_format.h"

namespace spot::ops::cpu {

using kernels::kPageTokens;

// Rows of every operand are `stride` floats apart, a multiple of 16, zero-padded past the true width.
struct PageKernels {
  const char* name;  // "avx512", "avx2" or "generic"
  // out[h * 16 + j] = scale * query[h] . page[j] for heads h and tokens j < tokens; the other outputs are not
  // written.
  void (*dots)(const float* query, int heads, const float* page, int tokens, int stride, float scale,
               float* out);
  // sums[h] += sum_j weights[h * 16 + j] * page[j] over j < tokens.
  void (*accumulate)(const float* weights, int heads, const float* page, int tokens, int stride, float* sums);
  // Replaces x[0 .. count) by exp(x - max) and returns the sum. exp is within 2 units in the last place; -inf
  // gives 0. A NaN anywhere gives NaN.
  float (*exponentials)(float* x, int64_t count, float max);
  void (*from_bfloat16)(const uint16_t* source, float* target, int64_t count);
  // E4M3 codes, exactly; both codes of all ones are NaN.
  void (*from_e4m3)(const uint8_t* source, float* target, int64_t count);
};

// The widest set this processor has.
const PageKernels& page_kernels();
// Every set this processor has, for tests.
const PageKernels* const* all_page_kernels(int* count);

}  // namespace spot::ops::cpu
