// What a command line can have wrong beside what CLI11 finds: words that nothing knows, options that cannot matter.
#pragma once

#include <CLI/CLI.hpp>
#include <set>
#include <string>

#include "core/error.h"

namespace spot::cli {

// A mistake on the command line; the program ends with status 2.
class UsageError : public Error {
 public:
  using Error::Error;
};

// What an option may need in order to matter.
enum class Need {
  chat,                // the prompt goes through the chat template
  sparse,              // an attention that is not dense
  spot,                // the selector's attention
  sampling,            // tokens are drawn, not the likeliest taken
  sparse_loss,         // the loss is over the student's own top tokens
  falling_rate,        // steps are left after warm-up and the constant part
  held_out_documents,  // documents are held out
  held_out_sequences,  // and sequences of them are measured
  calibration,         // and temperatures fitted on them
  answers,             // prompts are run, not only written
  needles,             // a needle task is among the tasks
  preset,              // the selector's shape comes from a preset
};

// Throws UsageError naming the first option given to `command` that cannot matter: one with a need, by the table in
// usage.cpp, that is not in `met`, or one of the command above it.
void check_needs(const CLI::App& command, const std::set<Need>& met);

// The first word of the command line that is no command or option where it stands, in a sentence that names it and the
// nearest word there is; empty when all are known.
std::string find_unknown_word(const CLI::App& app, int argc, const char* const* argv);

// The same of a place in the file of --config, as CLI11 names it: "generate.promptt", or "generat.++" for a section.
std::string unknown_setting(const CLI::App& app, const std::string& place);

}  // namespace spot::cli
