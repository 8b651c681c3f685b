#include "kernels/decode_blocks.cu"
#include "tests/kernels/emulator/emulator.h"
