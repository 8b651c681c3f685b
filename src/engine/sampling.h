// How a request chooses its tokens.
#pragma once

#include <cstdint>
#include <filesystem>
#include <utility>
#include <vector>

namespace spot {

// Applied to a row of logits in this order: logit_bias; repetition_penalty; frequency_penalty and
// presence_penalty; temperature; top_k; top_p; min_p. This is the order of transformers' generate() and, but
// for the place of min_p, of vLLM.
struct SamplingOptions {
  double temperature = 0.0;  // logits are divided by it; 0: greedy, ties to the lower id
  int64_t top_k = 0;         // the likeliest k tokens, ties to the lower id; 0: all
  double top_p = 1.0;        // the fewest likeliest tokens whose probability reaches this, in (0, 1]
  double min_p = 0.0;        // tokens at least this probable relative to the likeliest, in [0, 1]
  // Keskar et al. 2019: logits of tokens that prompt or output hold are divided by it when positive,
  // multiplied when negative. 1: none.
  double repetition_penalty = 1.0;
  // Subtracted for a token that the output holds: once, and for each time.
  double presence_penalty = 0.0, frequency_penalty = 0.0;
  std::vector<std::pair<int32_t, double>> logit_bias;  // (token, added to its logit)
  uint64_t seed = 42;
  // Log-probabilities of the chosen token and of this many likeliest ones: the softmax of the model's own
  // logits, before all of the above. -1: none.
  int64_t logprobs = -1;

  // Throws Error on values out of range, and on tokens outside a vocabulary of `vocab_size`.
  void check(int64_t vocab_size) const;
  bool changes_logits() const { return !logit_bias.empty() || has_penalties(); }
  bool has_penalties() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }

  // What FOLDER/generation_config.json wants, as transformers' generate() reads it: without do_sample, greedy.
  // The defaults above where the file or a field is missing. Throws Error on values of a wrong type or range.
  static SamplingOptions from_generation_config(const std::filesystem::path& folder);
};

}  // namespace spot
