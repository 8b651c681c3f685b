// The text of an answer as it grows, up to a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/stream_decoder.h"

namespace spot {

// Holds back what may still become a stop string.
class TextStream {
 public:
  // Throws Error on an empty stop string.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop_strings);

  // The text that is certain with this token; nothing more once stopped().
  std::string push(int32_t token);
  // What was held back, when the answer ends for another reason.
  std::string finish();
  bool stopped() const { return stopped_; }

 private:
  std::string release(bool last);

  StreamDecoder decoder_;
  std::vector<std::string> stop_strings_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace spot
