// spot convert: a selector with its projections stored in another type.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/new_folder.h"
#include "selector/selector.h"

namespace spot::cli {
namespace {

namespace fs = std::filesystem;

struct ConvertOptions {
  std::string model, selector, store = "int8", out;
};

// The largest of all rows: how far a row is from what it was, as a share of its length.
double largest_row_change(const Selector& before, const Selector& after) {
  double largest = 0;
  const auto old_weights = before.parameters(), new_weights = after.parameters();
  for (size_t i = 0; i < old_weights.size(); ++i) {
    if (old_weights[i].dim() != 2) continue;
    const at::Tensor length = old_weights[i].norm(2, 1).clamp_min(1e-30);
    largest = std::max(largest, ((new_weights[i] - old_weights[i]).norm(2, 1) / length).max().item<double>());
  }
  return largest;
}

void run_convert(const ConvertOptions& options) {
  const ModelConfig model = ModelConfig::load(options.model);
  const fs::path from = Selector::resolve(options.selector, options.model), out = free_folder(options.out);
  const Selector selector = Selector::load(from.string(), "", model, at::kCPU);
  const WeightFormat format = weight_format_from_string(options.store);
  NewFolder folder(out, "spot convert");
  const fs::path& to = folder.path();
  selector.save(to, selector.fingerprint(), selector.notes(), format);
  const double change = largest_row_change(selector, Selector::load(to.string(), "", model, at::kCPU));
  const auto bytes = [](const fs::path& folder) { return fs::file_size(folder / "selector.safetensors"); };
  const std::string words =
      fmt::format("a row of the projections moved by at most {:.2g}% of its length", 100 * change);
  if (fs::exists(from / "README.md"))
    write_file_atomically(
        to / "README.md",
        read_file(from / "README.md") +
            fmt::format("\n## Stored as {}\n\nMade by `spot convert --store {}` of a selector "
                        "that is otherwise the same: {}.\n",
                        options.store, options.store, words));
  folder.finish();
  fmt::print("{}: {} bytes, before {}; {}\n", options.out, bytes(out), bytes(from), words);
}

}  // namespace

void add_convert(CLI::App& app) {
  auto options = std::make_shared<ConvertOptions>();
  CLI::App& command =
      *app.add_subcommand("convert", "Store a selector in another type, such as rows of 8 or 4 bits");
  command.add_option("--model", options->model, kModelHelp)->required()->transform(checkpoint_folder());
  command
      .add_option("--selector", options->selector,
                  "Folder of the selector, or the NAME of one in MODEL/selectors")
      ->required();
  command
      .add_option(
          "--store", options->store,
          "Type of the projections: float32, bfloat16, int8 (rows with a scale each) or int4 (groups of 32 "
          "with a scale each)")
      ->check(CLI::IsMember({"float32", "bfloat16", "int8", "int4"}))
      ->capture_default_str();
  command.add_option("--out", options->out, "Folder of the new selector")->required();
  command.callback([options, &command] {
    check_needs(command, {});
    run_convert(*options);
  });
}

}  // namespace spot::cli
