#include "text/stream_decoder.h"

namespace spot {

std::string StreamDecoder::push(int32_t id) {
  if (!tokenizer_.has_token(id) || (skip_special_tokens_ && tokenizer_.is_special(id))) return "";
  return state_.push(tokenizer_.token_text(id));
}

std::string StreamDecoder::finish() {
  return state_.finish();
}

}  // namespace spot
