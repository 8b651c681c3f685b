#include "model/gated_delta.h"

#include <algorithm>
#include <limits>

namespace spot {
namespace {

constexpr int64_t kChunk = 64;
// Chunks whose products are formed at once: bounds the memory of a long prompt.
constexpr int64_t kChunksAtOnce = 64;

// Tokens start .. start + chunks * length of `inputs`, in equal chunks. Writes their outputs.
//
// With G the running sum of g inside a chunk, the values a chunk adds to the state, D (one row a token),
// solve
//   (I + A) D = beta V - beta e^G K S,   A[i, j] = beta_i e^(G_i - G_j) k_i . k_j for j < i,
// S being the state before the chunk. The right side's two parts are solved before S is known.
void advance(const GatedDeltaInputs& inputs, int64_t start, int64_t chunks, int64_t length, at::Tensor& state,
             at::Tensor& output) {
  // [chunks, heads, length, dim]: chunk by chunk contiguous, heads as the batch of every product.
  const auto chunked = [&](const at::Tensor& x) {
    const at::Tensor part = x.narrow(0, start, chunks * length);
    return part.unflatten(0, {chunks, length}).transpose(1, 2).contiguous();
  };
  const at::Tensor query = chunked(inputs.query), key = chunked(inputs.key), value = chunked(inputs.value);
  const at::Tensor beta = chunked(inputs.beta.unsqueeze(2));
  const at::Tensor decay =
      chunked(inputs.log_decay.unsqueeze(2)).squeeze(3).cumsum(2);  // G [chunks, heads, length]
  const at::Tensor final_decay = decay.narrow(2, length - 1, 1);
  const at::Tensor grown = decay.exp().unsqueeze(3);

  const at::Tensor future = at::ones({length, length}, key.options().dtype(at::kBool)).triu(1);
  const at::Tensor pair_decay = (decay.unsqueeze(3) - decay.unsqueeze(2))
                                    .masked_fill_(future, -std::numeric_limits<float>::infinity())
                                    .exp_();
  const at::Tensor transposed_key = key.transpose(2, 3);
  const at::Tensor attention = at::matmul(query, transposed_key).mul_(pair_decay);
  const at::Tensor weighted_key = key * beta;
  const at::Tensor system = at::matmul(weighted_key, transposed_key).mul_(pair_decay);
  // Solved rather than inverted by powers of A, whose entries explode when keys repeat.
  const at::Tensor solved =
      at::linalg_solve_triangular(system, at::cat({value * beta, weighted_key * grown}, 3),
                                  /*upper=*/false, /*left=*/true, /*unitriangular=*/true);
  const int64_t value_dim = value.size(3), key_dim = key.size(3);
  const at::Tensor new_values = solved.narrow(3, 0, value_dim).contiguous();
  const at::Tensor old_keys = solved.narrow(3, value_dim, key_dim).contiguous();
  const at::Tensor grown_query = query * grown;
  const at::Tensor left_key = (key * (final_decay - decay).exp_().unsqueeze(3)).transpose(2, 3);
  const at::Tensor chunk_decay = final_decay.exp().unsqueeze(3);  // [chunks, heads, 1, 1]

  at::Tensor out = output.narrow(0, start, chunks * length).unflatten(0, {chunks, length});
  at::Tensor current = state;
  for (int64_t i = 0; i < chunks; ++i) {
    const at::Tensor added = at::baddbmm(new_values[i], old_keys[i], current, 1, -1);
    const at::Tensor result = at::baddbmm(at::bmm(grown_query[i], current), attention[i], added);
    out[i].copy_(result.transpose(0, 1));
    current = at::baddbmm(current * chunk_decay[i], left_key[i], added);
  }
  state.copy_(current);
}

}  // namespace

at::Tensor gated_delta_step(const GatedDeltaInputs& inputs, at::Tensor& states) {
  const at::Tensor key = inputs.key.unsqueeze(2);  // [N, heads, 1, key_head_dim]
  states.mul_(inputs.log_decay.exp().unsqueeze(2).unsqueeze(3));
  const at::Tensor added =
      (inputs.value.unsqueeze(2) - at::matmul(key, states)).mul_(inputs.beta.unsqueeze(2).unsqueeze(3));
  states.addcmul_(key.transpose(2, 3), added);
  return at::matmul(inputs.query.unsqueeze(2), states).squeeze(2);
}

at::Tensor gated_delta_prefill(const GatedDeltaInputs& inputs, at::Tensor& state) {
  const int64_t tokens = inputs.value.size(0);
  at::Tensor output = at::empty(inputs.value.sizes(), inputs.value.options());
  for (int64_t start = 0; start < tokens;) {
    const int64_t left = tokens - start;
    const int64_t chunks = left < kChunk ? 1 : std::min(left / kChunk, kChunksAtOnce);
    const int64_t length = std::min(left, kChunk);
    advance(inputs, start, chunks, length, state, output);
    start += chunks * length;
  }
  return output;
}

}  // namespace spot
