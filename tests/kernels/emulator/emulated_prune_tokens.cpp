#include "kernels/prune_tokens.cu"
#include "tests/kernels/emulator/emulator.h"
