// Members of a JSON object by name and type, with errors that name them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "server/api_error.h"

namespace spot::server {

// The JSON object of a request's body. Throws ApiError (400) when the text is not one, is nested deeper than 64, no
// UTF-8, or names a member twice.
Json parse_object(std::string_view text);

// Any JSON value; discarded where the text is none, or is nested deeper than 64: copying and writing a value go down it on
// the stack. For text within a request or an answer.
Json parse_value(std::string_view text);

// All take a missing or null member as `otherwise`, and throw ApiError (400) naming a member of another type or
// outside [low, high].
class Fields {
 public:
  // `path` stands before the names in errors: "stream_options.". The object outlives this.
  explicit Fields(const Json& object, std::string path = {}) : object_(object), path_(std::move(path)) {}

  const Json* find(const std::string& name) const;  // nullptr when missing or null
  bool has(const std::string& name) const { return find(name) != nullptr; }
  bool boolean(const std::string& name, bool otherwise) const;
  // Whole numbers, 3.0 among them.
  int64_t integer(const std::string& name, int64_t otherwise, int64_t low, int64_t high) const;
  double number(const std::string& name, double otherwise, double low, double high) const;
  std::string text(const std::string& name, const std::string& otherwise = {}) const;

 private:
  const Json& object_;
  std::string path_;
};

// What a JSON value is, for messages: `"hot"`, `a list`, `an object`.
std::string shown(const Json& value);

}  // namespace spot::server
