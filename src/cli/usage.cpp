#include "cli/usage.h"

#include <algorithm>
#include <numeric>
#include <string_view>
#include <vector>

namespace spot::cli {
namespace {

struct Row {
  const char* command;
  const char* option;
  Need need;
};

// The settings of methods are not here: which method reads which stands in attention/policies/, and MethodOptions asks
// there. Nor are options that ask for what holds anyway, such as --eager without a GPU.
constexpr Row kRows[] = {
    {"spot generate", "--system", Need::chat},
    {"spot generate", "--thinking", Need::chat},
    {"spot generate", "--by-layer", Need::sparse},
    {"spot generate", "--selector", Need::sparse},
    {"spot generate", "--sampling-top-p", Need::sampling},
    {"spot generate", "--sampling-top-k", Need::sampling},
    {"spot generate", "--sampling-min-p", Need::sampling},
    {"spot generate", "--seed", Need::sampling},
    {"spot distill", "--k-train", Need::sparse_loss},
    {"spot distill", "--rest-bucket", Need::sparse_loss},
    {"spot distill", "--final-lr", Need::falling_rate},
    {"spot distill", "--held-out-sequences", Need::held_out_documents},
    {"spot distill", "--held-out-interval", Need::held_out_sequences},
    {"spot distill", "--calibration-length", Need::calibration},
    {"spot eval text", "--selector", Need::sparse},
    {"spot eval text", "--measured-queries", Need::sparse},
    {"spot eval needle", "--selector", Need::sparse},
    {"spot eval ruler", "--device", Need::answers},
    {"spot eval ruler", "--dtype", Need::answers},
    {"spot eval ruler", "--threads", Need::answers},
    {"spot eval ruler", "--kv-cache-dtype", Need::answers},
    {"spot eval ruler", "--selector", Need::answers},
    {"spot eval ruler", "--selector", Need::sparse},
    {"spot eval ruler", "--methods", Need::answers},
    {"spot eval ruler", "--out", Need::answers},
    {"spot eval ruler", "--batch", Need::answers},
    {"spot eval ruler", "--prefill-chunk", Need::answers},
    {"spot eval ruler", "--stop-at-newline", Need::answers},
    {"spot eval ruler", "--whole-answers", Need::answers},
    {"spot eval ruler", "--mass-every", Need::answers},
    {"spot eval ruler", "--mass-every", Need::sparse},
    {"spot eval ruler", "--wording", Need::needles},
    {"spot bench", "--preset", Need::spot},
    {"spot inspect", "--preset", Need::preset},
};

const char* reason(Need need) {
  switch (need) {
    case Need::chat:
      return "it is for --chat";
    case Need::sparse:
      return "the attention is dense";
    case Need::spot:
      return "no attention here reads a selector";
    case Need::sampling:
      return "the likeliest token is taken (temperature 0); give a --temperature";
    case Need::sparse_loss:
      return "it is for --loss sparse";
    case Need::falling_rate:
      return "warm-up and --constant-share leave no step in which the rate falls";
    case Need::held_out_documents:
      return "--held-out-every 0 holds nothing out";
    case Need::held_out_sequences:
      return "no held-out text is measured (--held-out-every, --held-out-sequences)";
    case Need::calibration:
      return "no temperature is fitted (--no-calibrate, --held-out-every, --held-out-sequences)";
    case Need::answers:
      return "--write-prompts runs nothing";
    case Need::needles:
      return "no task here has needles";
    case Need::preset:
      return "the selector of --selector has a shape of its own";
  }
  return "";
}

// "spot eval ruler"
std::string full_name(const CLI::App& command) {
  const CLI::App* parent = command.get_parent();
  return parent ? full_name(*parent) + " " + command.get_name() : "spot";
}

// Least number of letters inserted, removed, replaced or swapped with the next.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1])
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

// "; is --model meant?", or nothing when no word comes near.
std::string suggestion(const std::string& word, const std::vector<std::string>& known) {
  if (word.size() > 100) return "";
  const std::string* best = nullptr;
  size_t least = std::max<size_t>(2, word.size() / 3) + 1;
  for (const std::string& candidate : known)
    if (const size_t distance = edit_distance(word, candidate); distance < least)
      least = distance, best = &candidate;
  return best ? "; is " + *best + " meant?" : "";
}

// All of `command`, or the one of this name; empty when there is none.
std::vector<const CLI::App*> subcommands(const CLI::App& command, const std::string& name = "") {
  return command.get_subcommands(
      [&](const CLI::App* sub) { return name.empty() || sub->get_name() == name; });
}

const CLI::Option* option_of(const CLI::App& command, const std::string& name) {
  if (const CLI::Option* option = command.get_option_no_throw(name)) return option;
  return command.get_fallthrough() && command.get_parent() ? option_of(*command.get_parent(), name) : nullptr;
}

std::vector<std::string> option_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  return names;
}

}  // namespace

void check_needs(const CLI::App& command, const std::set<Need>& met) {
  const std::string name = full_name(command);
  for (const CLI::App* above = command.get_parent(); above && above->get_parent();
       above = above->get_parent())
    for (const CLI::Option* option : above->get_options())
      if (option->count() > 0)
        throw UsageError(fmt::format("{} has no effect before the word '{}', it is for `{}` alone",
                                     option->get_name(), command.get_name(), full_name(*above)));
  for (const Row& row : kRows) {
    const CLI::Option* option = name == row.command ? command.get_option_no_throw(row.option) : nullptr;
    if (option && option->count() > 0 && !met.contains(row.need))
      throw UsageError(fmt::format("{} has no effect: {}; leave it out", row.option, reason(row.need)));
  }
}

std::string find_unknown_word(const CLI::App& app, int argc, const char* const* argv) {
  const CLI::App* command = &app;
  size_t positionals = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--") return "";
    const bool is_number = word.find_first_not_of("-+.0123456789e") == std::string::npos;
    if (word.size() < 2 || word[0] != '-' || is_number) {
      if (const auto next = subcommands(*command, word); !word.empty() && !next.empty()) {
        command = next.front();
        positionals = 0;
        continue;
      }
      size_t taken = 0;
      for (const CLI::Option* option : command->get_options()) taken += option->get_positional();
      if (positionals++ < taken) continue;
      std::vector<std::string> commands;
      for (const CLI::App* sub : subcommands(*command)) commands.push_back(sub->get_name());
      return commands.empty() ? fmt::format("`{}` takes no word '{}'", full_name(*command), word)
                              : fmt::format("`{}` has no command '{}'{}", full_name(*command), word,
                                            suggestion(word, commands));
    }
    const std::string name = word.substr(0, word.find('='));
    const CLI::Option* option = option_of(*command, name);
    if (!option && name == "--config" && command != &app)
      return fmt::format("--config stands before the command: spot --config FILE {} ...",
                         full_name(*command).substr(5));
    if (!option)
      return fmt::format("`{}` has no option {}{}", full_name(*command), name,
                         suggestion(name, option_names(*command)));
    if (name.size() < word.size()) continue;
    // Its values: as many as it needs whatever they look like, then more while they do not look like options.
    const int least = option->get_items_expected_min(), most = option->get_items_expected_max();
    for (int value = 0; value < most && i + 1 < argc; ++value) {
      if (value >= least && argv[i + 1][0] == '-') break;
      ++i;
    }
  }
  return "";
}

std::string unknown_setting(const CLI::App& app, const std::string& place) {
  const CLI::App* command = &app;
  size_t begin = 0;
  for (size_t end; (end = place.find('.', begin)) != std::string::npos; begin = end + 1) {
    const auto next = subcommands(*command, place.substr(begin, end - begin));
    if (end == begin || next.empty()) {
      std::vector<std::string> known;
      for (const CLI::App* sub : subcommands(*command)) known.push_back(sub->get_name());
      const std::string word = place.substr(begin, end - begin);
      return fmt::format("the section [{}] is no command{}", word, suggestion(word, known));
    }
    command = next.front();
  }
  const std::string name = place.substr(begin);
  std::vector<std::string> known = option_names(*command);
  for (std::string& option : known) option.erase(0, 2);
  return fmt::format("`{}` has no option {}{}", full_name(*command), name, suggestion(name, known));
}

}  // namespace spot::cli
