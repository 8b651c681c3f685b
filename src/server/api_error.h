// What a client is told when its request cannot be served.
#pragma once

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "core/error.h"

namespace spot::server {

// Messages keep the order of their members: chat templates show them.
using Json = nlohmann::ordered_json;

// An HTTP status with a body as the OpenAI API has it: {"error": {"message", "type", "param", "code"}}.
class ApiError : public Error {
 public:
  // `field` is the member of the request that is wrong, if it is one.
  ApiError(int status, const std::string& message, std::string field = {}, std::string code = {},
           int retry_after = 0)
      : Error(message),
        status(status),
        field(std::move(field)),
        code(std::move(code)),
        retry_after(retry_after) {}

  std::string type() const;
  Json body() const;

  int status;
  std::string field, code;
  int retry_after;  // seconds; 0: no such header. Above 120 the official client would not try again.
};

// Throws a 400 that names a field.
template <typename... Args>
[[noreturn]] void refuse(const std::string& field, fmt::format_string<Args...> format, Args&&... args) {
  throw ApiError(400, fmt::format(format, std::forward<Args>(args)...), field);
}

// JSON as one line of UTF-8; bytes that are none become U+FFFD.
std::string to_text(const Json& json);

}  // namespace spot::server
