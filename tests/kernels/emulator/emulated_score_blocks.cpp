#include "tests/kernels/emulator/emulator.h"

#include "kernels/score_blocks.cu"
