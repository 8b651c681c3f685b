// The program as a function of a shared library, for a process that has joined a group of torch.distributed.
// The installed
// torch packages lack the headers of gloo and NCCL, without which C++ can use a group but not make one;
// tools/distill.py does.
#include <cstdio>

#include "cli/program.h"

extern "C" int spot_run(int argc, const char* const* argv, const char* group_name) {
  const spot::cli::ProcessGroup group(group_name);
  const int status = spot::cli::run_program(argc, argv, &group);
  std::fflush(stdout);  // the caller may leave without
  return status;
}
