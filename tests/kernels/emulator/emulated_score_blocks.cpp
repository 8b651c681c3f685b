#include "kernels/score_blocks.cu"
#include "tests/kernels/emulator/emulator.h"
