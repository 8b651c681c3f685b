#include "cli/program.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <regex>

#include "cli/commands.h"
#include "cli/usage.h"
#include "core/memory.h"
#include "core/notice.h"
#include "core/progress.h"

namespace spot::cli {
namespace {

// What a user should read of an exception.
std::string sentence(const std::exception& e) {
  if (dynamic_cast<const Error*>(&e)) return e.what();
  if (std::string asked; is_out_of_memory(e, asked))
    return fmt::format("out of memory{}; use a shorter context, a smaller batch or --dtype bfloat16",
                       asked.empty() ? "" : ": " + asked + " in one piece were asked for");
  // torch's own text goes on with a C++ backtrace; its first line is what a user can act on.
  return dynamic_cast<const c10::Error*>(&e) ? "torch: " + first_line(e) : first_line(e);
}

// CLI11's own sentence in one line, its largest number shortened from 309 digits.
std::string usage_sentence(const CLI::ParseError& e) {
  static const std::regex line_breaks("\\s*\\n\\s*"), largest("1797693134862315[0-9.]*");
  return std::regex_replace(std::regex_replace(std::string(e.what()), line_breaks, " "), largest,
                            "any number");
}

// Comparisons let it pass, so that no range of CLI11's finds it.
void refuse_nan(CLI::App& app) {
  for (CLI::Option* option : app.get_options())
    if (option->get_type_name().starts_with("FLOAT"))
      option->check([](const std::string& text) {
        return std::isnan(std::strtod(text.c_str(), nullptr)) ? text + " is no number" : std::string();
      });
  for (CLI::App* below : app.get_subcommands([](CLI::App*) { return true; })) refuse_nan(*below);
}

}  // namespace

int run_program(int argc, const char* const* argv, const ProcessGroup* group) {
  const bool talks = !group || group->rank() == 0;
  if (!talks) silence();
  CLI::App app{"SpotAttention: learned sparse attention for frozen pretrained language models"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "spot " SPOT_VERSION);
  app.set_config(
      "--config", "",
      "Read options from a TOML file: a section [distill], names as on the command line without the dashes");
  app.allow_config_extras(false);
  add_distill(app, group);
  add_generate(app);
  add_serve(app);
  add_eval(app);
  add_bench(app);
  add_calibrate(app);
  add_convert(app);
  add_quantize(app);
  add_inspect(app);
  refuse_nan(app);
  int status = 1;
  std::string line;
  try {
    try {
      app.parse(argc, argv);
      status = 0;
    } catch (const CLI::ParseError& e) {
      if (const auto* ended = dynamic_cast<const CLI::RuntimeError*>(&e)) {
        status = ended->get_exit_code();
      } else if (e.get_exit_code() == 0) {  // help and version
        status = talks ? app.exit(e) : 0;
      } else {
        // What CLI11 complains of first may follow from a word that it does not name.
        const std::string unknown = find_unknown_word(app, argc, argv);
        throw UsageError(fmt::format("{} (`spot --help` and `spot COMMAND --help` list what there is)",
                                     unknown.empty() ? usage_sentence(e) : unknown));
      }
    }
    if (status == 0 && (!(std::cout << std::flush) || std::fflush(stdout) != 0 || std::ferror(stdout)))
      fail("standard output could not be written; is its disk full?");
    return status;
  } catch (const UsageError& e) {
    status = 2;
    line = e.what();
  } catch (const std::exception& e) {
    // Behind an option that nothing knows, its value may have been taken for something else.
    line = find_unknown_word(app, argc, argv);
    status = line.empty() ? 1 : 2;
    if (line.empty()) line = sentence(e);
  }
  line = "error: " + line;
  // All processes of a group read the same command line.
  if (group && status == 1)
    group->report_failure(line);
  else if (talks)
    notice("{}\n", line);
  return status;
}

}  // namespace spot::cli
