#include "ops/linear_attention/gated_delta_check.h"

#include <algorithm>
#include <string>

namespace spot::ops {

std::string shape_text(const at::Tensor& t) {
  if (!t.defined()) return "an undefined tensor";
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "] " + c10::toString(t.scalar_type());
}

// Size -1 stands for any.
void expect(const at::Tensor& t, at::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
            const char* name) {
  bool fits = t.defined() && t.dim() == static_cast<int64_t>(sizes.size()) &&
              (dtype ? t.scalar_type() == *dtype : at::isFloatingType(t.scalar_type()));
  std::string wanted;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (fits && sizes[i] >= 0) fits = t.size(static_cast<int64_t>(i)) == sizes[i];
    wanted += (i ? ", " : "") + (sizes[i] < 0 ? std::string("any") : std::to_string(sizes[i]));
  }
  if (!fits)
    TORCH_CHECK(false, "gated delta rule: ", name, " is ", shape_text(t), "; it must be [", wanted, "] ",
                dtype ? c10::toString(*dtype) : "of a floating dtype");
}

void expect_sequences(const at::Tensor& state_slots, int64_t num_sequences) {
  expect(state_slots, {num_sequences}, at::kLong, "state_slots");
}

// Checks the lengths against the tokens; returns their number.
int64_t expect_lengths(at::IntArrayRef query_lengths, int64_t num_tokens) {
  int64_t sum = 0;
  for (const int64_t n : query_lengths) {
    TORCH_CHECK(n >= 0, "gated delta rule: a query length is ", n, "; lengths must not be negative");
    sum += n;
  }
  TORCH_CHECK(sum == num_tokens, "gated delta rule: query_lengths sum to ", sum, ", but there are ",
              num_tokens, " tokens; they must agree");
  return static_cast<int64_t>(query_lengths.size());
}

bool all_ones(at::IntArrayRef query_lengths) {
  return std::all_of(query_lengths.begin(), query_lengths.end(), [](int64_t n) { return n == 1; });
}

// The heads follow from the weights and the state pool; everything else is checked against them.
GatedDeltaShape expect_layer(const GatedDeltaLayer& layer, int64_t num_sequences) {
  const auto& [mixed_qkv, z, b, a, w, conv_states, recurrent_states, state_slots] = layer;
  expect(w.conv, {-1, -1}, at::kFloat, "the convolution weight");
  expect(w.decay_rate, {-1}, at::kFloat, "decay_rate");
  expect(w.norm, {-1}, at::kFloat, "the norm weight");
  const int64_t taps = w.conv.size(0), channels = w.conv.size(1);
  GatedDeltaShape s;
  s.num_value_heads = w.decay_rate.size(0);
  s.value_head_dim = w.norm.size(0);
  expect(w.dt_bias, {s.num_value_heads}, at::kFloat, "dt_bias");
  expect(recurrent_states, {-1, s.num_value_heads, -1, s.value_head_dim}, at::kFloat, "recurrent_states");
  s.key_head_dim = recurrent_states.size(2);
  const int64_t key_channels = channels - s.num_value_heads * s.value_head_dim;
  TORCH_CHECK(key_channels > 0 && s.key_head_dim > 0 && key_channels % (2 * s.key_head_dim) == 0 &&
                  s.num_value_heads % (key_channels / (2 * s.key_head_dim)) == 0,
              "gated delta rule: ", channels, " channels do not divide into queries and keys of ",
              s.key_head_dim, " dims and ", s.num_value_heads, " value heads of ", s.value_head_dim,
              "; check the convolution weight ", shape_text(w.conv), " and recurrent_states ",
              shape_text(recurrent_states));
  s.num_key_heads = key_channels / (2 * s.key_head_dim);
  const int64_t tokens = mixed_qkv.defined() && mixed_qkv.dim() == 2 ? mixed_qkv.size(0) : -1;
  expect(mixed_qkv, {-1, channels}, {}, "mixed_qkv");
  if (z.defined() && z.dim() == 3)
    expect(z, {tokens, s.num_value_heads, s.value_head_dim}, mixed_qkv.scalar_type(), "z");
  else
    expect(z, {tokens, s.num_value_heads * s.value_head_dim}, mixed_qkv.scalar_type(), "z");
  expect(b, {tokens, s.num_value_heads}, {}, "b");
  expect(a, {tokens, s.num_value_heads}, {}, "a");
  expect(conv_states, {recurrent_states.size(0), taps - 1, channels}, at::kFloat, "conv_states");
  expect_sequences(state_slots, num_sequences);
  return s;
}

}  // namespace spot::ops
