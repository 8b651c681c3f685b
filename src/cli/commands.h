// The subcommands of `spot`. Each adds its options to `app` and runs from its callback.
#pragma once

#include <CLI/CLI.hpp>

namespace spot::cli {

class ProcessGroup;

void add_distill(CLI::App& app, const ProcessGroup* group);  // nullptr: this process is alone
void add_generate(CLI::App& app);
void add_bench(CLI::App& app);
void add_bench_decode(CLI::App& parent);   // below bench
void add_bench_distill(CLI::App& parent);  // below bench
void add_bench_prefill(CLI::App& parent);  // below bench
void add_eval(CLI::App& app);
void add_eval_ruler(CLI::App& parent);  // below eval
void add_calibrate(CLI::App& app);
void add_convert(CLI::App& app);
void add_inspect(CLI::App& app);
void add_quantize(CLI::App& app);
void add_serve(CLI::App& app);

}  // namespace spot::cli
