#include "text/chat_template.h"

#include <algorithm>
#include <array>

#include "core/error.h"
#include "core/files.h"

namespace spot {
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

namespace {

using NamedTexts = std::vector<std::pair<std::string, std::string>>;

constexpr std::array kSpecialTokens = {"bos_token", "eos_token", "unk_token", "sep_token",
                                       "pad_token", "cls_token", "mask_token"};

// `chat_template` of a JSON file: the text itself or a list of named ones.
NamedTexts templates_in(const nlohmann::json& config) {
  const auto entry = config.find("chat_template");
  if (entry == config.end() || entry->is_null()) return {};
  if (entry->is_string()) return {{"default", entry->get<std::string>()}};
  NamedTexts templates;
  for (const auto& named : *entry) templates.emplace_back(named.at("name"), named.at("template"));
  return templates;
}

NamedTexts templates_of(const fs::path& folder, const nlohmann::json& config, std::string& where) {
  NamedTexts templates;
  where = folder.string();
  if (has_file(folder / "chat_template.jinja"))
    templates.emplace_back("default", read_file(folder / "chat_template.jinja"));
  if (const fs::path more = folder / "additional_chat_templates"; fs::is_directory(more)) {
    for (const auto& entry : fs::directory_iterator(more))
      if (entry.path().extension() == ".jinja")
        templates.emplace_back(entry.path().stem().string(), read_file(entry.path()));
  }
  if (templates.empty()) templates = templates_in(config);
  if (templates.empty() && has_file(folder / "chat_template.json"))
    templates = templates_in(read_json(folder / "chat_template.json"));
  return templates;
}

// The text of a list of text parts.
std::string joined_parts(const Json& parts, size_t message) {
  std::string text;
  for (const Json& part : parts) {
    const std::string type = part.is_object() ? part.value("type", "") : "";
    if (type != "text" || !part.contains("text") || !part.at("text").is_string()) {
      fail("message {} has a content part of the type {}; only text parts are supported", message,
           type.empty() ? "(none)" : type);
    }
    if (!text.empty()) text += "\n";
    text += part.at("text").get_ref<const std::string&>();
  }
  return text;
}

// A message as templates expect it: no null members, reasoning under the names that templates read.
Json prepared(const Json& message, size_t index, bool takes_parts) {
  if (!message.is_object()) fail("message {} is not a JSON object", index);
  Json out = Json::object();
  Json reasoning;
  for (const char* name : {"reasoning_content", "thinking", "reasoning"})
    if (reasoning.is_null() && message.contains(name)) reasoning = message.at(name);
  if (!reasoning.is_null() && (!message.contains("thinking") || message.at("thinking").is_null()))
    out["thinking"] = reasoning;
  for (const auto& [key, value] : message.items()) {
    if (value.is_null()) continue;
    out[key] = value;
    if (key == "content" && value.is_array()) {
      std::string text = joined_parts(value, index);
      if (!takes_parts) out[key] = std::move(text);
    } else if (key == "content" && !value.is_string()) {
      fail("message {} has a content that is neither a text nor a list of text parts", index);
    }
  }
  if (!reasoning.is_null()) out["reasoning_content"] = std::move(reasoning);
  if (!out.contains("role") || !out.at("role").is_string()) fail("message {} has no role", index);
  return out;
}

}  // namespace

ChatPrompt ChatPrompt::of(const std::vector<ChatMessage>& messages) {
  ChatPrompt prompt;
  for (const auto& [role, content] : messages)
    prompt.messages.push_back(Json{{"role", role}, {"content", content}});
  return prompt;
}

ChatTemplate ChatTemplate::load(const fs::path& folder, const std::optional<fs::path>& file) {
  if (!fs::is_directory(folder)) fail("{}: not a checkpoint folder", folder.string());
  const fs::path config_file = folder / "tokenizer_config.json";
  try {
    const nlohmann::json config = has_file(config_file) ? read_json(config_file) : nlohmann::json::object();
    std::string where;
    NamedTexts templates;
    if (file) {
      templates = {{"default", read_file(*file)}}, where = file->string();
    } else {
      templates = templates_of(folder, config, where);
    }
    if (templates.empty()) {
      fail(
          "{}: has no chat template (no chat_template.jinja, and no chat_template in tokenizer_config.json); this is "
          "a base model, give it plain text or a template of your own (--chat-template)",
          folder.string());
    }
    return ChatTemplate(folder, std::move(templates), where);
  } catch (const nlohmann::json::exception& e) {
    fail("{}: its chat_template is neither a text nor a list of named ones: {}", folder.string(), e.what());
  }
}

ChatTemplate::ChatTemplate(const fs::path& folder, NamedTexts templates, const std::string& where)
    : where_(where) {
  nlohmann::json tokens = nlohmann::json::object();
  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"})
    if (has_file(folder / name)) tokens.update(read_json(folder / name));
  for (const char* name : kSpecialTokens) {
    const auto token = tokens.find(name);
    if (token == tokens.end()) continue;
    if (token->is_string()) special_tokens_.emplace_back(name, token->get<std::string>());
    if (token->is_object() && token->contains("content"))
      special_tokens_.emplace_back(name, token->at("content").get<std::string>());
  }
  for (const auto& [name, text] : templates) {
    const std::string described =
        templates.size() == 1 ? where : fmt::format("{} (template {})", where, name);
    sources_.push_back({name, jinja::Template(text, described), false});
  }
  // A template that knows lists of parts renders one part as it does the same text.
  ChatPrompt probe = ChatPrompt::of({{"user", "what the user says"}});
  ChatPrompt parts = probe;
  parts.messages[0]["content"] = Json::array({{{"type", "text"}, {"text", "what the user says"}}});
  for (Source& source : sources_) {
    try {
      const std::string expected = run(source.program, probe);
      source.takes_parts =
          expected.find("what the user says") != std::string::npos && run(source.program, parts) == expected;
    } catch (const Error&) {  // it wants other conversations than this one
    }
  }
}

const ChatTemplate::Source& ChatTemplate::choose(bool with_tools) const {
  const auto find = [&](std::string_view name) {
    return std::find_if(sources_.begin(), sources_.end(),
                        [&](const Source& source) { return source.name == name; });
  };
  auto found = with_tools ? find("tool_use") : sources_.end();
  if (found == sources_.end()) found = find("default");
  if (found == sources_.end()) fail("{}: has several chat templates and none is named default", where_);
  return *found;
}

std::string ChatTemplate::run(const jinja::Template& program, const ChatPrompt& prompt) const {
  jinja::Variables variables;
  for (const auto& [name, text] : special_tokens_) variables.emplace_back(name, jinja::Value::string(text));
  variables.emplace_back("messages", jinja::Value::from_json(prompt.messages));
  variables.emplace_back("tools", jinja::Value::from_json(prompt.tools));
  variables.emplace_back("documents", jinja::Value::from_json(prompt.documents));
  variables.emplace_back("add_generation_prompt", jinja::Value::boolean(prompt.add_generation_prompt));
  for (const auto& [name, value] : prompt.variables.items())
    variables.emplace_back(name, jinja::Value::from_json(value));
  return program.render(variables);
}

std::string ChatTemplate::render(const ChatPrompt& prompt) const {
  if (!prompt.messages.is_array() || prompt.messages.empty())
    fail("a chat prompt needs at least one message");
  const Source& source = choose(!prompt.tools.is_null());
  ChatPrompt ready = prompt;
  for (size_t i = 0; i < ready.messages.size(); ++i)
    ready.messages[i] = prepared(prompt.messages[i], i, source.takes_parts);
  return run(source.program, ready);
}

}  // namespace spot
