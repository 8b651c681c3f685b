// spot: distil a selector, generate with it, evaluate it.
#include "cli/program.h"

int main(int argc, char** argv) {
  return spot::cli::run_program(argc, argv, nullptr);
}
