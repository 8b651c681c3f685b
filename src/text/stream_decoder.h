// Text of a generation while it runs.
#pragma once

#include <cstdint>
#include <string>

#include "text/decoder.h"
#include "text/tokenizer.h"

namespace spot {

// Decodes one id at a time. A character whose bytes are spread over several tokens comes out with the last of
// them, or with the token behind them (DecoderState); all that push() and finish() return, joined, is what
// Tokenizer::decode returns for the same ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = false)
      : tokenizer_(std::move(tokenizer)),
        skip_special_tokens_(skip_special_tokens),
        state_(tokenizer_.decoder()) {}

  // The text that `id` completes; often empty.
  std::string push(int32_t id);

  // What was held back, U+FFFD for a character that never got all its bytes. The decoder can then be used anew.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  DecoderState state_;
};

}  // namespace spot
