// Text of a generation while it runs.
#pragma once

#include <cstdint>
#include <string>

#include "text/tokenizer.h"
#include "text/unicode.h"

namespace spot {

// Decodes one id at a time. A character whose bytes are spread over several tokens comes out with the last of
// them; all that push() and finish() return, joined, is what Tokenizer::decode returns for the same ids.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special_tokens = false)
      : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

  // The text that `id` completes; often empty. Throws Error for an unknown id and then stays as it was.
  std::string push(int32_t id);

  // U+FFFD if the last character never got all its bytes, else nothing. The decoder can then be used anew.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_tokens_;
  Utf8Stream stream_;
};

}  // namespace spot
