// The next token of every row of a batch, chosen on the device that holds the logits.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/sampling.h"
#include "engine/token_constraint.h"

namespace spot {

struct TokenLogprob {
  int32_t token;
  float logprob;  // natural logarithm
};

struct SampledToken {
  int32_t token = 0;
  // What is wrong with the row's logits, in words, when they have no finite maximum; `token` then means nothing.
  std::string error;
  // As SamplingOptions::logprobs asks: of the token, and of the likeliest, most likely first.
  float logprob = 0;
  std::vector<TokenLogprob> top;
};

// Knows the requests that it samples for. What a request draws depends on its logits, options, seed and the
// number of tokens it has drawn, not on the batch: probabilities are integers (exp(logit - max) of 2^40ths,
// so a token less than 2^-41 as likely as the likeliest is never drawn), whose sums are exact in any order.
class Sampler {
 public:
  // Memory: 4 bytes times vocab_size for each request with penalties.
  Sampler(int64_t vocab_size, at::Device device);

  // `id` is the caller's name of a request. The prompt counts for the repetition penalty. Throws Error as
  // SamplingOptions::check.
  void add(int64_t id, const SamplingOptions& options, std::span<const int32_t> prompt);
  void remove(int64_t id);

  // logits [rows, vocab_size] float32 on the device, unchanged; row i belongs to request ids[i], each at most
  // once. Greedy rows wait for the device once, for one copy of the results. `mask` forbids tokens of some rows, after
  // biases and penalties; it leaves log-probabilities as they are.
  std::vector<SampledToken> sample(const at::Tensor& logits, const std::vector<int64_t>& ids,
                                   const TokenMask& mask = {});

  // What sample() would draw from: probabilities [rows, vocab_size] float64, one token of a greedy row.
  at::Tensor probabilities(const at::Tensor& logits, const std::vector<int64_t>& ids) const;

 private:
  struct Request {
    SamplingOptions options;
    int64_t drawn = 0;     // tokens so far: the counter of its random numbers
    int64_t history = -1;  // its row of history_, with penalties
    at::Tensor bias_ids, bias;
  };
  // Rows in the order of descending logits: token ids and integer weights, both [rows, candidates] int64.
  struct Candidates {
    at::Tensor ids, weights;
  };
  const Request& find(int64_t id) const;
  at::Tensor adjusted(const at::Tensor& logits, const std::vector<int64_t>& ids) const;
  at::Tensor masked(const at::Tensor& logits, const TokenMask& mask) const;
  Candidates candidates(const at::Tensor& logits, const std::vector<int64_t>& ids) const;
  at::Tensor draw(const Candidates& candidates, const std::vector<int64_t>& ids) const;
  void add_logprobs(std::vector<SampledToken>& sampled, const at::Tensor& logits,
                    const std::vector<int64_t>& ids) const;

  int64_t vocab_size_;
  at::Device device_;
  std::map<int64_t, Request> requests_;
  // [rows, vocab_size] int32: 2 for each time the output holds a token, and 1 when the prompt does.
  at::Tensor history_;
  std::vector<int64_t> free_history_;
};

}  // namespace spot
