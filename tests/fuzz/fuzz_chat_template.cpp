// A libFuzzer target: reads and renders any bytes as a chat template. Nothing but spot::Error may come out.
//   clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined
//     -DFMT_HEADER_ONLY=1 -Isrc -I. tests/fuzz/fuzz_chat_template.cpp src/text/jinja/*.cpp src/text/unicode.cpp
//     src/text/unicode_case.cpp -lutf8proc -o fuzz_chat_template && ./fuzz_chat_template tests/fuzz/chat_template
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"
#include "text/jinja/template.h"

namespace {

spot::jinja::Variables inputs() {
  const auto json = nlohmann::ordered_json::parse(R"({
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  é\n"},
                 {"role": "assistant", "content": "<think>a</think>b", "tool_calls": [{"type": "function",
                  "function": {"name": "f", "arguments": {"x": [1, 2.5, null, true], "y": {"z": "q"}}}}]}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "add_generation_prompt": true, "bos_token": "<s>", "n": 7, "text": "Straße ΣΑΣ"})");
  spot::jinja::Variables variables;
  for (const auto& [name, value] : json.items())
    variables.emplace_back(name, spot::jinja::Value::from_json(value));
  return variables;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const spot::jinja::Variables variables = inputs();
  try {
    const spot::jinja::Template source({reinterpret_cast<const char*>(data), size}, "fuzz");
    source.render(variables);
  } catch (const spot::Error&) {
  }
  return 0;
}
