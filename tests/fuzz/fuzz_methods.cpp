// The grammar of attention methods, several of them, with and without a selector and settings beside them.
#include "attention/methods.h"
#include "fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  static const spot::SelectorConfig selector;
  static const spot::MethodSettings some = [] {
    spot::MethodSettings settings;
    settings.p = 0.5, settings.cap = 4096, settings.cache_format = "int8", settings.dense_layers = 1;
    return settings;
  }();
  std::vector<std::string> parts(1);
  for (const char c : text) c == ';' ? parts.emplace_back() : parts.back() += (std::string(1, c));
  for (const std::string& one : spot::join_methods(parts)) {
    spot::fuzz::expect_nothing_but_errors([&] { spot::parse_method(one, {}, nullptr).describe(); });
    spot::fuzz::expect_nothing_but_errors([&] { spot::parse_method(one, some, &selector).describe(); });
  }
  return 0;
}
