// Text generation: prefill in chunks, then decode one token of every sequence a step.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "cache/batch_builder.h"
#include "engine/row_sampler.h"
#include "model/backbone.h"

namespace spot {

struct GenerateOptions {
  int64_t max_new_tokens = 256;
  int64_t prefill_chunk = 2048;   // tokens a forward call; bounds the memory of prefill
  SamplingOptions sampling;       // sequence i uses seed + i
  std::vector<int64_t> stop_ids;  // end a sequence, are not part of its output
};

enum class FinishReason { stop, length };

struct GeneratedSequence {
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::length;
};

struct GenerateResult {
  std::vector<GeneratedSequence> sequences;
  int64_t prompt_tokens = 0, decode_tokens = 0;  // decode_tokens: tokens that a decode step produced
  double prefill_seconds = 0, decode_seconds = 0;
};

// Called with (sequence, token) as each token is chosen.
using TokenCallback = std::function<void(int64_t, int32_t)>;

// Continues each prompt (token ids, not empty). `attention` must use `cache`; sequences are opened and closed
// here.
// Throws Error when a prompt plus max_new_tokens passes the model's max_position_embeddings or the cache's
// room.
GenerateResult generate(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache,
                        const std::vector<std::vector<int32_t>>& prompts, const GenerateOptions& options,
                        const TokenCallback& on_token = {});

// Runs `tokens` of one open sequence through the model in chunks; returns the hidden state of the last token,
// [1, hidden_size].
at::Tensor prefill(const Backbone& backbone, AttentionBackend& attention, PagedCache& cache, int64_t sequence,
                   const std::vector<int32_t>& tokens, int64_t chunk, const std::string& progress_label = "");

}  // namespace spot
