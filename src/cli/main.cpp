// spot: distil a selector, generate with it, evaluate it.
#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "cli/program.h"

namespace {

// The next file that is opened would take the number of a standard stream that is closed, and get what is printed
// there. Read-only, so that writing still fails; standard input write-only, so that reading does.
void fill_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (::fcntl(stream, F_GETFD) < 0) ::open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

}  // namespace

int main(int argc, char** argv) {
  fill_closed_streams();
  // A file that may not grow (ulimit -f) is an error of the write, as a full disk is.
  std::signal(SIGXFSZ, SIG_IGN);
  return spot::cli::run_program(argc, argv, nullptr);
}
