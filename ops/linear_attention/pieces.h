// Prefill works on a batch piece by piece, so that its intermediates stay small.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <vector>

#include "ops/linear_attention/gated_delta.h"

namespace spot::ops {

inline constexpr int64_t kDeltaChunkTokens = 64;

// A run of tokens that prefill works on at once: whole sequences and parts of them.
struct Piece {
  int64_t token = 0, num_tokens = 0, first_sequence = 0;
  std::vector<int64_t> query_lengths;
};

// Cuts the batch into pieces of at most max_tokens (a multiple of kDeltaChunkTokens), sequences at multiples of kDeltaChunkTokens.
// The states carry a sequence from one piece to the next.
inline std::vector<Piece> cut(at::IntArrayRef query_lengths, int64_t max_tokens) {
  const int64_t num_sequences = static_cast<int64_t>(query_lengths.size());
  std::vector<Piece> pieces(1);
  for (int64_t i = 0; i < num_sequences; ++i)
    for (int64_t left = query_lengths[i]; left > 0;) {
      Piece& piece = pieces.back();
      const int64_t room = max_tokens - piece.num_tokens;
      const int64_t take = left <= room ? left : room - room % kDeltaChunkTokens;
      if (take == 0) {
        pieces.push_back({piece.token + piece.num_tokens, 0, i, {}});
        continue;
      }
      // Sequences without tokens lie between, so that a piece's sequences are consecutive.
      piece.query_lengths.resize(i - piece.first_sequence + 1);
      piece.query_lengths.back() = take;
      piece.num_tokens += take;
      left -= take;
    }
  return pieces;
}

// run(layer of a piece, its lengths) for every piece, the results end to end.
template <typename Run>
at::Tensor by_pieces(const GatedDeltaPrefill& arguments, int64_t max_tokens, Run run) {
  const GatedDeltaLayer& whole = arguments.layer;
  const int64_t columns = whole.weights.decay_rate.size(0) * whole.weights.norm.size(0);
  at::Tensor y = at::empty({whole.mixed_qkv.size(0), columns}, whole.mixed_qkv.options());
  for (const Piece& piece : cut(arguments.query_lengths, max_tokens)) {
    if (piece.num_tokens == 0) continue;
    const auto part = [&](const at::Tensor& t) { return t.narrow(0, piece.token, piece.num_tokens); };
    GatedDeltaLayer layer = whole;
    layer.mixed_qkv = part(whole.mixed_qkv);
    layer.z = part(whole.z);
    layer.b = part(whole.b);
    layer.a = part(whole.a);
    layer.state_slots = whole.state_slots.narrow(0, piece.first_sequence, piece.query_lengths.size());
    part(y).copy_(run(layer, piece.query_lengths));
  }
  return y;
}

}  // namespace spot::ops
