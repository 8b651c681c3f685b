// Block scores straight from packed int4 selector keys, in integer arithmetic (x86 with AVX2; AVX-512 VNNI
// gained a seventh more and is not worth a second form).
#pragma once

#include <cstdint>

#include "kernels/key_format.h"

namespace spot::ops::cpu {

// The four query heads of one row, quantised to 15 bits with a scale a group of 32 dims, in the order of the packed
// codes. A dot product differs from the float32 one by at most 2^-15 of sum_g max |q| sum |k| over the groups g.
class Int4Query {
 public:
  // Whether this processor has the instructions.
  static bool available();
  // query: float32 [4, 128]. is_finite() says whether it was finite; if not, the float path must be taken.
  explicit Int4Query(const float* query);
  bool is_finite() const { return finite_; }

  // best[g * stride] = max over j < tokens of sum_h weights[g * 4 + h] * relu(query[h] . key[j]), g < groups; -inf where
  // that is NaN. pages[h] holds query head h's keys: four different page heads, or one four times (shared).
  void block_scores(const uint8_t* const* pages, bool shared, int tokens, const float* weights, int groups,
                    float* best, int64_t stride) const;

  // By half of the 128 dims: bytes as a vector of 64 codes meets them.
  struct alignas(64) Layout {
    int8_t codes[2][kernels::kSelectorHeads][2][2][64];  // lower and upper nibbles; high and low 7 bits
    int32_t bias[2][kernels::kSelectorHeads][16];        // takes the codes' offset of 8 out
    float scales[2][kernels::kSelectorHeads][4];  // of token row 0's two groups, then of row 1's: equal
  };

 private:
  Layout layout_;
  bool finite_ = true;
};

}  // namespace spot::ops::cpu
