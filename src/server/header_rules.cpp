#include "server/header_rules.h"

#include <algorithm>
#include <boost/beast/core/string.hpp>
#include <vector>

namespace spot::server {
namespace {

namespace http = boost::beast::http;
using boost::beast::iequals;

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t") - begin + 1);
}

// Splits off and returns what stands before `separator`, or all of it.
std::string_view next_part(std::string_view& text, char separator) {
  const size_t end = std::min(text.find(separator), text.size());
  const std::string_view part = trimmed(text.substr(0, end));
  text.remove_prefix(std::min(end + 1, text.size()));
  return part;
}

// Every value of a header that may be a list and may stand there more than once.
std::vector<std::string_view> values_of(const HttpRequest& request, http::field name) {
  std::vector<std::string_view> values;
  const auto [begin, end] = request.equal_range(name);
  for (auto it = begin; it != end; ++it) {
    std::string_view list(it->value().data(), it->value().size());
    while (!list.empty())
      if (const std::string_view value = next_part(list, ','); !value.empty()) values.push_back(value);
  }
  return values;
}

}  // namespace

std::string path_of(std::string_view target) {
  for (const std::string_view scheme : {"http://", "https://"}) {
    if (!iequals(target.substr(0, scheme.size()), scheme)) continue;
    target.remove_prefix(std::min(target.find_first_of("/?", scheme.size()), target.size()));
    if (target.empty() || target.front() == '?') return "/";
  }
  return std::string(target.substr(0, target.find('?')));
}

bool is_json_type(std::string_view type) {
  if (!iequals(next_part(type, ';'), "application/json")) return false;
  while (!type.empty()) {
    std::string_view value = next_part(type, ';');
    if (!iequals(next_part(value, '='), "charset")) continue;
    value = trimmed(value);
    if (value.size() >= 2 && value.front() == '"' && value.back() == '"')
      value = value.substr(1, value.size() - 2);
    if (!iequals(value, "utf-8") && !iequals(value, "utf8")) return false;
  }
  return true;
}

bool waits_to_send(const HttpRequest& request) {
  return request.version() >= 11 && request.count(http::field::expect) > 0;
}

std::optional<ApiError> faulty_header(const HttpRequest& request) {
  const auto codings = values_of(request, http::field::transfer_encoding);
  if (!codings.empty() && !iequals(codings.back(), "chunked"))
    return ApiError(400, "the Transfer-Encoding does not end in chunked: where the body ends is unknown");
  if (codings.size() > 1)
    return ApiError(501, "the Transfer-Encoding names more than chunked, the only one that is known here");
  const auto hosts = request.count(http::field::host);
  if (hosts > 1 || (hosts == 0 && request.version() >= 11))
    return ApiError(400, fmt::format("the header names {} hosts; Host must stand there once", hosts));
  if (!waits_to_send(request)) return {};  // HTTP/1.0 knows no expectations
  for (const std::string_view expectation : values_of(request, http::field::expect))
    if (!iequals(expectation, "100-continue"))
      return ApiError(
          417, "the header expects something other than 100-continue, the only expectation that is met");
  return {};
}

std::optional<ApiError> faulty_body_type(const HttpRequest& request) {
  if (!is_json_type(std::string(request[http::field::content_type])))
    return ApiError(415, "the body must be sent as Content-Type: application/json, in UTF-8");
  for (const std::string_view coding : values_of(request, http::field::content_encoding))
    if (!iequals(coding, "identity"))
      return ApiError(415, "the body has a Content-Encoding; send it as it is");
  return {};
}

}  // namespace spot::server
