#include "core/error.h"

#include <string_view>

namespace spot {

std::string first_line(const std::exception& e) {
  std::string_view text = e.what();
  return std::string(text.substr(0, text.find('\n')));
}

}  // namespace spot
