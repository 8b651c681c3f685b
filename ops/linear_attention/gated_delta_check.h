// What the parts of the gated delta rule demand of their arguments; all throw c10::Error.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "ops/linear_attention/gated_delta.h"

namespace spot::ops {

struct GatedDeltaShape {
  int64_t num_key_heads, num_value_heads, key_head_dim, value_head_dim;
};

// "[2, 3] Float".
std::string shape_text(const at::Tensor& t);
// Size -1 stands for any, no dtype for any floating one.
void expect(const at::Tensor& t, at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
            const char* name);
void expect_sequences(const at::Tensor& state_slots, int64_t num_sequences);
// Checks the lengths against the tokens; returns their number.
int64_t expect_lengths(at::IntArrayRef query_lengths, int64_t num_tokens);
bool all_ones(at::IntArrayRef query_lengths);
// The heads follow from the weights and the state pool; everything else is checked against them.
GatedDeltaShape expect_layer(const GatedDeltaLayer& layer, int64_t num_sequences);

}  // namespace spot::ops
