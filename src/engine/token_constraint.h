// Which tokens an answer may have next: a grammar, for one.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace spot {

// Of one answer; used by the engine's thread alone.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  // The tokens that may come next: bit t % 32 of bits[t / 32] for token t. `bits` has ceil(vocab_size / 32) words, all
  // overwritten. False when there are none: the answer can neither go on nor end.
  virtual bool allowed(int32_t* bits) = 0;
  // Why there were none, and what to do.
  virtual std::string problem() const {
    return "no token of the vocabulary may follow under the request's constraint; ask for another form of output";
  }
  // One of them came.
  virtual void accept(int32_t token) = 0;
  // Nothing can follow but the end.
  virtual bool complete() const = 0;
};

// A fresh one for each answer of a request. May be called by any thread.
using MakeConstraint = std::function<std::unique_ptr<TokenConstraint>()>;

// Some rows of a batch and the tokens that they may have.
struct TokenMask {
  std::vector<int64_t> rows;
  at::Tensor bits;  // [rows, ceil(vocab_size / 32)] int32 on the host, as TokenConstraint::allowed fills them
};

}  // namespace spot
