// spot: distil a selector, generate with it, evaluate it.
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include "cli/commands.h"
#include "core/error.h"

int main(int argc, char** argv) {
  CLI::App app{"SpotAttention: learned sparse attention for frozen pretrained language models"};
  app.require_subcommand(1);
  app.set_version_flag("--version", "spot " SPOT_VERSION);
  spot::cli::add_distill(app);
  spot::cli::add_generate(app);
  spot::cli::add_eval(app);
  spot::cli::add_bench(app);
  spot::cli::add_inspect(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& e) {
    return app.exit(e);
  } catch (const spot::Error& e) {
    fmt::print(stderr, "error: {}\n", e.what());
  } catch (const c10::Error& e) {
    // torch's own text goes on with a C++ backtrace; its first line is what a user can act on.
    fmt::print(stderr, "error: torch: {}\n", spot::first_line(e));
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "error: out of memory; use a shorter context, a smaller batch or --dtype bfloat16\n");
  } catch (const std::exception& e) {
    fmt::print(stderr, "error: {}\n", spot::first_line(e));
  }
  return 1;
}
