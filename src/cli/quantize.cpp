// spot quantize: an FP8 checkpoint of a plain one.
#include "model/quantize.h"

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/usage.h"
#include "core/notice.h"
#include "core/stop_signals.h"

namespace spot::cli {
namespace {

struct QuantizeOptions {
  std::string model, out;
  double shard_gb = 5;
};

int run_quantize(const QuantizeOptions& options) {
  const StopSignals signals(true);
  const auto report =
      quantize_checkpoint(options.model, options.out, static_cast<uint64_t>(options.shard_gb * 1e9),
                          [&] { return signals.received(); });
  if (!report) {
    notice("interrupted; nothing was written\n");
    return 130;
  }
  fmt::print(
      "{}: {} bytes of tensors in {} {}, before {}; {} matrices are FP8, moved by at most {:.2g}% of their "
      "length ({})\n",
      options.out, report->bytes, report->shards, report->shards == 1 ? "file" : "files",
      report->bytes_before, report->matrices, 100 * report->largest_change, report->most_changed);
  return 0;
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto options = std::make_shared<QuantizeOptions>();
  CLI::App& command = *app.add_subcommand(
      "quantize", "Write an FP8 checkpoint, half the size, from one in bfloat16, float16 or float32");
  command.add_option("model", options->model, kModelHelp)->required()->transform(checkpoint_folder());
  command.add_option("--out", options->out, "Folder of the new checkpoint")->required();
  command.add_option("--shard-gb", options->shard_gb, "Most GB (10^9 bytes) of tensors in a file")
      ->check(CLI::Range(0.001, 1e6))
      ->capture_default_str();
  command.callback([options, &command] {
    check_needs(command, {});
    if (const int status = run_quantize(*options); status != 0) throw CLI::RuntimeError(status);
  });
}

}  // namespace spot::cli
