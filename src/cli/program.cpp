#include "cli/program.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
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

// CLI11's own sentence in one line, without the limits of double, of 309 digits, as those of a range.
std::string usage_sentence(const CLI::ParseError& e) {
  static const std::regex line_breaks("\\s*\\n\\s*"), above("not in range 0\\.0+ to 1797693134862315[0-9.]*"),
      least("not in range (\\S+) to 1797693134862315[0-9.]*");
  std::string text = std::regex_replace(std::string(e.what()), line_breaks, " ");
  text = std::regex_replace(text, above, "is not above 0");
  return std::regex_replace(text, least, "is below $1");
}

// What is wrong in the file of --config, where that is what `e` complains of; else empty.
std::string config_sentence(const CLI::App& app, const CLI::ParseError& e) {
  static const std::string start = "INI was not able to parse ";
  if (!dynamic_cast<const CLI::ConfigError*>(&e) || app.get_config_ptr()->count() == 0) return "";
  const std::string file = app.get_config_ptr()->results().front(), text = e.what();
  const bool readable =
      std::all_of(text.begin(), text.end(), [](unsigned char c) { return c >= ' ' && c != 127; });
  if (!readable || !text.starts_with(start)) return readable ? file + ": " + text : file + ": is not TOML";
  return file + ": " + unknown_setting(app, text.substr(start.size()));
}

// What is wrong with a number as written, before its range is looked at; empty: nothing. CLI11 takes NaN and infinity,
// and for a whole number that is too large the nearest there is.
template <typename Number>
std::string number_fault(const std::string& text) {
  Number value{};
  errno = 0;
  if (CLI::detail::lexical_cast(text, value) && errno != ERANGE && std::isfinite(static_cast<double>(value)))
    return "";
  double size = 0;
  if (CLI::detail::lexical_cast(text, size) && std::abs(size) >= 0x1p63)
    return text + " is a number out of range";
  if (std::is_unsigned_v<Number> && size < 0) return text + " is below 0";
  return text + (std::is_integral_v<Number> ? " is no whole number" : " is no number");
}

// What CLI11 takes of any option: what is no number, as one out of a range, and, where a text names something, nothing
// at all.
void refuse_no_values(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    const bool free_text = option->check_lname("prompt") || option->check_lname("system");
    const std::string type = option->get_type_name();
    if (type.starts_with("FLOAT"))
      option->transform(
          CLI::Validator([](const std::string& text) { return number_fault<double>(text); }, ""));
    if (type.starts_with("INT"))
      option->transform(
          CLI::Validator([](const std::string& text) { return number_fault<int64_t>(text); }, ""));
    if (type.starts_with("UINT"))
      option->transform(
          CLI::Validator([](const std::string& text) { return number_fault<uint64_t>(text); }, ""));
    if (type.starts_with("TEXT") && !free_text)
      option->transform(CLI::Validator(
          [](const std::string& text) {
            return text.empty() ? std::string("the value is empty; give one, or leave the option out") : "";
          },
          ""));
  }
  for (CLI::App* below : app.get_subcommands([](CLI::App*) { return true; })) refuse_no_values(*below);
}

// "--out=" alone, for which CLI11 takes the next word.
void refuse_cut_words(int argc, const char* const* argv) {
  for (int i = 1; i < argc && std::string_view(argv[i]) != "--"; ++i)
    if (const std::string_view word = argv[i]; word.starts_with("--") && word.find('=') + 1 == word.size())
      throw UsageError(fmt::format("{} has no value; give one, or leave the option out", word));
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
  refuse_no_values(app);
  int status = 1;
  std::string line;
  try {
    refuse_cut_words(argc, argv);
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
        std::string unknown = find_unknown_word(app, argc, argv);
        if (unknown.empty()) unknown = config_sentence(app, e);
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
