// Request bodies: what is read of them, and which member an error names.
#include <gtest/gtest.h>

#include <random>

#include "server/api_request.h"
#include "server/fields.h"

namespace spot::server {
namespace {

ApiRequest completion(Json more) {
  Json body = {{"model", "m"}, {"prompt", "text"}};
  body.update(more);
  return parse_completion(to_text(body), {});
}

ApiRequest chat(Json more) {
  Json body = {{"model", "m"}, {"messages", {{{"role", "user"}, {"content", "text"}}}}};
  body.update(more);
  return parse_chat(to_text(body), {});
}

// The field that a refusal names; "none" when nothing was refused.
template <typename Parse>
std::string refused_field(Parse parse, const Json& more) {
  try {
    parse(more);
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status, 400);
    EXPECT_EQ(error.body().at("error").at("type"), "invalid_request_error");
    EXPECT_NE(std::string(error.what()).find(error.field.substr(error.field.find('.') + 1)),
              std::string::npos)
        << error.what();
    return error.field;
  }
  return "none";
}

TEST(ApiRequest, ReadsWhatACompletionAsksFor) {
  const ApiRequest request = completion({{"max_tokens", 7},
                                         {"temperature", 0.5},
                                         {"top_p", 0.25},
                                         {"top_k", -1},
                                         {"min_p", 0.125},
                                         {"repetition_penalty", 1.5},
                                         {"presence_penalty", -0.5},
                                         {"frequency_penalty", 2},
                                         {"logit_bias", {{"12", -100}, {"3", 0.5}}},
                                         {"seed", -9},
                                         {"n", 3},
                                         {"stop", "end"},
                                         {"stop_token_ids", {5, 6}},
                                         {"logprobs", 4},
                                         {"ignore_eos", true},
                                         {"attention", "spot:p=0.9"},
                                         {"stream", true},
                                         {"stream_options", {{"include_usage", true}, {"unknown", 1}}},
                                         {"something_new", {1, 2}}});
  EXPECT_FALSE(request.chat);
  EXPECT_EQ(std::get<std::string>(request.prompts.at(0)), "text");
  EXPECT_EQ(request.max_tokens, 7);
  EXPECT_EQ(request.sampling.temperature, 0.5);
  EXPECT_EQ(request.sampling.top_p, 0.25);
  EXPECT_EQ(request.sampling.top_k, 0);
  EXPECT_EQ(request.sampling.min_p, 0.125);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.5);
  EXPECT_EQ(request.sampling.presence_penalty, -0.5);
  EXPECT_EQ(request.sampling.frequency_penalty, 2);
  EXPECT_EQ(request.sampling.logit_bias, (std::vector<std::pair<int32_t, double>>{{12, -100}, {3, 0.5}}));
  EXPECT_EQ(request.seed, static_cast<uint64_t>(-9));
  EXPECT_EQ(request.completions, 3);
  EXPECT_EQ(request.stop, std::vector<std::string>{"end"});
  EXPECT_EQ(request.stop_ids, (std::vector<int64_t>{5, 6}));
  EXPECT_EQ(request.sampling.logprobs, 4);
  EXPECT_TRUE(request.ignore_eos && request.stream && request.include_usage);
  EXPECT_FALSE(request.continuous_usage);
  EXPECT_EQ(request.attention, "spot:p=0.9");
}

TEST(ApiRequest, SaysNothingMeansTheModelsDefaults) {
  SamplingOptions defaults;
  defaults.temperature = 0.6, defaults.top_k = 20, defaults.top_p = 0.95, defaults.repetition_penalty = 1.1;
  const ApiRequest request = parse_completion(R"({"prompt": "a", "temperature": null})", defaults);
  EXPECT_EQ(request.sampling.temperature, 0.6);
  EXPECT_EQ(request.sampling.top_k, 20);
  EXPECT_EQ(request.sampling.top_p, 0.95);
  EXPECT_EQ(request.sampling.repetition_penalty, 1.1);
  EXPECT_EQ(request.max_tokens, 16);
  EXPECT_EQ(completion({{"max_tokens", 3}, {"max_completion_tokens", 4}}).max_tokens, 4);
  EXPECT_FALSE(request.logprobs());
  EXPECT_FALSE(parse_chat(R"({"messages": [{"role": "user", "content": "a"}]})", {}).max_tokens);
}

TEST(ApiRequest, TakesPromptsOfEveryForm) {
  EXPECT_EQ(std::get<1>(completion({{"prompt", {1, 2, 3}}}).prompts.at(0)), (std::vector<int32_t>{1, 2, 3}));
  const ApiRequest many = completion({{"prompt", {"a", Json::array({4, 5})}}, {"n", 2}});
  EXPECT_EQ(std::get<0>(many.prompts.at(0)), "a");
  EXPECT_EQ(std::get<1>(many.prompts.at(1)), (std::vector<int32_t>{4, 5}));
  for (const Json& bad : {Json(), Json(3), Json::array(), Json::array({1, -2}), Json::array({1, 2.5}),
                          Json::array({"a", 3}), Json::array({1, 5000000000}), Json(Json::value_t::object)})
    EXPECT_EQ(refused_field(completion, {{"prompt", bad}}), "prompt") << bad;
}

TEST(ApiRequest, NamesTheMemberThatIsWrong) {
  const std::vector<std::pair<const char*, Json>> wrong = {{"temperature", -1},
                                                           {"temperature", "hot"},
                                                           {"top_p", 0},
                                                           {"top_p", 1.5},
                                                           {"top_k", 2.5},
                                                           {"min_p", -0.1},
                                                           {"repetition_penalty", 0},
                                                           {"presence_penalty", 3},
                                                           {"frequency_penalty", true},
                                                           {"n", 0},
                                                           {"n", 1000000},
                                                           {"max_tokens", 0},
                                                           {"seed", 0.5},
                                                           {"stop", 3},
                                                           {"stop", Json::array({""})},
                                                           {"stream", 1},
                                                           {"logit_bias", {{"x", 1}}},
                                                           {"logit_bias", {{"1", 1000}}},
                                                           {"logit_bias", {{"05", 1}}},
                                                           {"attention", ""},
                                                           {"ignore_eos", "yes"},
                                                           {"stop_token_ids", "a"},
                                                           {"best_of", 4},
                                                           {"model", 5},
                                                           {"stream_options", Json(3)},
                                                           {"attention", 1}};
  for (const auto& [name, value] : wrong) {
    EXPECT_EQ(refused_field(completion, {{name, value}}), name) << value;
    EXPECT_EQ(refused_field(chat, {{name, value}}), name) << value;
  }
  EXPECT_EQ(refused_field(completion, {{"stream", true}, {"stream_options", {{"include_usage", 1}}}}),
            "stream_options.include_usage");
  EXPECT_EQ(refused_field(completion, {{"stream_options", {{"include_usage", true}}}}), "stream_options");
  EXPECT_EQ(refused_field(completion, {{"logprobs", 21}}), "logprobs");
  EXPECT_EQ(refused_field(chat, {{"top_logprobs", 2}}), "top_logprobs");
  EXPECT_EQ(refused_field(chat, {{"logprobs", true}, {"top_logprobs", 21}}), "top_logprobs");
  EXPECT_EQ(refused_field(chat, {{"tool_choice", "required"}}), "tool_choice");
  EXPECT_EQ(refused_field(chat, {{"tools", Json::array({{{"type", "function"}}})}}), "tools");
  EXPECT_EQ(refused_field(chat, {{"chat_template_kwargs", {{"messages", 1}}}}), "chat_template_kwargs");
}

TEST(ApiRequest, ReadsSchemasOfEveryForm) {
  const Json schema = {{"type", "object"}, {"properties", {{"z", Json::object()}, {"a", true}}}};
  const auto format = [](Json schema) {
    return Json{{"type", "json_schema"}, {"json_schema", {{"name", "n"}, {"schema", std::move(schema)}}}};
  };
  for (const Json& body :
       {Json{{"response_format", format(schema)}}, Json{{"guided_json", schema}},
        Json{{"guided_json", schema.dump()}}, Json{{"structured_outputs", {{"json", schema}}}}}) {
    const ApiRequest request = chat(body);
    ASSERT_TRUE(request.schema) << body;
    EXPECT_EQ(*request.schema, schema);
    EXPECT_EQ(request.schema->at("properties").front(), Json::object()) << "the order is kept";
    EXPECT_EQ(request.schema_field, body.items().begin().key());
  }
  EXPECT_EQ(*completion({{"response_format", {{"type", "json_object"}}}}).schema, (Json{{"type", "object"}}));
  EXPECT_FALSE(
      completion({{"response_format", {{"type", "text"}}}, {"structured_outputs", {{"json_object", false}}}})
          .schema);
  EXPECT_EQ(refused_field(chat, {{"guided_json", schema}, {"response_format", format(schema)}}),
            "guided_json");
  for (const Json& wrong : {Json(1), Json("{"), Json("[]"), Json::array()}) {
    EXPECT_EQ(refused_field(chat, {{"guided_json", wrong}}), "guided_json");
    EXPECT_EQ(refused_field(chat, {{"response_format", format(wrong)}}), "response_format");
    EXPECT_EQ(refused_field(chat, {{"structured_outputs", {{"json", wrong}}}}), "structured_outputs");
  }
  EXPECT_EQ(refused_field(chat, {{"response_format", {{"type", "json_schema"}, {"schema", schema}}}}),
            "response_format");
}

TEST(ApiRequest, RefusesByNameWhatItKnowsAndCannotServe) {
  for (const auto& [name, value] :
       std::vector<std::pair<const char*, Json>>{{"guided_regex", "a"},
                                                 {"echo", true},
                                                 {"suffix", "x"},
                                                 {"min_tokens", 3},
                                                 {"response_format", {{"type", "structural_tag"}}},
                                                 {"structured_outputs", {{"choice", {"a", "b"}}}},
                                                 {"prompt_logprobs", 1},
                                                 {"use_beam_search", true},
                                                 {"functions", Json::array({1})},
                                                 {"audio", {{"voice", "a"}}},
                                                 {"continue_final_message", true}}) {
    EXPECT_EQ(refused_field(completion, {{name, value}}), name);
    EXPECT_EQ(refused_field(chat, {{name, value}}), name);
  }
  // What changes nothing is let pass.
  EXPECT_EQ(refused_field(chat, {{"response_format", {{"type", "text"}}},
                                 {"echo", false},
                                 {"length_penalty", 1},
                                 {"min_tokens", 0},
                                 {"suffix", nullptr},
                                 {"modalities", {"text"}},
                                 {"store", false},
                                 {"user", "u"},
                                 {"metadata", {{"a", "b"}}},
                                 {"service_tier", "auto"}}),
            "none");
}

TEST(ApiRequest, ReadsConversations) {
  const ApiRequest request =
      chat({{"messages",
             {{{"role", "user"},
               {"content", {{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}}}},
              {{"role", "assistant"},
               {"content", nullptr},
               {"tool_calls",
                {{{"id", "1"},
                  {"type", "function"},
                  {"function", {{"name", "f"}, {"arguments", "{\"x\": [1]}"}}}}}}}}},
            {"tools", {{{"type", "function"}, {"function", {{"name", "f"}}}}}},
            {"parallel_tool_calls", false},
            {"max_completion_tokens", 9},
            {"logprobs", true},
            {"chat_template_kwargs", {{"enable_thinking", false}}}});
  EXPECT_TRUE(request.chat && request.with_tools && request.one_tool_call);
  EXPECT_EQ(request.max_tokens, 9);
  EXPECT_EQ(request.sampling.logprobs, 0);
  EXPECT_EQ(request.conversation.variables.at("enable_thinking"), false);
  // Templates write arguments themselves.
  EXPECT_EQ(request.conversation.messages.at(1).at("tool_calls").at(0).at("function").at("arguments"),
            Json({{"x", {1}}}));
  EXPECT_TRUE(
      chat({{"tools", request.conversation.tools}, {"tool_choice", "none"}}).conversation.tools.is_null());
  for (const Json& bad :
       {Json(), Json::array(), Json("hi"), Json::array({"hi"}), Json::array({{{"content", "a"}}}),
        Json::array({{{"role", "user"}, {"content", 3}}}),
        Json::array({{{"role", "user"}, {"content", {{{"type", "image_url"}, {"image_url", "x"}}}}}})})
    EXPECT_EQ(refused_field(chat, {{"messages", bad}}), "messages") << bad;
}

TEST(ApiRequest, AnyBytesAreReadOrRefused) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const std::string whole = to_text({{"prompt", {"a\xC3\xA9", "b"}},
                                     {"messages", {{{"role", "user"}, {"content", "c"}}}},
                                     {"temperature", 0.5},
                                     {"stop", {"x", "y"}},
                                     {"logit_bias", {{"1", 2}}},
                                     {"stream", true},
                                     {"stream_options", {{"include_usage", true}}},
                                     {"tokens", {1, 2}},
                                     {"n", 2}});
  int read = 0, refused = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string text = whole;
    for (uint64_t edits = random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      switch (random() % 3) {
        case 0:
          text[at] = static_cast<char>(random() % 256);
          break;
        case 1:
          text.erase(at, random() % 9);
          break;
        default:
          text.insert(at, text.substr(random() % text.size(), random() % 9));
      }
      if (text.empty()) text = " ";
    }
    for (int kind = 0; kind < 4; ++kind) {
      try {
        if (kind == 0) parse_completion(text, {});
        if (kind == 1) parse_chat(text, {});
        if (kind == 2) parse_tokenize(text);
        if (kind == 3) parse_detokenize(text);
        ++read;
      } catch (const ApiError& error) {
        EXPECT_EQ(error.status, 400);
        ++refused;
      }
    }
  }
  EXPECT_GT(read, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(ApiRequest, RefusesDepthAndOtherRoots) {
  for (const std::string& text :
       {std::string(100000, '['), std::string(R"({"prompt": )") + std::string(5000, '['), std::string("[]"),
        std::string("3"), std::string(), std::string("{} {}"), std::string(R"({"n": 1e999})"),
        std::string("{\"a\": \"\xFF\"}")})
    EXPECT_THROW(parse_object(text), ApiError) << text.substr(0, 20);
}

TEST(ApiRequest, NamesMembersThatStandThereTwice) {
  const auto said = [](const std::string& text) -> std::string {
    try {
      parse_object(text);
    } catch (const ApiError& error) {
      EXPECT_EQ(error.status, 400);
      return error.what();
    }
    return "nothing";
  };
  const std::string twice = "the body names \"n\" twice in one object; give it once";
  EXPECT_EQ(said(R"({"n": 1, "m": 2, "n": 1})"), twice);
  EXPECT_EQ(said(R"({"n": 1, "\u006e": null})"), twice);
  EXPECT_EQ(said(R"({"a": [{"b": {"n": {}, "n": []}}]})"), twice);
  EXPECT_EQ(said(R"({"n": {"n": {"n": 1}}, "a": [{"n": 1}, {"n": 2}], "b": {"n": 1}})"), "nothing");
  // Members are searched one by one.
  const auto wide = [](int members) {
    std::string text = "{\"a\": [{";
    for (int i = 0; i < members; ++i) text += fmt::format("{}\"{}\": 1", i ? ", " : "", i);
    return text + "}]}";
  };
  EXPECT_EQ(said(wide(2048)), "nothing");
  EXPECT_EQ(said(wide(2049)), "an object of the body has more than 2048 members");
  EXPECT_TRUE(parse_value(wide(2049)).is_discarded());
  // A model's own words, as a client sends them back, are not the client's fault.
  EXPECT_EQ(parse_value(R"({"n": 1, "n": 2})"), Json({{"n", 2}}));
}

TEST(ApiRequest, NamesBothThatSayWhatTheAnswerIsLike) {
  const Json outputs = {{"json", {{"type", "array"}}}, {"json_object", true}};
  const auto said = [](const Json& more) -> std::string {
    try {
      chat(more);
    } catch (const ApiError& error) {
      EXPECT_EQ(error.field, "structured_outputs");
      return error.what();
    }
    return "nothing";
  };
  EXPECT_EQ(
      said({{"structured_outputs", outputs}}),
      "structured_outputs.json and structured_outputs.json_object both say what the answer is like; give one");
  EXPECT_EQ(said({{"structured_outputs", {{"json_object", true}}}, {"guided_json", outputs.at("json")}}),
            "guided_json and structured_outputs.json_object both say what the answer is like; give one");
}

// JSON within a text: what is no call's arguments stays the text that it was.
TEST(ApiRequest, DepthWithinTextsIsNoDepthOfItsValues) {
  const auto arguments_of = [](const std::string& arguments) {
    const Json body = {{"messages",
                        {{{"role", "assistant"},
                          {"tool_calls", {{{"function", {{"name", "f"}, {"arguments", arguments}}}}}}}}}};
    const ApiRequest request = parse_chat(body.dump(), {});
    const ApiRequest copied = request;  // as the renderer does, down every level
    return copied.conversation.messages.at(0).at("tool_calls").at(0).at("function").at("arguments");
  };
  EXPECT_EQ(arguments_of(R"({"x": [1]})"), Json({{"x", {1}}}));
  for (const int depth : {65, 1000, 3000000}) {
    for (const std::string open : {"[", "{\"a\":"}) {
      std::string text = "{\"x\":";
      for (int i = 0; i < depth; ++i) text += open;
      text += "1" + std::string(static_cast<size_t>(depth), open == "[" ? ']' : '}') + "}";
      EXPECT_EQ(arguments_of(text), Json(text)) << depth;
    }
  }
  EXPECT_EQ(arguments_of(R"({"x": 1e999})"), Json(R"({"x": 1e999})"));
}

}  // namespace
}  // namespace spot::server
