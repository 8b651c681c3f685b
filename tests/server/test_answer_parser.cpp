// Reasoning, content and tool calls of an answer, however its text is cut.
#include <gtest/gtest.h>

#include <random>

#include "server/answer_parser.h"

namespace spot::server {
namespace {

struct Whole {
  std::string reasoning, content;
  std::vector<std::pair<std::string, std::string>> calls;
  bool operator==(const Whole&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Whole& whole) {
  out << "reasoning [" << whole.reasoning << "] content [" << whole.content << "]";
  for (const auto& [name, arguments] : whole.calls) out << " call " << name << arguments;
  return out;
}

void join(Whole& whole, const AnswerDelta& delta) {
  whole.reasoning += delta.reasoning, whole.content += delta.content;
  for (const ToolCallDelta& call : delta.calls) {
    if (!call.id.empty()) {
      EXPECT_EQ(call.index, static_cast<int64_t>(whole.calls.size()));
      whole.calls.emplace_back(call.name, "");
    }
    EXPECT_EQ(call.index + 1, static_cast<int64_t>(whole.calls.size()));
    whole.calls.back().second += call.arguments;
  }
}

// Cut at random places, or (random = nullptr) not at all.
Whole parse(const std::string& text, const AnswerFormat& format, std::mt19937_64* random = nullptr) {
  int id = 0;
  AnswerParser parser(format, [&] { return std::to_string(++id); });
  Whole whole;
  for (size_t done = 0; done < text.size();) {
    const size_t count = random ? 1 + (*random)() % ((*random)() % 4 ? 3 : 20) : text.size();
    join(whole, parser.push(std::string_view(text).substr(done, count)));
    done += count;
  }
  join(whole, parser.finish());
  EXPECT_EQ(parser.num_calls() > 0, !whole.calls.empty());
  return whole;
}

const AnswerFormat kAll{.reasoning = true, .tools = true};

TEST(AnswerParser, SplitsReasoningFromContent) {
  EXPECT_EQ(parse("<think>\nso\n\nit is\n</think>\n\nThe answer.\n", kAll),
            (Whole{"so\n\nit is", "The answer.\n", {}}));
  EXPECT_EQ(parse("no tags\n<think>x</think>", kAll), (Whole{"", "no tags\n<think>x</think>", {}}));
  EXPECT_EQ(parse("  <think>never ends\n", kAll), (Whole{"never ends\n", "", {}}));
  EXPECT_EQ(parse("<thin", kAll), (Whole{"", "<thin", {}}));
  EXPECT_EQ(parse("\nso</think>\n\nyes", {.reasoning = true, .starts_in_reasoning = true}),
            (Whole{"so", "yes", {}}));
  EXPECT_EQ(parse("<think>\n\n</think>\n\nyes", kAll), (Whole{"", "yes", {}}));
  EXPECT_EQ(parse("<think>a</think>b", {}), (Whole{"", "<think>a</think>b", {}}));
}

TEST(AnswerParser, ReadsCallsInJson) {
  EXPECT_EQ(
      parse(
          "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"</tool_call>\", \"b\": [{}]}}\n"
          "</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>",
          kAll),
      (Whole{"", "Let me see.", {{"f", "{\"a\": \"}\\\"</tool_call>\", \"b\": [{}]}"}, {"g", "{}"}}}));
  EXPECT_EQ(
      parse(
          "<think>\nhm\n</think>\n\n<tool_call>\n{\"arguments\": {\"x\": 1}, \"name\": \"f\"}\n</tool_call>\nDone",
          kAll),
      (Whole{"hm", "Done", {{"f", "{\"x\":1}"}}}));
  // Arguments as their text, and a call whose end never comes.
  EXPECT_EQ(parse("<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}", kAll),
            (Whole{"", "", {{"f", "{}"}}}));
  EXPECT_EQ(parse("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1", kAll),
            (Whole{"", "", {{"f", "{\"a\": 1"}}}));
  EXPECT_EQ(parse("<tool_call>{\"name\": \"\\u00e9\", \"arguments\": {}}</tool_call>", kAll),
            (Whole{"", "", {{"\xC3\xA9", "{}"}}}));
  AnswerFormat one = kAll;
  one.one_tool_call = true;
  EXPECT_EQ(parse("<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call><tool_call>{\"name\": \"g\", "
                  "\"arguments\": {}}</tool_call>!",
                  one),
            (Whole{"", "!", {{"f", "{}"}}}));
}

TEST(AnswerParser, ReadsCallsInXml) {
  AnswerFormat format = kAll;
  format.tool_list =
      Json::parse(R"([{"type": "function", "function": {"name": "f", "parameters": {"properties":
                                     {"zip": {"type": "string"}, "days": {"type": "integer"}}}}}])");
  EXPECT_EQ(
      parse(
          "<tool_call>\n<function=f>\n<parameter=zip>\n0123\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
          "<parameter=note>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>",
          format),
      (Whole{"", "", {{"f", R"({"zip":"0123","days":3,"note":"two\nlines"})"}}}));
}

TEST(AnswerParser, WhatIsNoCallIsContent) {
  for (const std::string text : {"<tool_call>nothing</tool_call>", "<tool_call>{\"name\": 3}</tool_call>",
                                 "<tool_call>{\"name\": \"f\"", "<tool_call>", "<tool_", "a <tool_call> b"})
    EXPECT_EQ(parse(text, kAll), (Whole{"", text, {}}));
  const std::string call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
  EXPECT_EQ(parse(call, {.reasoning = true}), (Whole{"", call, {}}));
}

TEST(AnswerParser, CutsDoNotMatter) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const std::vector<std::string> pieces = {
      "<think>",     "</think>",    "<tool_call>", "</tool_call>",
      "\n",          "\n\n",        "text ",       "{\"name\": \"f\", \"arguments\": ",
      "{\"a\": [",   "]}",          "}",           "\"\\\"\"",
      "<thin",       "</tool",      " ",           "<function=f>",
      "</function>", "\xE2\x82\xAC"};
  int calls = 0, reasoned = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text = random() % 2 ? "<think>" : "";
    for (uint64_t n = random() % 12; n > 0; --n) text += pieces[random() % pieces.size()];
    if (random() % 2)
      text +=
          "</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"b\"}}\n</tool_call>\n" + text;
    AnswerFormat format{.reasoning = random() % 4 != 0,
                        .starts_in_reasoning = random() % 4 == 0,
                        .tools = random() % 4 != 0,
                        .one_tool_call = random() % 4 == 0};
    const Whole whole = parse(text, format);
    calls += static_cast<int>(whole.calls.size()), reasoned += !whole.reasoning.empty();
    for (int cut = 0; cut < 3; ++cut) ASSERT_EQ(parse(text, format, &random), whole) << text;
  }
  EXPECT_GT(calls, 100);
  EXPECT_GT(reasoned, 100);
}

// An end tag within a name, whose quotes are closed behind it.
TEST(AnswerParser, TagsWithinACallDoNotDependOnTheCut) {
  std::mt19937_64 random{std::random_device{}()};
  for (
      const std::string text :
      {R"(<tool_call>{"name": "f</tool_call>", "arguments": {"x": 1}}</tool_call>b)",
       R"(<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}</tool_call>b)",
       R"(<tool_call>{"name": "f", "arguments"</tool_call>: {"x": 1}}</tool_call>b)",
       R"(<tool_call>{"name": "<tool_call>", "arguments": {}}</tool_call></tool_call><tool_call></tool_call>)"})
    for (int round = 0; round < 200; ++round)
      EXPECT_EQ(parse(text, kAll), parse(text, kAll, &random)) << text;
}

TEST(AnswerParser, CallsOfAnyDepth) {
  const std::string deep(1000000, '['), closed = deep + std::string(deep.size(), ']');
  // Not the order that is passed on as it grows; nested deeper than what is read, it is no call.
  const std::string json = "<tool_call>{\"arguments\": {\"x\": " + closed + "}, \"name\": \"f\"}</tool_call>";
  EXPECT_EQ(parse(json, kAll), (Whole{"", json, {}}));
  const std::string xml =
      "<tool_call><function=f><parameter=x>" + closed + "</parameter></function></tool_call>";
  EXPECT_EQ(parse(xml, kAll), (Whole{"", "", {{"f", to_text(Json{{"x", closed}})}}}));
  const std::string grows =
      "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": " + closed + "}}</tool_call>";
  EXPECT_EQ(parse(grows, kAll), (Whole{"", "", {{"f", "{\"x\": " + closed + "}"}}}));
}

}  // namespace
}  // namespace spot::server
