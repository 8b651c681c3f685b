// Schemas of requests: the first byte says what may stand before the JSON, the text up to a null byte is the schema, and what follows
// draws an answer under its grammar. Something may always follow, but where a step takes too much, and what has ended is JSON.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "core/error.h"
#include "fuzz.h"
#include "grammar/grammar.h"

namespace {

using namespace spot;
using Json = nlohmann::ordered_json;

// All bytes, some of JSON's pairs, the tags of reasoning and calls, and an end.
Json tokenizer() {
  Json vocab = Json::object(), merges = Json::array();
  const auto add = [&](const std::string& token) { vocab[token] = vocab.size(); };
  for (int byte = 0, others = 256; byte < 256; ++byte) {
    const bool shown = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte != 0xad);
    const int code = shown ? byte : others++;
    add(code < 0x80
            ? std::string(1, static_cast<char>(code))
            : std::string{static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))});
  }
  const std::vector<std::pair<std::string, std::string>> pairs = {{"{", "\""}, {"\"", ":"}, {"\"", ","},
                                                                  {"\"", "}"}, {"]", "}"},  {"}", ","},
                                                                  {"1", "2"},  {"a", "b"},  {"\\", "u"}};
  for (const auto& [left, right] : pairs) {
    merges.push_back({left, right});
    add(left + right);
  }
  Json added = Json::array();
  for (const char* text : {"<think>", "</think>", "<tool_call>", "<end>"})
    added.push_back({{"id", vocab.size() + added.size()},
                     {"content", text},
                     {"special", std::string(text) == "<end>"},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false}});
  return {{"version", "1.0"},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"continuing_subword_prefix", nullptr},
            {"end_of_word_suffix", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"vocab", vocab},
            {"merges", merges}}}};
}

// Deeper texts are refused before they come here (server/fields.h).
Json parse(const std::string& text) {
  int depth = 0;
  return Json::parse(
      text,
      [&](int level, Json::parse_event_t, Json&) {
        depth = std::max(depth, level);
        if (depth > 64) fail("too deep");
        return true;
      },
      /*allow_exceptions=*/false);
}

struct Served {
  Tokenizer tokenizer;
  int64_t vocab_size;
  std::vector<int64_t> stop_ids;
  SchemaCompiler compiler;

  explicit Served(const std::filesystem::path& file)
      : tokenizer(Tokenizer::load(file)),
        vocab_size(tokenizer.vocab_size() + 37),
        stop_ids{*tokenizer.token_id("<end>")},
        compiler(tokenizer, vocab_size, stop_ids, kWork) {}
  // Under the sanitizers a second or two.
  static constexpr int64_t kWork = 20'000'000;
};

Served& served() {
  static Served one = [] {
    const std::string text = tokenizer().dump();
    return Served(
        fuzz::folder().write("tokenizer.json", reinterpret_cast<const uint8_t*>(text.data()), text.size()));
  }();
  return one;
}

AnswerOpening opening_of(int kind, const Tokenizer& tokenizer) {
  AnswerOpening opening;
  if (kind == 0) return opening;
  opening.reasoning_begin = tokenizer.token_id("<think>");
  opening.reasoning_end = tokenizer.token_id("</think>");
  opening.in_reasoning = kind == 2;
  if (kind == 3) opening.tool_call = tokenizer.token_id("<tool_call>");
  return opening;
}

void draw(TokenConstraint& constraint, const Served& model, std::string_view choices, bool whole_is_json) {
  std::vector<int32_t> bits(static_cast<size_t>((model.vocab_size + 31) / 32)), ids, allowed;
  const auto end = [&] {
    if (!whole_is_json) return;
    try {
      [[maybe_unused]] const Json value = Json::parse(model.tokenizer.decode(ids));
    } catch (const Json::out_of_range&) {  // 1e777 is JSON
    } catch (const Json::exception& error) {
      std::fprintf(stderr, "%s: %s\n", error.what(), model.tokenizer.decode(ids).c_str());
      std::abort();
    }
  };
  for (const char choice : choices) {
    if (!constraint.allowed(bits.data())) {
      if (constraint.problem().find("alike") == std::string::npos) std::abort();
      return;
    }
    allowed.clear();
    for (int32_t id = 0; id < static_cast<int32_t>(32 * bits.size()); ++id) {
      if (!(static_cast<uint32_t>(bits[static_cast<size_t>(id / 32)]) >> (id % 32) & 1)) continue;
      if (id >= model.vocab_size) std::abort();
      if (id == model.stop_ids.front())
        end();
      else
        allowed.push_back(id);
    }
    if (allowed.empty()) return;
    ids.push_back(allowed[static_cast<uint8_t>(choice) % allowed.size()]);
    constraint.accept(ids.back());
    if (constraint.complete()) return end();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view all(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string text(all.substr(0, all.find('\0')));
  const std::string_view choices =
      text.size() < all.size() ? all.substr(text.size() + 1, 200) : std::string_view();
  return fuzz::expect_nothing_but_errors([&] {
    const Json schema = parse(text);
    if (!schema.is_object() && !schema.is_boolean()) return;
    const int kind = data[0] % 4;
    const MakeConstraint make = served().compiler.compile(schema, opening_of(kind, served().tokenizer));
    draw(*make(), served(), choices, kind == 0);
  });
}
