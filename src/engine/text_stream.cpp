#include "engine/text_stream.h"

#include <algorithm>

#include "core/error.h"

namespace spot {

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop_strings)
    : decoder_(tokenizer, /*skip_special_tokens=*/true), stop_strings_(std::move(stop_strings)) {
  for (const std::string& stop : stop_strings_)
    if (stop.empty()) fail("a stop string is empty; leave it out");
}

// The first stop string ends the text; a beginning of one at the end of what is there has to wait.
std::string TextStream::release(bool last) {
  size_t end = std::string::npos;
  for (const std::string& stop : stop_strings_) end = std::min(end, held_.find(stop));
  if (end != std::string::npos) {
    stopped_ = true;
    std::string text = held_.substr(0, end);
    held_.clear();
    return text;
  }
  size_t keep = 0;
  if (!last) {
    for (const std::string& stop : stop_strings_)
      for (size_t size = std::min(stop.size() - 1, held_.size()); size > keep; --size)
        if (held_.compare(held_.size() - size, size, stop, 0, size) == 0) keep = size;
  }
  std::string text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return text;
}

std::string TextStream::push(int32_t token) {
  if (stopped_) return {};
  held_ += decoder_.push(token);
  return release(/*last=*/false);
}

std::string TextStream::finish() {
  if (stopped_) return {};
  held_ += decoder_.finish();
  return release(/*last=*/true);
}

}  // namespace spot
