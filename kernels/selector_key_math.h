// What turns a projected selector key into the numbers that are stored: norm, then RoPE. One order of
// operations, shared by the device kernel (selector_key_append.h) and the host function below, so that both
// give equal bits.
#pragma once

#include <cstdint>

#include "kernels/key_format.h"

namespace spot::kernels {

// On the selector's keys, before RoPE.
enum class KeyNorm : int32_t { none = 0, layernorm = 1, rmsnorm = 2 };

inline constexpr int kRotaryDims = 64;   // the first 64 dims are rotated, half-split: dim i with dim i + 32
inline constexpr int kRotaryPairs = 32;  // so cos and sin tables are [positions, 32] float32

// Sums run over 32 lanes of 4 dims each, by exchanging halves. Lane = 4 step + t holds dims 16 step + 2t +
// {0, 1, 8, 9}: what one lane of the append kernel packs.
SPOT_HOST_DEVICE constexpr int lane_dim(int lane, int i) {
  return lane / 4 * 16 + lane % 4 * 2 + (i & 1) + (i >> 1) * 8;
}

// One lane's share of a sum and of a sum of squares.
SPOT_HOST_DEVICE float sum4(const float (&x)[4]) {
  return add_rn(add_rn(add_rn(x[0], x[1]), x[2]), x[3]);
}
SPOT_HOST_DEVICE float square_sum4(const float (&x)[4]) {
  return fma_rn(x[3], x[3], fma_rn(x[2], x[2], fma_rn(x[1], x[1], mul_rn(x[0], x[0]))));
}
SPOT_HOST_DEVICE float mean_of_sum(float sum) {
  return mul_rn(sum, 1.0f / kKeyDim);
}
SPOT_HOST_DEVICE float reciprocal_deviation(float square_sum, float epsilon) {
  return div_rn(1.0f, sqrt_rn(add_rn(mean_of_sum(square_sum), epsilon)));
}
SPOT_HOST_DEVICE float normalized(float x, float reciprocal, float weight, float bias) {
  return fma_rn(mul_rn(x, reciprocal), weight, bias);
}
// Rotation of (x, y) = dims (i, i + 32).
SPOT_HOST_DEVICE float rotated_lower(float x, float y, float c, float s) {
  return fma_rn(x, c, -mul_rn(y, s));
}
SPOT_HOST_DEVICE float rotated_upper(float x, float y, float c, float s) {
  return fma_rn(y, c, mul_rn(x, s));
}

// Host: key x[128] of one head to y[128]. weight and bias [128] may be null (1 and 0); cos and sin are the 32
// numbers of the token's position, or null for no rotation.
inline void prepare_selector_key(const float* x, KeyNorm norm, const float* weight, const float* bias,
                                 float epsilon, const float* cos, const float* sin, float* y) {
  float lanes[32][4];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane][i] = x[lane_dim(lane, i)];
  const auto reduce = [](float(&v)[32]) {
    for (int offset = 16; offset > 0; offset /= 2) {
      float next[32];
      for (int lane = 0; lane < 32; ++lane) next[lane] = add_rn(v[lane], v[lane ^ offset]);
      for (int lane = 0; lane < 32; ++lane) v[lane] = next[lane];
    }
    return v[0];
  };
  float partial[32];
  if (norm != KeyNorm::none) {
    if (norm == KeyNorm::layernorm) {
      for (int lane = 0; lane < 32; ++lane) partial[lane] = sum4(lanes[lane]);
      const float mean = mean_of_sum(reduce(partial));
      for (auto& lane : lanes)
        for (float& v : lane) v = sub_rn(v, mean);
    }
    for (int lane = 0; lane < 32; ++lane) partial[lane] = square_sum4(lanes[lane]);
    const float reciprocal = reciprocal_deviation(reduce(partial), epsilon);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int dim = lane_dim(lane, i);
        lanes[lane][i] = normalized(lanes[lane][i], reciprocal, weight != nullptr ? weight[dim] : 1.0f,
                                    bias != nullptr ? bias[dim] : 0.0f);
      }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) y[lane_dim(lane, i)] = lanes[lane][i];
  if (cos == nullptr) return;
  for (int i = 0; i < kRotaryPairs; ++i) {
    const float lower = y[i], upper = y[i + kRotaryPairs];
    y[i] = rotated_lower(lower, upper, cos[i], sin[i]);
    y[i + kRotaryPairs] = rotated_upper(lower, upper, cos[i], sin[i]);
  }
}

}  // namespace spot::kernels
