#include "kernels/select_blocks.cu"
#include "tests/kernels/emulator/emulator.h"
