// spot calibrate: which threshold captures which mass, fitted for a selector that there is already.
#include "distill/calibrate.h"

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/folder_lock.h"
#include "distill/card.h"
#include "distill/trainer.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

namespace fs = std::filesystem;

struct CalibrateOptions {
  ModelOptions model;
  SelectorOptions selector;
  DataConfig data;
  int64_t contexts = 4;
};

// Contexts of one length, of the held-out documents or, where none are, of all; each token once.
std::vector<TokenSequence> read_contexts(const CalibrateOptions& options, const Tokenizer& tokenizer) {
  TrainingData data(
      options.data, [&](const std::string& text) { return tokenizer.encode(text); }, document_end(tokenizer));
  std::vector<TokenSequence> contexts = data.held_out(options.contexts);
  while (options.data.held_out_every == 0 && static_cast<int64_t>(contexts.size()) < options.contexts) {
    TokenSequence next = data.next();
    if (data.epoch() > 0) break;  // it took tokens of the text's beginning again
    contexts.push_back(std::move(next));
  }
  if (static_cast<int64_t>(contexts.size()) < options.contexts)
    fail("the text gives {} of {} contexts of {} tokens; give more text, or lower --contexts or --length",
         contexts.size(), options.contexts, options.data.sequence_length);
  return contexts;
}

void run_calibrate(const CalibrateOptions& options) {
  const ModelConfig model = options.model.prepare();
  const int64_t length = options.data.sequence_length;
  if (length > model.max_position_embeddings)
    fail("--length is {}, the model reaches {} positions; ask for less", length,
         model.max_position_embeddings);
  options.selector.read_config(options.model, model);  // found wrong before the text and the weights are read
  const std::vector<TokenSequence> contexts = read_contexts(options, Tokenizer::load(options.model.folder));
  const fs::path folder = Selector::resolve(options.selector.name, options.model.folder);
  const FolderLock lock(folder, "spot calibrate");
  const Backbone backbone = options.model.load();
  Selector selector = *options.selector.load(options.model, backbone);
  CalibrationOptions how;
  how.fit_temperature = false;
  const Calibration fitted = calibrate(backbone, selector, contexts, how);
  if (fitted.mass_table.empty()) {
    if (fitted.contexts > 0)
      fail("no mass is fitted for selectors of more than {} sets a layer", kernels::kMostSets);
    fail("contexts of {} tokens leave too few blocks outside sinks and recency; give a longer --length",
         length);
  }
  selector.selection().residual_mass = fitted.residual_mass;
  selector.selection().mass_table = fitted.mass_table;
  nlohmann::json notes = selector.notes();
  notes["mass_calibration"] = fitted.mass_notes(options.data.paths);
  selector.save_config(folder, notes);
  if (fs::exists(folder / "README.md"))
    write_file_atomically(folder / "README.md", with_mass_section(read_file(folder / "README.md"),
                                                                  read_json(folder / "selector.json")));
  fmt::print("threshold   captured mass   share of the tokens\n");
  for (const auto& [threshold, mass, tokens] : fitted.mass_table)
    fmt::print("{:<9.2g}   {:<13.4f}   {:.1f}%\n", threshold, mass, 100 * tokens);
  fmt::print("{}: --mass takes {:.4f} to {:.4f}\n", (folder / "selector.json").string(),
             fitted.mass_table.front().mass, fitted.mass_table.back().mass);
}

}  // namespace

void add_calibrate(CLI::App& app) {
  auto options = std::make_shared<CalibrateOptions>();
  options->data.held_out_every = 0;
  CLI::App& command = *app.add_subcommand(
      "calibrate", "Fit which threshold captures which mass (--mass), for a selector without retraining");
  options->model.add(command);
  options->selector.add(command);
  command.get_option("--selector")->required();
  command
      .add_option("--data", options->data.paths,
                  "Text files, .jsonl, .gz, .zst, or folders of them, on which the selector was not trained")
      ->required();
  command
      .add_option(
          "--held-out-every", options->data.held_out_every,
          "Take every n-th document only: those that `spot distill` held out of the same text (0: all)")
      ->capture_default_str();
  command
      .add_option("--length", options->data.sequence_length, "Tokens a context; as long as those that matter")
      ->capture_default_str();
  command.add_option("--contexts", options->contexts, "Contexts")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.callback([options, &command] {
    check_needs(command, {});
    run_calibrate(*options);
  });
}

}  // namespace spot::cli
