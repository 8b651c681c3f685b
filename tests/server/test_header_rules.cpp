// Headers of requests: targets of both forms, media types, codings and expectations.
#include <gtest/gtest.h>

#include "server/header_rules.h"

namespace spot::server {
namespace {

namespace http = boost::beast::http;

// The status of a POST with this header besides its Host; 0 when nothing was refused.
int status_with(http::field name, const std::string& value, unsigned version = 11) {
  HttpRequest request(http::verb::post, "/v1/completions", version);
  request.set(http::field::host, "a");
  request.set(http::field::content_type, "application/json");
  if (name == http::field::host)
    request.insert(name, value);
  else
    request.set(name, value);
  if (const auto error = faulty_header(request)) return error->status;
  if (const auto error = faulty_body_type(request)) return error->status;
  return 0;
}

TEST(HeaderRules, TargetsOfBothForms) {
  for (const char* target : {"/health", "/health?a=b", "http://a/health", "HTTP://a:80/health?b=http://c/d",
                             "https://[::1]:8000/health"})
    EXPECT_EQ(path_of(target), "/health") << target;
  for (const char* target : {"/", "http://a", "http://a/", "http://a?b=/c", "http://", "/?"})
    EXPECT_EQ(path_of(target), "/") << target;
  for (const char* target :
       {"*", "a:443", "ftp://a/health", "//a/health", "/http://a/health", "http:/health"})
    EXPECT_NE(path_of(target), "/health") << target;
}

TEST(HeaderRules, MediaTypes) {
  for (const char* type :
       {"application/json", "APPLICATION/JSON", " Application/Json ", "application/json;charset=utf-8",
        "application/json; Charset=UTF-8", "application/json ; charset=\"Utf-8\"",
        "application/json; charset=utf8", "application/json;", "application/json; version=1; charset=utf-8"})
    EXPECT_TRUE(is_json_type(type)) << type;
  for (const char* type :
       {"", ";", "text/plain", "application/jsonl", "application/json-seq", "text/plain; application/json",
        "application/json, text/plain", "application/json; charset=latin1",
        "application/json; charset=\"utf-16\"", "application/json; charset=", "application/json; charset",
        "application/json; CHARSET = latin1", "application/json; charset=utf-8; charset=latin1",
        "application/json; charset=\""})
    EXPECT_FALSE(is_json_type(type)) << type;
}

TEST(HeaderRules, CodingsHostsAndExpectations) {
  EXPECT_EQ(status_with(http::field::transfer_encoding, "Chunked"), 0);
  EXPECT_EQ(status_with(http::field::transfer_encoding, "gzip, chunked"), 501);
  EXPECT_EQ(status_with(http::field::transfer_encoding, "chunked, chunked"), 501);
  EXPECT_EQ(status_with(http::field::transfer_encoding, "gzip"), 400);
  EXPECT_EQ(status_with(http::field::transfer_encoding, "chunked, identity"), 400);
  EXPECT_EQ(status_with(http::field::content_encoding, "Identity"), 0);
  EXPECT_EQ(status_with(http::field::content_encoding, "gzip"), 415);
  EXPECT_EQ(status_with(http::field::content_encoding, "identity, br"), 415);
  EXPECT_EQ(status_with(http::field::content_type, "application/json; charset=latin1"), 415);
  EXPECT_EQ(status_with(http::field::expect, "100-Continue"), 0);
  EXPECT_EQ(status_with(http::field::expect, "200-ok"), 417);
  EXPECT_EQ(status_with(http::field::expect, "100-continue, x=y"), 417);
  EXPECT_EQ(status_with(http::field::expect, "200-ok", 10), 0);
  EXPECT_EQ(status_with(http::field::host, "b"), 400);
  // Codings that are spread over two headers are one list.
  HttpRequest request(http::verb::post, "/", 11);
  EXPECT_EQ(faulty_header(request)->status, 400);  // no host
  request.set(http::field::host, "");
  EXPECT_FALSE(faulty_header(request));
  request.insert(http::field::transfer_encoding, "gzip");
  request.insert(http::field::transfer_encoding, "chunked");
  EXPECT_EQ(faulty_header(request)->status, 501);
  // HTTP/1.0 needs no host.
  EXPECT_FALSE(faulty_header(HttpRequest(http::verb::get, "/", 10)));
}

}  // namespace
}  // namespace spot::server
