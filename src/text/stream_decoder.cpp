#include "text/stream_decoder.h"

namespace spot {

std::string StreamDecoder::push(int32_t id) {
  std::string text;
  const std::string& bytes = tokenizer_.token_bytes(id);
  if (!skip_special_tokens_ || !tokenizer_.is_special(id)) stream_.push(bytes, text);
  return text;
}

std::string StreamDecoder::finish() {
  std::string text;
  stream_.finish(text);
  return text;
}

}  // namespace spot
