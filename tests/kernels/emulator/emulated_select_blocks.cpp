#include "tests/kernels/emulator/emulator.h"

#include "kernels/select_blocks.cu"
