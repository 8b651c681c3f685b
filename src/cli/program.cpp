#include "cli/program.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstdio>
#include <regex>

#include "cli/commands.h"
#include "core/error.h"
#include "core/progress.h"

namespace spot::cli {
namespace {

// What a user should read of an exception.
std::string sentence(const std::exception& e) {
  if (dynamic_cast<const std::bad_alloc*>(&e))
    return "out of memory; use a shorter context, a smaller batch or --dtype bfloat16";
  if (dynamic_cast<const Error*>(&e)) return e.what();
  // torch's own text goes on with a C++ backtrace; its first line is what a user can act on.
  return dynamic_cast<const c10::Error*>(&e) ? "torch: " + first_line(e) : first_line(e);
}

// CLI11's own sentence in one line, its largest number shortened from 309 digits.
std::string usage_sentence(const CLI::ParseError& e) {
  static const std::regex line_breaks("\\s*\\n\\s*"), largest("1797693134862315[0-9.]*");
  return std::regex_replace(std::regex_replace(std::string(e.what()), line_breaks, " "), largest,
                            "any number");
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
  add_inspect(app);
  try {
    app.parse(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      fail("standard output could not be written; is its disk full?");
    return 0;
  } catch (const CLI::RuntimeError& e) {
    return e.get_exit_code();
  } catch (const CLI::ParseError& e) {
    if (e.get_exit_code() == 0) return talks ? app.exit(e) : 0;  // help and version
    if (talks)
      fmt::print(stderr, "error: {}; `spot --help` and `spot COMMAND --help` list what there is\n",
                 usage_sentence(e));
    return 2;
  } catch (const std::exception& e) {
    const std::string line = "error: " + sentence(e);
    if (group) {
      group->report_failure(line);
    } else {
      fmt::print(stderr, "{}\n", line);
    }
  }
  return 1;
}

}  // namespace spot::cli
