// Splits the text of an answer as it grows: reasoning, content, tool calls.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "server/api_error.h"

namespace spot::server {

// A piece of a tool call. The first of a call has its name, and an id; arguments are pieces of JSON text.
struct ToolCallDelta {
  int64_t index = 0;
  std::string id, name, arguments;
};

struct AnswerDelta {
  std::string reasoning, content;
  std::vector<ToolCallDelta> calls;
  bool empty() const { return reasoning.empty() && content.empty() && calls.empty(); }
};

struct AnswerFormat {
  bool reasoning = false;            // <think>...</think> at the start is not content
  bool starts_in_reasoning = false;  // the prompt has written <think> already
  bool tools = false;                // <tool_call>...</tool_call> are calls
  bool one_tool_call = false;        // calls after the first are dropped
  Json tool_list;                    // as in the request: types of arguments written as XML
};

// Qwen's forms: <think>...</think>, then content, in which <tool_call>{"name": ..., "arguments": {...}}</tool_call>
// (Qwen2.5, Qwen3) or <tool_call><function=NAME><parameter=P>value</parameter>...</function></tool_call>
// (Qwen3-Coder, Qwen3.5). Line breaks around the tags belong to neither side. A call in JSON whose name comes first is
// passed on as it grows, any other when it is whole. What is no call after all is content, tags and all. The deltas,
// joined, do not depend on how the text is cut.
class AnswerParser {
 public:
  AnswerParser(AnswerFormat format, std::function<std::string()> new_call_id);

  AnswerDelta push(std::string_view text);
  AnswerDelta finish();  // the end of the answer
  int64_t num_calls() const { return calls_; }

 private:
  enum class State { start, reasoning, content, call_name, call_arguments, call_end, call_whole };
  bool advance(AnswerDelta& delta, bool last);
  bool read_start(bool last);
  bool read_reasoning(AnswerDelta& delta, bool last);
  bool read_content(AnswerDelta& delta, bool last);
  bool read_call_name(AnswerDelta& delta, bool last);
  bool read_call_arguments(AnswerDelta& delta);
  bool read_call_end(bool last);
  bool read_call_whole(AnswerDelta& delta, bool last);
  void begin_call(AnswerDelta& delta, const std::string& name);
  bool keeps_call() const { return !(format_.one_tool_call && calls_ > 1); }

  AnswerFormat format_;
  std::function<std::string()> new_call_id_;
  State state_ = State::start;
  std::string held_;        // not passed on yet
  bool after_tag_ = false;  // line breaks that come now belong to a tag
  int64_t calls_ = 0;
  int64_t depth_ = 0;  // of the arguments' JSON
  bool in_string_ = false, escaped_ = false;
};

}  // namespace spot::server
