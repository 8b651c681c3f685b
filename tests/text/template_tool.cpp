// Renders templates for the tests in Python: each line of IN is {"template": ..., "variables": {...}} or
// {"folder": ..., "messages": [...], and the other members of ChatPrompt}; OUT gets {"text": ...} or
// {"error": ...} a line.
//   template_tool IN OUT
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "core/files.h"
#include "text/chat_template.h"
#include "text/jinja/template.h"

namespace {

using Json = nlohmann::ordered_json;

std::string render(const Json& request) {
  if (request.contains("folder")) {
    spot::ChatPrompt prompt;
    prompt.messages = request.at("messages");
    prompt.tools = request.value("tools", Json());
    prompt.documents = request.value("documents", Json());
    prompt.variables = request.value("variables", Json::object());
    prompt.add_generation_prompt = request.value("add_generation_prompt", true);
    std::optional<std::filesystem::path> file;
    if (request.contains("file")) file = request.at("file").get<std::string>();
    return spot::ChatTemplate::load(request.at("folder").get<std::string>(), file).render(prompt);
  }
  const spot::jinja::Template source(request.at("template").get<std::string>(), "template");
  spot::jinja::Variables variables;
  for (const auto& [name, value] : request.at("variables").items())
    variables.emplace_back(name, spot::jinja::Value::from_json(value));
  return source.render(variables);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) spot::fail("usage: template_tool IN OUT");
  std::istringstream in(spot::read_file(argv[1]));
  std::string out;
  for (std::string line; std::getline(in, line);) {
    Json answer;
    try {
      answer["text"] = render(Json::parse(line));
    } catch (const spot::Error& e) {
      answer["error"] = e.what();
    }
    out += answer.dump() + "\n";
  }
  spot::write_file_atomically(argv[2], out);
  return 0;
} catch (const spot::Error& e) {
  std::cerr << "error: " << e.what() << "\n";
  return 1;
}
