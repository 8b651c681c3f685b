#include "tests/kernels/emulator/emulator.h"

#include "kernels/prune_tokens.cu"
