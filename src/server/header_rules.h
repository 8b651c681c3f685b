// What a request's header must be beyond its syntax, which Beast checks.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "server/api_error.h"
#include "server/connection.h"

namespace spot::server {

// The path of a request target, without its query: of "/path" and of "http://host/path" alike.
std::string path_of(std::string_view target);

// Whether a Content-Type is that of JSON in UTF-8.
bool is_json_type(std::string_view type);

// Whether the client sends its body only when told to.
bool waits_to_send(const HttpRequest& request);

// Why no request with this header is answered, whatever it asks for, if so: no host, a transfer coding or an expectation
// that is not known. After a transfer coding nobody knows where the body ends.
std::optional<ApiError> faulty_header(const HttpRequest& request);

// Why the body of this header would not be read as JSON, if so.
std::optional<ApiError> faulty_body_type(const HttpRequest& request);

}  // namespace spot::server
