// A libFuzzer target: reads and renders any bytes as a chat template. Nothing but spot::Error may come out.
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
