// Rotary position embedding, shared by backbones and selectors.
#pragma once

#include <ATen/ATen.h>

#include "checkpoint/config.h"

namespace spot {

// cos and sin, each [positions, rotary_dim / 2] float32, scaled by YaRN's attention factor where the config
// says so. `rotary_dim` overrides the config's (a selector rotates 64 dims with the backbone's theta and
// scaling). Frequencies: default theta^(-2i/dim); linear scaling, YaRN (arXiv 2309.00071) and Llama 3.1's
// scaling as transformers computes them.
struct RopeTable {
  at::Tensor cos, sin;
};
RopeTable rope_table(const RopeConfig& config, int64_t num_positions, at::Device device,
                     int64_t rotary_dim = 0);

// Rotates the first 2 * cos.size(1) dims of x [T, heads, dim], half-split pairing, in float32; the rest
// passes through. positions [T] int64. The result is contiguous, in the dtype of x.
at::Tensor apply_rope(const at::Tensor& x, const at::Tensor& positions, const RopeTable& table);

}  // namespace spot
