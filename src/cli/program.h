// The `spot` program: one process, or one of a distributed run.
#pragma once

#include "cli/process_group.h"

namespace spot::cli {

// Parses and runs a command line; returns the exit status. Errors go to standard error as one sentence, from
// one process of `group`. Without a group (nullptr) this process is alone.
int run_program(int argc, const char* const* argv, const ProcessGroup* group);

}  // namespace spot::cli
