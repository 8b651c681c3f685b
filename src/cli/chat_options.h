// --chat and --chat-template, which several subcommands share.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "text/chat_template.h"

namespace spot::cli {

struct ChatOptions {
  bool chat = false;
  std::string template_file;

  void add(CLI::App& app, const std::string& help) {
    auto* flag = app.add_flag("--chat", chat, help);
    app.add_option("--chat-template", template_file,
                   "A Jinja file to use in place of the model's chat template")
        ->needs(flag);
  }
  ChatTemplate load(const std::string& model_folder) const {
    if (template_file.empty()) return ChatTemplate::load(model_folder);
    return ChatTemplate::load(model_folder, template_file);
  }
};

}  // namespace spot::cli
