// Twilight's pruning: each query head keeps the fewest candidate tokens that hold mass p, a KV head their
// union.
#pragma once

#include "kernels/select_rules.h"
#include "kernels/types.h"

namespace spot::kernels {

// The rule, exact and the same everywhere: a token's mass is mass_of (select_rules.h) of its logit against
// the head's largest one, an integer; kept are the tokens whose mass is at least the greatest t >= 1 for
// which those of mass >= t hold ceil(p * total). So equal masses are kept or dropped together, and masses
// below 2^-25 of the largest are 0 and never kept. A row of at most `floor` tokens keeps all its candidates.
struct PruneTokensParams {
  int32_t batch = 0;                        // R
  int32_t num_heads = 0, num_kv_heads = 0;  // a divisor
  float p = 0.9f;
  int32_t floor = 0;                  // tokens
  const int32_t* lengths = nullptr;   // [R]
  const int32_t* selected = nullptr;  // [R, Hkv, max_selected] block indices, ascending
  const int32_t* counts = nullptr;    // [R, Hkv]
  int32_t max_selected = 0;           // at most 65536
  const float* logits = nullptr;      // [R, Hq, max_selected * 16] of the candidates (estimate_logits.h)
  int32_t* tokens = nullptr;        // out [R, Hkv, max_selected * 16] positions, ascending; then not written
  int32_t* token_counts = nullptr;  // out [R, Hkv]
  void* workspace = nullptr;        // zeroed once before its first use; 256-byte aligned
  size_t workspace_bytes = 0;
  Overlap overlap = Overlap::kNone;
};

size_t prune_tokens_workspace_bytes(int32_t batch, int32_t num_heads, int32_t max_selected);

cudaError_t prune_tokens(const PruneTokensParams& params, cudaStream_t stream);

}  // namespace spot::kernels
