// Bodies of the server's requests, up to the prompt's tokens. The first byte chooses the route; 4: a model's answer,
// which is split into reasoning, content and calls.
#include <cstdlib>
#include <optional>

#include "core/files.h"
#include "fuzz.h"
#include "server/served_model.h"

namespace {

using namespace spot;
using namespace spot::server;

constexpr std::string_view kTemplate =
    "{% for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}"
    "{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% if enable_thinking %}<think>{% endif %}"
    "{{ documents }}{% if add_generation_prompt %}<assistant>{% endif %}";
constexpr std::string_view kTokenizer = R"({"version": "1.0", "added_tokens": [], "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "ab": 2, "\u0120": 3, "<": 4, ">": 5}, "merges": [["a", "b"]]}})";

const ServedModel& model() {
  static const ServedModel one = [] {
    const auto write = [](const char* name, std::string_view text) {
      return fuzz::folder().write(name, reinterpret_cast<const uint8_t*>(text.data()), text.size());
    };
    ServedModel model{.name = "m", .tokenizer = Tokenizer::load(write("tokenizer.json", kTokenizer))};
    model.chat_template = ChatTemplate::load(fuzz::folder().path(), write("chat.jinja", kTemplate));
    model.vocab_size = 6, model.max_tokens = 4096;
    model.attention_words = {"dense", "streaming", "quest"};
    model.reasoning = model.tool_calls = true;
    return model;
  }();
  return one;
}

// However it is cut, an answer comes to the same, as JSON that can be written.
std::string split(std::string_view text, size_t piece, const AnswerFormat& format) {
  int64_t number = 0;
  AnswerParser parser(format, [&] { return std::to_string(++number); });
  AnswerDelta whole;
  std::vector<ToolCallDelta> calls;
  const auto take = [&](const AnswerDelta& delta) {
    whole.reasoning += delta.reasoning, whole.content += delta.content;
    for (const ToolCallDelta& call : delta.calls) {
      if (!call.id.empty()) calls.push_back({.index = call.index, .id = call.id, .name = call.name});
      if (calls.empty() || calls.back().index != call.index) std::abort();
      calls.back().arguments += call.arguments;
    }
  };
  for (size_t at = 0; at < text.size(); at += piece) take(parser.push(text.substr(at, piece)));
  take(parser.finish());
  Json all = {whole.reasoning, whole.content};
  for (const ToolCallDelta& call : calls) all.push_back({call.id, call.name, call.arguments});
  return to_text(all);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view body(reinterpret_cast<const char*>(data) + 1, size - 1);
  SamplingOptions defaults;
  return fuzz::expect_nothing_but_errors([&] {
    switch (data[0] % 5) {
      case 0:
        prepare(parse_completion(body, defaults), model());
        return;
      case 1:
        prepare(parse_chat(body, defaults), model());
        return;
      case 2:
        tokenize(parse_tokenize(body), model());
        return;
      case 3:
        detokenize(parse_detokenize(body), model());
        return;
    }
    const Json tools =
        Json::parse(R"([{"type": "function", "function": {"name": "f", "parameters": {"type": "object",
      "properties": {"x": {"type": "string"}}}}}])");
    const AnswerFormat format{
        .reasoning = true, .tools = true, .one_tool_call = body.size() % 2 == 1, .tool_list = tools};
    if (split(body, body.size() + 1, format) != split(body, 1, format)) std::abort();
  });
}
